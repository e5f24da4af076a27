"""How a clip looks, from its middle frame (Movie Gen 3.2.1: averaging more frames did not help).

With weights: LAION's predictor, a CLIP image tower (ONNX) and a linear head (safetensors), on its
scale of 1 to 10, of which the paper drops what is below 4. Without: a measure of sharpness,
contrast and colour on the same scale, which finds what is blurred, dark or washed out and knows
nothing of composition; `scorer` says which of the two it was.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate import models, stage
from data_pipelines.curate.stages import sampling
from mgen_jax.errors import ConfigError, UserError

_SIDE = 256  # short side on which sharpness is measured, so that it does not depend on the size


@dataclasses.dataclass(frozen=True)
class Aesthetics(stage.FrameStage):
  """Give both files or none."""

  name = "aesthetics"
  rate = 2.0
  columns = {
    "aesthetics": pa.float64(),  # 1 to 10
    "sharpness": pa.float64(),  # log10 of the Laplacian's variance, at a short side of 256
    "contrast": pa.float64(),  # standard deviation of luma, in levels
    "colourfulness": pa.float64(),  # of Hasler and Suesstrunk, 2003
  }
  needs = ("start", "end")

  clip: str = ""  # path of the image tower, .onnx
  head: str = ""  # path of the predictor, .safetensors
  min_score: float = stage.threshold(4.0)

  def __post_init__(self):
    if bool(self.clip) != bool(self.head):
      raise ConfigError(
        f'aesthetics.clip is "{self.clip}" and aesthetics.head "{self.head}": give both files, or'
        " none for the measure without weights."
      )

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("aesthetics", "aesthetics", "aesthetics", at_least=self.min_score),)

  def scorer(self) -> str:
    if not self.clip:
      return "sharpness+contrast+colour"
    return f"laion {models.fingerprint(self.clip)} {models.fingerprint(self.head)}"

  def observer(self, row: stage.Row) -> "Observer":
    return Observer(self, sampling.duration(row))

  def see(self, clips: Sequence[Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    found = predict(self.clip, self.head, [picture for clip in clips for picture in clip])
    return [{"aesthetics": float(score)} for score in found]


class Observer:
  """Looks at the middle frame; at the first one too, if the clip ends before its middle."""

  def __init__(self, settings: Aesthetics, seconds: float):
    self._settings = settings
    self._taker = sampling.Taker(sampling.spread(1, seconds))
    self._first, self._scores = None, None

  def frame(self, frame: stage.Frame) -> None:
    if self._taker.wants(frame.time):
      self._scores = self._judge(frame.rgb())
    elif self._first is None:
      self._first = frame.rgb()

  def scores(self) -> dict[str, Any]:
    if self._scores is None and self._first is not None:
      self._scores = self._judge(self._first)
    return self._scores or dict.fromkeys(Aesthetics.columns)

  def _judge(self, rgb):
    found = measure(rgb)
    if self._settings.clip:
      del found["aesthetics"]
      found[stage.UNSEEN] = [_tower(self._settings.clip).fit(rgb)]
    return found


def _tower(clip: str) -> models.ImageModel:
  return models.onnx(clip, models.CLIP_MEAN, models.CLIP_STD)


def predict(clip: str, head: str, pictures: list[np.ndarray]) -> np.ndarray:
  """LAION's scores float32 [n] of uint8 [H, W, 3] each. Raises UserError if files do not fit."""
  tower = _tower(clip)
  linear = models.head(head)
  if tower.width != linear.width:
    raise UserError(
      f"aesthetics.clip gives {tower.width} numbers a picture and aesthetics.head takes"
      f" {linear.width}: they are not a pair (LAION's head takes the 768 of ViT-L/14)."
    )
  return linear(models.unit(tower(pictures)))


def measure(rgb: np.ndarray) -> dict[str, float]:
  """The measures of uint8 [H, W, 3], and from them the score without weights."""
  scale = min(1.0, _SIDE / min(rgb.shape[:2]))
  if scale < 1:
    rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
  luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
  sharpness = math.log10(1 + float(cv2.Laplacian(luma, cv2.CV_32F).var()))
  contrast = float(luma.std())
  red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
  first, second = red - green, (red + green) / 2 - blue
  spread, mean = math.hypot(first.std(), second.std()), math.hypot(first.mean(), second.mean())
  colour = float(spread + 0.3 * mean)
  parts = (sharpness / 3, 0.5), (contrast / 48, 0.3), (colour / 40, 0.2)
  score = 1 + 9 * sum(weight * min(1.0, part) for part, weight in parts)
  return {
    "aesthetics": score, "sharpness": sharpness, "contrast": contrast, "colourfulness": colour,
  }  # fmt: skip
