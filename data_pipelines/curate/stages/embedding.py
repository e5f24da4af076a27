"""What a clip is about, as a vector: the ground on which `concepts` and `humans` stand.

With weights: the mean of an image tower's embeddings of a few frames (CLIP, or the image side of a
video-text model), an ONNX file. Without: histograms of colours, edges and changes, which tell a
beach from a street at best; `scorer` says which of the two it was.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate import models, stage
from data_pipelines.curate.stages import sampling
from mgen_jax.errors import ConfigError

_GRID = 4
_WIDTH = 128  # of the frame that histograms are taken of


@dataclasses.dataclass(frozen=True)
class Embedding(stage.FrameStage):
  """Vectors of length 1."""

  name = "embedding"
  rate = 2.0
  columns = {"embedding": pa.list_(pa.float32())}
  needs = ("start", "end")

  model: str = ""  # path of an .onnx image tower
  frames: int = 3

  def __post_init__(self):
    if self.frames < 1:
      raise ConfigError(f"embedding.frames is {self.frames}: look at one at least.")

  def scorer(self) -> str:
    return f"onnx {models.fingerprint(self.model)}" if self.model else "histograms"

  def observer(self, row: stage.Row) -> "Observer":
    return Observer(self, sampling.duration(row))

  def see(self, clips: Sequence[Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    return [{"embedding": mean} for mean in models.means(_tower(self.model), clips)]


def _tower(model: str) -> models.ImageModel:
  return models.onnx(model, models.CLIP_MEAN, models.CLIP_STD)


class Observer:
  """Keeps a few frames: whole ones for a network, small ones for histograms."""

  def __init__(self, settings: Embedding, seconds: float):
    self._settings = settings
    self._taker = sampling.Taker(sampling.spread(settings.frames, seconds))
    self._frames = []

  def frame(self, frame: stage.Frame) -> None:
    if self._taker.wants(frame.time):
      model = self._settings.model
      self._frames.append(_tower(model).fit(frame.rgb()) if model else frame.rgb_at(_WIDTH))

  def scores(self) -> dict[str, Any]:
    if not self._frames:
      return {"embedding": None}
    if not self._settings.model:
      return {"embedding": histograms(self._frames).tolist()}
    return {stage.UNSEEN: self._frames}


def histograms(frames: list[np.ndarray]) -> np.ndarray:
  """float32 [256] of length 1: colours, edges and changes by place, of uint8 [H, W, 3] each."""
  colours = np.zeros((8, 4, 4), np.float32)
  edges = np.zeros((_GRID, _GRID, 7), np.float32)
  changes = np.zeros((_GRID, _GRID, 1), np.float32)
  before = None
  for rgb in frames:
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    ranges = [0, 180, 0, 256, 0, 256]
    colours += cv2.calcHist([hsv], [0, 1, 2], None, [8, 4, 4], ranges) / hsv[..., 0].size
    luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1)
    angle = np.minimum((np.arctan2(dy, dx) % np.pi) / np.pi * 7, 6).astype(int)
    strength = np.hypot(dx, dy)
    for turn in range(7):
      edges[..., turn] += _cells(strength * (angle == turn))
    if before is not None and before.shape == luma.shape:
      changes[..., 0] += _cells(np.abs(luma - before))
    before = luma
  parts = (np.sqrt(colours).ravel(), np.sqrt(edges).ravel(), np.sqrt(changes).ravel())
  return models.unit(np.concatenate([models.unit(part) for part in parts])).astype(np.float32)


def _cells(image: np.ndarray) -> np.ndarray:
  """Means of [H, W] over a grid [4, 4]."""
  return cv2.resize(np.float32(image), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
