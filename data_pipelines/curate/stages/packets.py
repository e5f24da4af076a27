"""The exact hash of a file's video: equal for files that differ only in their wrapping.

It is over the demuxed packets, so a file that was remuxed, renamed or given another sound track is
found, and nothing is decoded. What was encoded again is found by `copies`.
"""

import dataclasses
import hashlib
from typing import Any

import av
import pyarrow as pa

from data_pipelines.curate import stage
from mgen_jax.data import media


@dataclasses.dataclass(frozen=True)
class Packets(stage.SourceStage):
  """A file without video that can be demuxed has no hash: probe says what is wrong with it."""

  name = "packets"
  columns = {"packets_md5": pa.string()}

  def scorer(self) -> str:
    return "md5 of packets"

  def score(self, path: str) -> dict[str, Any]:
    digest = hashlib.md5(usedforsecurity=False)
    count = 0
    try:
      with media.open_media(path) as container:
        for packet in container.demux(media.video_stream(container, path)):
          if packet.size:
            digest.update(bytes(packet))
            count += 1
    except (media.MediaError, av.FFmpegError, OSError):
      return {"packets_md5": None}
    return {"packets_md5": digest.hexdigest() if count else None}
