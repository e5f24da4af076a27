"""Clips in which nothing moves: pictures shown as videos, frozen streams, empty rooms.

A small thing that moves in a still picture hardly changes an average, so this stage looks at the
cell of a small picture that changes most, in steps of a fraction of a second.
"""

import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Static(FrameStage):
  """Settings of the steps.

  Attributes:
    step: seconds between two looks.
    level: grey levels by which a cell of the small picture must change to count as moving; what
      lossy coding does to still pictures is below.
    min_moving: share of the steps in which something must move.
  """

  name: ClassVar[str] = "static"
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {
    "moving_share": pa.float64(),  # of the steps, something moves
    "moving_area": pa.float64(),  # of the picture, the mean over steps
  }

  step: float = 0.4
  level: float = 5.0
  min_moving: float = threshold(0.1)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("moving_share", "static", "motion", at_least=self.min_moving),)

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self)


class _Observer:
  def __init__(self, stage: Static):
    self._level = stage.level
    self._steps = Steps(stage.step)
    self._areas: list[float] = []

  def frame(self, frame: Frame) -> None:
    change = self._steps.change(frame)
    if change is not None:
      self._areas.append(float(np.mean(change >= self._level)))

  def scores(self) -> dict[str, Any]:
    if not self._areas:
      return {"moving_share": None, "moving_area": None}
    areas = np.array(self._areas)
    return {"moving_share": float(np.mean(areas > 0)), "moving_area": float(areas.mean())}


class Steps:
  """Changes of a small, smoothed picture from step to step; the picture of a step is its first."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._next = 0
    self._before: np.ndarray | None = None

  def change(self, frame: Frame) -> np.ndarray | None:
    """float32 [h, w], grey levels; None between steps and at the first."""
    if frame.time < self._next * self._seconds - 1e-6:
      return None
    self._next = int(frame.time / self._seconds + 1e-6) + 1
    small = cv2.blur(frame.luma_at(_WIDTH).astype(np.float32), (3, 3))
    before, self._before = self._before, small
    if before is None or before.shape != small.shape:
      return None
    return cv2.absdiff(small, before)
