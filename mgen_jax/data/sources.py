"""Sources: the examples of one bucket by index, from media that are decoded or from records.

What the streams of `pipeline` draw from. They are picklable and can be read from many threads.
Not here: which clip goes to which bucket (`buckets`), the order and the batches (`pipeline`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from mgen_jax.data import media
from mgen_jax.data.buckets import Bucket, Groups, Rate, group, sampling_rate
from mgen_jax.data.ingest import Clip, Index, Split
from mgen_jax.data.records import RecordSource
from mgen_jax.errors import UserError

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator | None], Example]

# How many unreadable clips in a row are passed over before reading gives up.
_MOST_UNREADABLE = 8


class Source(Protocol):
  """What the pipeline needs of the examples of one bucket.

  `digest` names the content: equal digests give equal examples.
  """

  digest: str

  def __len__(self) -> int: ...

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    """Example `index`; `rng` decides what is random in it, None asks for none (evaluation)."""

  def name(self, index: int) -> str:
    """What example `index` was made from, for people who look for bad data."""


class MediaSource:
  """Windows of the clips of an index, decoded when they are asked for.

  An example is {"video": uint8 [T, H, W, 3], "caption": str, "index": int (into `clips`), "start":
  float (seconds), "fps": float (0 for an image)}. A clip longer than the bucket gives a random
  window, or the centre one without `rng`; an image bucket gives one frame of a video alike.

  A clip that turns out to be damaged is replaced by the next one that is not, with a warning; the
  same clip is replaced by the same one on every host and after every restart.

  Args:
    folder: that the paths of `clips` are relative to.
    clips: that `buckets.assign` put into `bucket` with the same `fps`.
    fps: frames per second to sample at (`buckets.Rate`).
  """

  def __init__(
    self, folder: Path | str, clips: Sequence[Clip], bucket: Bucket, *, fps: Rate = None
  ):
    self.folder = Path(folder)
    self.clips = tuple(clips)
    self.bucket = bucket
    self.fps = fps
    content = [bucket.name, fps, [clip.content() for clip in self.clips]]
    self.digest = sha256(content)

  def __len__(self) -> int:
    return len(self.clips)

  def name(self, index: int) -> str:
    return self.clips[index].path

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    place = 0.5 if rng is None else rng.random()
    for attempt in range(min(_MOST_UNREADABLE, len(self))):
      candidate = (index + attempt) % len(self)
      try:
        return self._read(candidate, place)
      except media.MediaError as error:
        damage = error
        logging.warning("%s Another clip takes its place.", error)
    raise UserError(
      f"{attempt + 1} clips in a row of {self.folder} cannot be read; the last says: {damage}"
    ) from damage

  def _open(self, clip: Clip) -> Path | media.NamedBytes:
    return clip.open(self.folder)

  def _read(self, index: int, place: float) -> Example:
    clip, bucket = self.clips[index], self.bucket
    size = (bucket.height, bucket.width)
    start, fps = 0.0, 0.0
    if clip.kind == "image":
      video = media.read_image(self._open(clip), size)[None]
    else:
      start, duration = window(clip, bucket.frames, self.fps, place)
      fps = 0.0 if bucket.is_image else bucket.frames / duration
      video = media.read_video(
        self._open(clip), frames=bucket.frames, start=start, duration=duration, size=size
      )
    return {"video": video, "caption": clip.caption, "index": index, "start": start, "fps": fps}


def window(clip: Clip, frames: int, fps: Rate, place: float) -> tuple[float, float]:
  """(start, duration) in seconds of the window of `frames` frames at `place` in a clip.

  Args:
    fps: frames per second to sample at.
    place: in [0, 1): 0 the first window that fits, 0.5 the centre one, 1 the last. Windows start on
      a frame of the clip, so that at its own rate the frames come out one by one.
  """
  duration = frames / sampling_rate(clip.frames, clip.fps, frames, fps)
  places = max(0, math.floor(clip.frames - duration * clip.fps + 1e-6)) + 1
  return math.floor(place * places) / clip.fps, duration


def media_sources(
  index: Index,
  buckets: Sequence[Bucket],
  *,
  split: Split,
  images_from_videos: bool = False,
  fps: Rate = None,
  max_crop: float = 0.2,
  make: Callable[[Sequence[Clip], Bucket], MediaSource] | None = None,
) -> tuple[dict[Bucket, MediaSource], Groups]:
  """A MediaSource for every bucket (perhaps empty), and how the clips were shared out.

  Arguments as in `buckets.group`; `make` gives the source of a bucket's clips where they do not lie
  in the folder of the index.
  """
  groups = group(
    index.of_split(split),
    buckets,
    images_from_videos=images_from_videos,
    target_fps=fps,
    max_crop=max_crop,
  )
  make = make or (lambda clips, bucket: MediaSource(index.folder, clips, bucket, fps=fps))
  return {bucket: make(clips, bucket) for bucket, clips in groups.clips.items()}, groups


class LatentSource:
  """Records that the encode stage wrote.

  An example is {each array of the record, "caption": str, "index": int, "start": float (seconds),
  "fps": float, "camera": its motion, "" if that is not known}.
  """

  def __init__(self, records: RecordSource):
    self.records = records
    self.bucket = records.bucket
    self.digest = records.digest

  def __len__(self) -> int:
    return len(self.records)

  def name(self, index: int) -> str:
    record = self.records[index]
    return f"{record.id} at {record.start:g} s" if record.fps else record.id

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    del rng
    record = self.records[index]
    return {
      **record.arrays,
      "caption": record.caption,
      "index": index,
      "start": record.start,
      "fps": record.fps,
      "camera": str(record.info.get("camera", "")),
    }


class JointSource:
  """Clips, each with images drawn from another source beside it (joint image-video training).

  An example is that of the clip with "images", a list of `count` examples of `images`: drawn at
  random and independently of the clip, or the first ones without `rng`.
  """

  def __init__(self, clips: Source, images: Source, count: int):
    if not len(images):
      raise UserError(
        f"{count} images are to come beside each clip, and the image bucket has no examples: add "
        "clips or images of its shape."
      )
    self.clips = clips
    self.images = images
    self.count = count
    self.digest = sha256([clips.digest, images.digest, count])

  def __len__(self) -> int:
    return len(self.clips)

  def name(self, index: int) -> str:
    return self.clips.name(index)

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    chosen = (
      np.arange(self.count) if rng is None else rng.integers(len(self.images), size=self.count)
    )
    images = [self.images.example(int(i) % len(self.images), rng) for i in chosen]
    return {**self.clips.example(index, rng), "images": images}


def sha256(content: Any) -> str:
  """Of plain values, as JSON writes them."""
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
