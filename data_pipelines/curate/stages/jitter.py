"""Shaking: how far the whole picture jumps against its own movement, from frame to frame.

The paper's proxy, shots a second, is in `scan`; it sees a shaking camera only where frames differ as
cuts do. Here the shift of the whole picture is measured by phase correlation of small pictures. A
camera that moves shifts it alike from frame to frame; what changes of the shift is shake.
"""

import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_WIDTH = 64
_SURE = 0.1  # response of a correlation that counts


@dataclasses.dataclass(frozen=True)
class Jitter(FrameStage):
  """Threshold of the shake, in short sides of the picture a frame."""

  name: ClassVar[str] = "jitter"
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {"shake": pa.float64()}

  max_shake: float = threshold(0.03)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("shake", "shaking", "jitter", at_most=self.max_shake),)

  def observer(self, row: Row) -> "_Observer":
    return _Observer()


class _Observer:
  def __init__(self):
    self._before: np.ndarray | None = None
    self._window: np.ndarray | None = None
    self._shifts: list[tuple[float, float]] = []

  def frame(self, frame: Frame) -> None:
    small = frame.luma_at(_WIDTH).astype(np.float32)
    before, self._before = self._before, small
    if before is None or before.shape != small.shape:
      self._window = cv2.createHanningWindow(small.shape[::-1], cv2.CV_32F)
      return
    shift, response = cv2.phaseCorrelate(before, small, self._window)
    if response < _SURE:
      shift = (0.0, 0.0)  # a cut, or nothing to hold on to
    short = min(small.shape)
    self._shifts.append((shift[0] / short, shift[1] / short))

  def scores(self) -> dict[str, Any]:
    if len(self._shifts) < 2:
      return {"shake": None}
    jumps = np.diff(np.array(self._shifts), axis=0)
    # The median: one bounce or one late frame is no shake.
    return {"shake": float(np.median(np.linalg.norm(jumps, axis=1)))}
