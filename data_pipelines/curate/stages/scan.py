"""Where a source's scenes begin: FFmpeg's scene score, cuts that stand out, and no flashes.

The score of a frame is that of FFmpeg's `select` filter: the mean difference of luma to the frame
before, in hundreds of grey levels, or how much that changed since if it is less. Above 0.3 it is a
cut, as the paper has it. Cuts between scenes alike in brightness stay below; they are found by
standing out among their neighbours. Slow transitions (dissolves, wipes) are not found: that takes a
model.
"""

import collections
import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_AHEAD = 3  # frames that are seen before a cut is decided
_THUMB = 64  # pixels across


@dataclasses.dataclass(frozen=True)
class Scan(FrameStage):
  """Settings of cuts, and how many a second are too many.

  Attributes:
    cut: score of FFmpeg's filter, 0 to 1, from which on a frame begins a scene.
    small_cut: from which on it does if it also stands out.
    stands_out: how many times the score of each of the two frames before and after.
    shots: cuts a second; the paper's proxy of jitter keeps those below 0.85.
  """

  name: ClassVar[str] = "scan"
  code: ClassVar[int] = 2  # damage that the decoder does not tell is refused
  level: ClassVar[str] = "source"
  columns: ClassVar[dict[str, pa.DataType]] = {
    "cuts": pa.list_(pa.float64()),  # seconds; the first frames of all scenes but the first
    "scenes": pa.int32(),
    "shots_per_second": pa.float64(),
    "scan_frames": pa.int64(),
    "scan_seconds": pa.float64(),  # to the end of the last frame
    "irregular": pa.float64(),  # share of the frames shown for 1.5 times the usual or more
  }

  cut: float = 0.3
  small_cut: float = 0.15
  stands_out: float = 4.0
  shots: float = threshold(0.85)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("shots_per_second", "too_many_shots", "jitter", at_most=self.shots, strict=True),)

  def scorer(self) -> str:
    return "ffmpeg scene score"

  def observer(self, row: Row) -> "SceneObserver":
    return SceneObserver(self)


@dataclasses.dataclass
class _Moment:
  """What is remembered of a frame until it is decided whether it begins a scene."""

  index: int
  time: float
  score: float  # FFmpeg's
  change: float  # mean difference of luma to the frame before, in hundreds of levels
  frame: Frame

  @property
  def thumb(self) -> np.ndarray:
    return self.frame.luma_at(_THUMB)


class SceneObserver:
  """Decides for each frame whether it begins a scene, a few frames after it has passed.

  Attributes:
    decided: all frames up to this index are.
  """

  def __init__(self, stage: Scan):
    self.stage = stage
    self.decided = -1
    self._luma: np.ndarray | None = None
    self._recent: collections.deque[_Moment] = collections.deque(maxlen=2 * _AHEAD + 1)
    self._begins: set[int] = set()
    self._cuts: list[float] = []
    self._times: list[float] = []
    self._returns = -1  # index of the frame after a flash

  def frame(self, frame: Frame) -> None:
    luma = frame.luma
    if self._luma is None or luma.shape != self._luma.shape:
      change = score = 0.0
      if self._luma is not None:  # another size in mid-stream
        change = score = 1.0
    else:
      change = min(1.0, cv2.norm(luma, self._luma, cv2.NORM_L1) / (luma.size * 100))
      before = self._recent[-1].change
      score = min(change, abs(change - before))
    self._luma = luma
    self._recent.append(_Moment(frame.index, frame.time, score, change, frame))
    self._times.append(frame.time)
    if frame.index >= _AHEAD:
      self._decide(frame.index - _AHEAD)

  def begins(self, index: int) -> bool:
    """Whether this frame, which is decided, begins a scene."""
    return index in self._begins

  def finish(self) -> None:
    """Decides the last frames."""
    while self.decided < len(self._times) - 1:
      self._decide(self.decided + 1)

  def _decide(self, index: int):
    self.decided = index
    moment = self._recent[index - self._recent[0].index]
    if index == 0:
      self._begins.add(0)
    elif index == self._returns:
      self._returns = -1
    elif moment.score > self.stage.cut or moment.change >= self.stage.small_cut:
      near = {each.index: each for each in self._recent}
      if self._is_cut(near, moment) and not self._is_flash(near, moment):
        self._begins.add(index)
        self._cuts.append(moment.time)

  def _is_cut(self, near, moment):
    stage = self.stage
    if moment.score > stage.cut:
      return True
    neighbours = [near[i].change for i in _around(moment.index, 2) if i in near and i > 0]
    return moment.change >= stage.small_cut and all(
      moment.change >= stage.stands_out * change for change in neighbours
    )

  def _is_flash(self, near, moment):
    """Whether the picture is what it was before within a few frames."""
    if moment.index - 1 not in near:
      return False
    before = near[moment.index - 1].thumb
    jump = _difference(moment.thumb, before)
    for index in range(moment.index + 1, moment.index + _AHEAD + 1):
      if index in near and _difference(near[index].thumb, before) < 0.3 * jump:
        self._returns = index
        return True
    return False

  def scores(self) -> dict[str, Any]:
    self.finish()
    times = np.array(self._times)
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    seconds = float(times[-1]) + usual if len(times) else 0.0
    return {
      "cuts": list(self._cuts),
      "scenes": len(self._cuts) + 1 if len(times) else 0,
      "shots_per_second": len(self._cuts) / seconds if seconds else 0.0,
      "scan_frames": len(times),
      "scan_seconds": seconds,
      "irregular": float(np.mean(steps > 1.5 * usual)) if len(steps) else 0.0,
    }


def _around(index, reach):
  return [i for i in range(index - reach, index + reach + 1) if i != index]


def _difference(a, b) -> float:
  if a.shape != b.shape:
    return 255.0
  return cv2.norm(a, b, cv2.NORM_L1) / a.size
