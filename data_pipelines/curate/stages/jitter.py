"""Shaking: how far the whole picture jumps against its own movement, from frame to frame.

The paper's proxy, shots a second, is in `scan`; it sees a shaking camera only where frames differ
as cuts do. Here the shift of the whole picture is measured by phase correlation of small pictures.
A camera that moves shifts it alike from frame to frame; what changes of the shift is shake.
"""

import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_WIDTH = 64
_SURE = 0.1  # response of a correlation that counts
_SAME = 4.0  # grey levels
_LOST = 0.2  # short sides: a jump that correlation cannot follow is at least so large


@dataclasses.dataclass(frozen=True)
class Jitter(FrameStage):
  """Settings.

  Attributes:
    looks: a second, at three frames in a row each.
    max_shake: in short sides of the picture a frame.
  """

  name: ClassVar[str] = "jitter"
  code: ClassVar[int] = 2
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {"shake": pa.float64()}

  looks: float = 3.0
  max_shake: float = threshold(0.1)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("shake", "shaking", "jitter", at_most=self.max_shake),)

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self.looks)


class _Observer:
  def __init__(self, looks: float):
    self._looks = looks
    self._next = 0
    self._window: np.ndarray | None = None
    self._three: list[np.ndarray] = []  # frames in a row
    self._jumps: list[float] = []

  def frame(self, frame: Frame) -> None:
    if not self._three:
      if frame.time < self._next / self._looks - 1e-6:
        return
      self._next = int(frame.time * self._looks + 1e-6) + 1
    self._three.append(frame.luma_at(_WIDTH).astype(np.float32))
    if len(self._three) == 3:
      first, second, third = self._three
      self._three = []
      if first.shape == second.shape == third.shape:
        shifts = self._shift(first, second), self._shift(second, third)
        lost = any(shift is None for shift in shifts)
        self._jumps.append(_LOST if lost else float(np.linalg.norm(shifts[1] - shifts[0])))

  def _shift(self, before, after) -> np.ndarray | None:
    """[x, y] in short sides; None if the picture became another."""
    if self._window is None or self._window.shape != before.shape:
      self._window = cv2.createHanningWindow(before.shape[::-1], cv2.CV_32F)
    # Of copies: where the size suits its transform, OpenCV puts the window on what it is given.
    shift, response = cv2.phaseCorrelate(before.copy(), after.copy(), self._window)
    if response >= _SURE:
      return np.array(shift) / min(before.shape)
    same = cv2.norm(before, after, cv2.NORM_L1) < _SAME * before.size
    return np.zeros(2) if same else None

  def scores(self) -> dict[str, Any]:
    # The median: one bounce or one late frame is no shake.
    return {"shake": float(np.median(self._jumps)) if self._jumps else None}
