"""Buckets: the few shapes (frames x height x width) that training compiles for, and who goes where.

Each bucket is one XLA program, so every clip is cut and cropped to one of a handful of shapes
(Movie Gen, Table 2). This file only decides; reading and cropping is `media`, batching `pipeline`.
"""

import dataclasses
import enum
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from mgen_jax.errors import UserError

# A source may be this much slower than the rate asked for: 23.976 frames/s serves a bucket at 24.
_RATE_TOLERANCE = 0.01
_EPSILON = 1e-6
_WHOLE = 2**40  # more frames than any bucket has

# Frames per second to sample clips at. None: each at its own. A number: all at this one. (low,
# high): a whole clip becomes the frames of its bucket, at the rate in this range that this takes;
# one too long for that gives a window at `low` (Movie Gen, Table 2, has (16, 32)).
Rate = float | tuple[float, float] | None


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
  """A shape of one example: `frames` x `height` x `width` pixels; one frame is an image."""

  frames: int
  height: int
  width: int

  def __post_init__(self):
    for side in dataclasses.astuple(self):
      if not isinstance(side, int) or side < 1:
        raise UserError(f"a bucket needs three positive whole numbers, got {self.name}.")

  @property
  def name(self) -> str:
    return f"{self.frames}x{self.height}x{self.width}"

  @property
  def aspect(self) -> float:
    """Width over height."""
    return self.width / self.height

  @property
  def is_image(self) -> bool:
    return self.frames == 1


def parse_bucket(text: str) -> Bucket:
  """Reads "16x64x64" as frames x height x width; raises UserError for anything else."""
  match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", text)
  if not match:
    raise UserError(
      f"{text!r} is not a bucket; write frames x height x width, for example '16x64x64'."
    )
  return Bucket(*map(int, match.groups()))


class Rejection(enum.StrEnum):
  """Why a clip fits no bucket."""

  TOO_SHORT = "shorter than every bucket"
  CROPPED = "the crop would lose too much of the picture"
  TOO_SLOW = "fewer frames a second than asked for"
  NO_BUCKET = "no bucket for this kind of file"


def frames_at(frames: int, fps: float, target_fps: float | None) -> int:
  """How many distinct frames a clip has when it is sampled at `target_fps` (None: its own)."""
  if target_fps is None:
    return frames
  return min(frames, math.floor(frames / fps * target_fps + _EPSILON))


def sampling_rate(frames: int, fps: float, wanted: int, rate: Rate) -> float:
  """The frames per second at which a clip of `frames` at `fps` gives `wanted` frames."""
  if isinstance(rate, tuple):
    return max(rate[0], wanted * fps / frames)
  return fps if rate is None else rate


def crop_loss(aspect: float, target: float) -> float:
  """The share of the picture that is lost by a centre crop from one aspect ratio to another."""
  return 1.0 - min(aspect / target, target / aspect)


def assign(
  frames: int,
  fps: float,
  width: int,
  height: int,
  buckets: Sequence[Bucket],
  *,
  target_fps: Rate = None,
  max_crop: float = 0.2,
) -> Bucket | Rejection:
  """The bucket of a clip, among those that lose at most `max_crop` of its picture.

  The longest that its frames fill wins, then the nearest aspect ratio by |log|, then the largest
  that needs no enlargement. Where `target_fps` is a range, the shortest that holds the whole clip
  wins, at a rate in the range that is not above the clip's own. Pass image buckets for an image,
  video buckets for a video.

  Args:
    frames: frames in the clip; fps: its frames per second (an image: 1 and any).
    width, height: of the picture as shown, in pixels.
    target_fps: sample at this rate instead of the clip's own.
    max_crop: share of the picture, 0 to 1.
  """
  if not buckets:
    return Rejection.NO_BUCKET
  aspect = width / height
  uncropped = [b for b in buckets if crop_loss(aspect, b.aspect) <= max_crop + _EPSILON]
  if not uncropped:
    return Rejection.CROPPED
  if all(bucket.is_image for bucket in buckets):
    filled = uncropped
  else:
    filled = _filled(frames, fps, uncropped, target_fps)
    if isinstance(filled, Rejection):
      return filled

  def preference(bucket: Bucket) -> tuple:
    distance = abs(math.log(aspect / bucket.aspect))
    enlarged = bucket.height > height or bucket.width > width
    pixels = bucket.height * bucket.width
    length = -bucket.frames
    if isinstance(target_fps, tuple) and bucket.frames * fps >= target_fps[0] * frames - _EPSILON:
      length = bucket.frames - _WHOLE  # holds all of the clip: before those that do not
    return length, round(distance, 6), enlarged, pixels if enlarged else -pixels, bucket

  return min(filled, key=preference)


