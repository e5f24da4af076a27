"""The exact hash of a file's video: equal for files that differ only in their wrapping.

It is over the demuxed packets, so a file that was remuxed, renamed or given another sound track is
found, and nothing is decoded. What was encoded again is found by `copies`. Since every byte is read
here, damage that only whole parts of a file tell is found here too: by the checksums of containers
that have some, and in motion JPEG by its images.
"""

import dataclasses
import hashlib
import importlib.metadata
from typing import Any

import av
import pyarrow as pa

from data_pipelines.curate import containers, decode, jpegs, stage
from mgen_jax.data import media


@dataclasses.dataclass(frozen=True)
class Packets(stage.SourceStage):
  """A file without video that can be demuxed has no hash: probe says what is wrong with it."""

  name = "packets"
  code = 3
  columns = {"packets_md5": pa.string()}

  def scorer(self) -> str:
    return f"md5 of packets, simplejpeg {importlib.metadata.version('simplejpeg')}"

  def score(self, path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
      place = containers.wrong_part(file)
    if place is not None:
      return _damaged(path, f"the part at byte {place} lacks the checksum it states")
    digest = hashlib.md5(usedforsecurity=False)
    count = 0
    images = None
    try:
      with media.open_media(path) as container:
        stream = media.video_stream(container, path)
        context = stream.codec_context
        decode.expect(media.header_duration(container, stream))
        if context.name == "mjpeg":
          images = jpegs.Damage(context.width * context.height)
        for packet in container.demux(stream):
          if packet.size:
            data = bytes(packet)
            digest.update(data)
            count += 1
            if images is not None:
              images.add(data)
    except (media.MediaError, av.FFmpegError, OSError):
      return {"packets_md5": None}
    if images is not None and (fault := images.found()):
      return _damaged(path, fault)
    return {"packets_md5": digest.hexdigest() if count else None}


def _damaged(path: str, how: str) -> dict[str, Any]:
  return {"packets_md5": None, "error_code": "damaged", "error": f"{path} is damaged: {how}."}
