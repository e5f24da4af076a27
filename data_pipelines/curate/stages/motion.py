"""VMAF motion: how much the blurred luma changes from one frame to the next, on average.

It is what FFmpeg's `vmafmotion` filter prints (the mean over all frames, the first counting as 0),
which is the paper's motion score. It falls as the frame rate rises, so a second value is scaled to
30 frames a second; only that one compares clips of different rates.
"""

import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

# The filter's blur. Times 16 down and times 8 across, it fits in 16 bits with 7 of them fractional.
_KERNEL = np.float32([0.054488685, 0.244201342, 0.402619947, 0.244201342, 0.054488685])
_SCALE = 16 * 8
_LARGE = 200_000  # pixels, of pictures whose border is too small a part to be worth it


@dataclasses.dataclass(frozen=True)
class Motion(FrameStage):
  """Thresholds of both values; None leaves one out.

  Attributes:
    min_raw: the paper's "motion score > 2.0", at each clip's own frame rate.
    min_at_30: the same for the value at 30 frames a second, which decides by default.
  """

  name: ClassVar[str] = "motion"
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {
    "vmaf_motion": pa.float64(),  # grey levels of 255, the mean over frames
    "vmaf_motion_30": pa.float64(),
    "vmaf_motion_median": pa.float64(),
    "vmaf_motion_q95": pa.float64(),
    "clip_frames": pa.int64(),
    "clip_fps": pa.float64(),
  }

  min_raw: float | None = threshold(None)
  min_at_30: float | None = threshold(2.0)

  def rules(self) -> tuple[Rule, ...]:
    bounds = (("vmaf_motion", self.min_raw), ("vmaf_motion_30", self.min_at_30))
    return tuple(
      Rule(column, "low_motion", "motion", at_least=bound, strict=True)
      for column, bound in bounds
      if bound is not None
    )

  def scorer(self) -> str:
    return "vmafmotion"

  def observer(self, row: Row) -> "_Observer":
    return _Observer()


class _Observer:
  def __init__(self):
    self._blurred: np.ndarray | None = None
    self._spare: np.ndarray | None = None  # so that no frame asks for new memory
    self._values: list[float] = []
    self._first = self._last = 0.0

  def frame(self, frame: Frame) -> None:
    blurred = blur(frame.luma, self._spare)
    known = self._blurred is not None and self._blurred.shape == blurred.shape
    self._values.append(motion(blurred, self._blurred) if known else 0.0)
    self._spare, self._blurred = self._blurred, blurred
    if len(self._values) == 1:
      self._first = frame.time
    self._last = frame.time

  def scores(self) -> dict[str, Any]:
    count = len(self._values)
    if count < 2:
      return dict.fromkeys(Motion.columns) | {"clip_frames": count}
    values = np.array(self._values)
    fps = (count - 1) / (self._last - self._first)
    mean = float(values.mean())
    return {
      "vmaf_motion": mean,
      "vmaf_motion_30": mean * fps / 30,
      "vmaf_motion_median": float(np.median(values[1:])),
      "vmaf_motion_q95": float(np.quantile(values[1:], 0.95)),
      "clip_frames": count,
      "clip_fps": fps,
    }


def blur(luma: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
  """uint8 [H, W] -> int16 [H, W], blurred, in 128ths of a level; in `out` if that fits.

  Borders are mirrored without the outermost pixel on the left and top, with it on the other two.
  """
  out = out if out is not None and out.shape == luma.shape else None
  blurred = cv2.sepFilter2D(
    luma, cv2.CV_16S, _KERNEL * 8, _KERNEL * 16, dst=out, borderType=cv2.BORDER_REFLECT_101
  )
  # OpenCV knows one border for all sides. The far ones once more, where they weigh in the mean.
  if min(luma.shape) > 8 and luma.size < _LARGE:
    for part, far in (
      (luma[:, -8:], np.s_[:, -2:]),
      (luma[-8:, :], np.s_[-2:, :]),
    ):
      padded = cv2.copyMakeBorder(part, 2, 0, 2, 0, cv2.BORDER_REFLECT_101)
      padded = cv2.copyMakeBorder(padded, 0, 2, 0, 2, cv2.BORDER_REFLECT)
      again = cv2.sepFilter2D(padded, cv2.CV_16S, _KERNEL * 8, _KERNEL * 16)
      blurred[far] = again[2:-2, 2:-2][far]
  return blurred


def motion(blurred: np.ndarray, before: np.ndarray) -> float:
  """Mean absolute difference of two blurred frames, in grey levels of 255."""
  return cv2.norm(blurred, before, cv2.NORM_L1) / (blurred.size * _SCALE)