def _filled(
  frames: int, fps: float, buckets: Sequence[Bucket], rate: Rate
) -> Sequence[Bucket] | Rejection:
  """Those that the frames of a video fill when it is sampled at `rate`."""
  fastest = fps / (1.0 - _RATE_TOLERANCE)
  if isinstance(rate, tuple):
    rates = {b: sampling_rate(frames, fps, b.frames, rate) for b in buckets}
    within = [bucket for bucket, r in rates.items() if r <= rate[1] + _EPSILON]
    filled = [bucket for bucket in within if rates[bucket] <= fastest]
    return filled or (Rejection.TOO_SLOW if within else Rejection.TOO_SHORT)
  if rate is not None and rate > fastest:
    return Rejection.TOO_SLOW
  available = frames_at(frames, fps, rate)
  return [bucket for bucket in buckets if bucket.frames <= available] or Rejection.TOO_SHORT


class Assignable(Protocol):
  """What `group` needs to know of a clip (`ingest.Clip` has it)."""

  kind: str
  width: int
  height: int
  fps: float
  frames: int


ClipT = TypeVar("ClipT", bound=Assignable)


@dataclasses.dataclass(frozen=True)
class Groups:
  """Clips by bucket (every bucket asked for is a key, perhaps empty), and why others were left."""

  clips: Mapping[Bucket, tuple]
  rejected: Mapping[Rejection, int]

  def table(self) -> str:
    """One line a bucket and one a reason: what to show before training starts."""
    lines = [f"{bucket.name:>16}  {len(clips):>8} examples" for bucket, clips in self.clips.items()]
    lines += [f"{'left out':>16}  {n:>8} ({reason})" for reason, n in self.rejected.items()]
    return "\n".join(lines)


def group(
  clips: Sequence[ClipT],
  buckets: Sequence[Bucket],
  *,
  images_from_videos: bool = False,
  target_fps: Rate = None,
  max_crop: float = 0.2,
) -> Groups:
  """Puts every clip into its bucket, keeping the order of `clips`.

  Args:
    images_from_videos: a video is an example of the image bucket of its aspect ratio too (which
      frame is drawn when it is read). Where every bucket is an image, it is one only.
    target_fps, max_crop: as in `assign`.

  Returns:
    Groups; a clip is counted as rejected if it gave no example of its own kind.
  """
  images = sorted({bucket for bucket in buckets if bucket.is_image})
  videos = sorted({bucket for bucket in buckets if not bucket.is_image})
  members: dict[Bucket, list[ClipT]] = {bucket: [] for bucket in images + videos}
  rejected = dict.fromkeys(Rejection, 0)
  for clip in clips:
    choices = [images] if clip.kind == "image" else [videos]
    if clip.kind == "video" and images_from_videos and images:
      choices = [videos, images] if videos else [images]
    found = [
      assign(
        clip.frames, clip.fps, clip.width, clip.height, choice,
        target_fps=target_fps, max_crop=max_crop,
      )
      for choice in choices
    ]  # fmt: skip
    for bucket in found:
      if isinstance(bucket, Bucket):
        members[bucket].append(clip)
    if isinstance(found[0], Rejection):
      rejected[found[0]] += 1
  return Groups(
    clips={bucket: tuple(chosen) for bucket, chosen in members.items()},
    rejected={reason: count for reason, count in rejected.items() if count},
  )
