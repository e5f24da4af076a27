"""Which of the training shapes a clip fills: 3 lengths x 5 aspect ratios (Movie Gen, Table 2).

The table says by its duration how many frames a clip gives: 256 from 12 s on, 192 from 8 s, 128
from 4 s; the frame rate that follows lies between 16 and 32 and is told to the model as text. A
clip whose source is slower than that would repeat frames and fits nowhere. Frame j of N is the one
shown at (j + 0.5) duration / N. An image (no frame rate) has the same five sizes.
"""

import dataclasses
from typing import Any

import pyarrow as pa

from data_pipelines.curate import stage
from data_pipelines.curate.stages import sampling
from mgen_jax.data import buckets as shapes
from mgen_jax.errors import ConfigError

_EPSILON = 1e-6
_SLOWER = 0.01  # of a rate, that a source may lack: 23.976 serves 24

# Heights and widths of near-equal area, multiples of 16: 1:1, 16:9, 9:16, 4:3, 3:4. The paper names
# the first three; the rest, and the sizes at 256 px, are our choice.
SIZES_768 = ((768, 768), (576, 1024), (1024, 576), (672, 896), (896, 672))
SIZES_256 = ((256, 256), (192, 336), (336, 192), (224, 288), (288, 224))


@dataclasses.dataclass(frozen=True)
class Buckets(stage.RowStage):
  """What a clip becomes: its shape, the rate of its frames, the span that they are taken from."""

  name = "buckets"
  columns = {
    "bucket": pa.string(),  # frames x height x width, "" for none
    "bucket_frames": pa.int32(),  # 0 for none
    "bucket_fps": pa.float64(),
    "bucket_start": pa.float64(),  # seconds from the start of the clip
    "bucket_seconds": pa.float64(),
    "crop_loss": pa.float64(),  # share of the picture that the crop loses
  }
  needs = ("width", "height", "fps", "start", "end")

  sizes: tuple[tuple[int, int], ...] = SIZES_768  # (height, width)
  # (least seconds, most seconds, frames, seconds taken from the middle or 0 for all of it), the
  # first row that fits. The paper's rows of 10.67 s at 24 and of 16 s at 16 are cuts from the
  # middle of clips; they come before the rows of whole clips.
  lengths: tuple[tuple[float, float, int, float], ...] = (
    (32 / 3, 12.0, 256, 32 / 3),
    (12.0, 16.0, 256, 0.0),
    (8.0, 12.0, 192, 0.0),
    (4.0, 8.0, 128, 0.0),
  )
  min_fps: float = 16.0
  max_fps: float = 32.0
  max_crop: float = stage.threshold(0.2)

  def __post_init__(self):
    if not self.sizes or not self.lengths:
      raise ConfigError("buckets.sizes and buckets.lengths must not be empty.")
    for least, most, frames, taken in self.lengths:
      if not 0 < least <= most or frames < 1 or taken < 0 or taken > least + _EPSILON:
        raise ConfigError(
          f"buckets.lengths has {(least, most, frames, taken)}: write (least seconds, most seconds,"
          " frames, seconds from the middle up to the least, or 0)."
        )

  def rules(self) -> tuple[stage.Rule, ...]:
    return (
      stage.Rule("bucket_frames", "no_bucket", at_least=1),
      stage.Rule("crop_loss", "cropped", at_most=self.max_crop),
    )

  def score(self, row: stage.Row) -> dict[str, Any]:
    width, height = row["width"], row["height"]
    if not width or not height:
      return dict.fromkeys(self.columns)
    aspect = width / height
    size = min(self.sizes, key=lambda s: (round(shapes.crop_loss(aspect, s[1] / s[0]), 9), s))
    found = {
      "bucket": "",
      "bucket_frames": 0,
      "bucket_fps": None,
      "bucket_start": None,
      "bucket_seconds": None,
      "crop_loss": shapes.crop_loss(aspect, size[1] / size[0]),
    }
    if not row["fps"]:  # an image
      return found | {"bucket": shapes.Bucket(1, *size).name, "bucket_frames": 1, "bucket_fps": 0.0}
    length = self.length(sampling.duration(row), row["fps"])
    if length:
      frames, start, seconds = length
      found["bucket"] = shapes.Bucket(frames, *size).name
      found |= {"bucket_frames": frames, "bucket_fps": frames / seconds}
      found |= {"bucket_start": start, "bucket_seconds": seconds}
    return found

  def length(self, duration: float, fps: float) -> tuple[int, float, float] | None:
    """(frames, start, seconds) of a clip of `duration` seconds at `fps`; None if no row fits.

    A clip may be a frame shorter or longer than a row says: its cuts fall on frames.
    """
    slack = 1 / fps + _EPSILON
    for least, most, frames, taken in self.lengths:
      if not least - slack <= duration <= most + slack:
        continue
      seconds = min(taken, duration) if taken else duration
      rate = frames / seconds
      slow = self.min_fps * (1 - _SLOWER) - _EPSILON
      fast = min(self.max_fps, fps) * (1 + _SLOWER) + _EPSILON
      if slow <= rate <= fast:
        return frames, (duration - seconds) / 2, seconds
    return None
