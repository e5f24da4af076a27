"""Borders: black or coloured bars, and pictures set into a blurred copy of themselves.

On the mean over time, from each side inwards: rows (or columns) that are alike and do not change
are a bar if a straight edge ends them along nine tenths of the side. Where bars are not flat, two
straight edges at the same distance from opposite sides that last are a border too. (Movie Gen,
appendix B.1: first derivatives and a scan for straight lines.)
"""

import dataclasses
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_WIDTH = 320
_FLAT = 3.0  # grey levels within a bar
_STILL = 12.0  # over time
_EDGE = 3.0  # grey levels between a bar and the picture
_STRONG_EDGE = 12.0  # between a blurred bar and the picture
_ALONG = 0.9  # of the side
_GROUND = 1 / 3  # of the picture; if so much of it is like a bar, that is none but its ground
_DEEPEST = 0.45  # of the picture, a bar on one side


@dataclasses.dataclass(frozen=True)
class Border(FrameStage):
  """Settings of the search.

  Attributes:
    looks: a second, at the picture.
    thinnest: bar that counts, as a share of the picture's side.
    max_border: share of the area that bars may take.
  """

  name: ClassVar[str] = "border"
  code: ClassVar[int] = 2
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {
    "border_top": pa.float64(),  # of the height, like bottom
    "border_bottom": pa.float64(),
    "border_left": pa.float64(),  # of the width, like right
    "border_right": pa.float64(),
    "border_area": pa.float64(),
  }

  looks: float = 2.0
  thinnest: float = 0.015
  max_border: float = threshold(0.0)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("border_area", "border", "border", at_most=self.max_border),)

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self)


class _Observer:
  def __init__(self, stage: Border):
    self._stage = stage
    self._next = 0
    self._count = 0
    self._sum: np.ndarray | None = None
    self._low: np.ndarray | None = None
    self._high: np.ndarray | None = None
    self._rows: _Lines | None = None
    self._columns: _Lines | None = None

  def frame(self, frame: Frame) -> None:
    if frame.time < self._next / self._stage.looks - 1e-6:
      return
    self._next = int(frame.time * self._stage.looks + 1e-6) + 1
    luma = frame.luma_at(_WIDTH)
    if self._sum is None or self._sum.shape != luma.shape:
      self._count, self._sum = 0, np.zeros(luma.shape, np.float32)
      self._low, self._high = luma, luma
      self._rows, self._columns = _Lines(luma), _Lines(luma.T)
    self._sum += luma
    self._rows.add(luma)
    self._columns.add(luma.T)
    self._low, self._high = np.minimum(self._low, luma), np.maximum(self._high, luma)
    self._count += 1

  def scores(self) -> dict[str, Any]:
    if self._sum is None:
      return dict.fromkeys(Border.columns)
    mean = self._sum / self._count
    change = self._high.astype(np.float32) - self._low
    top, bottom = _bars(mean, change, self._rows, self._stage.thinnest)
    left, right = _bars(mean.T, change.T, self._columns, self._stage.thinnest)
    return {
      "border_top": top,
      "border_bottom": bottom,
      "border_left": left,
      "border_right": right,
      "border_area": 1 - (1 - top - bottom) * (1 - left - right),
    }


class _Lines:
  """How often there was a straight edge at each row: edges that move are no border's."""

  def __init__(self, luma: np.ndarray):
    self._looks = 0
    self._weak = np.zeros(len(luma), int)
    self._strong = np.zeros(len(luma), int)

  def add(self, luma: np.ndarray) -> None:
    steep = cv2.absdiff(luma[2:], luma[:-2])
    self._looks += 1
    self._weak[1:-1] += np.mean(steep >= _EDGE, axis=1) >= 0.5
    self._strong[1:-1] += np.mean(steep >= _STRONG_EDGE, axis=1) >= _ALONG

  def lasting(self, strong: bool) -> np.ndarray:
    """bool [rows]; lossy coding may blur an edge in some looks."""
    return (self._strong if strong else self._weak) >= 0.8 * self._looks


def _bars(mean, change, lines: _Lines, thinnest: float) -> tuple[float, float]:
  """Depths of the bars before and after the picture along axis 0, as shares of its length."""
  least = max(2, round(thinnest * len(mean)))
  weak = lines.lasting(strong=False)
  first = _flat_bar(mean, change, weak, least)
  last = _flat_bar(mean[::-1], change[::-1], weak[::-1], least)
  if not first and not last:
    first = last = _edges(lines.lasting(strong=True), least)
  return first / len(mean), last / len(mean)


def _flat_bar(mean, change, lines, least) -> int:
  """Rows of a flat bar at the start, or 0."""
  level = np.median(mean[:least])
  like = (abs(mean - level) <= _FLAT) & (change <= _STILL)
  # Three fifths of a row: subtitles in a bar leave it one.
  alike = np.mean(like, axis=1) >= 0.6
  depth, far = _run(alike), _run(alike[::-1])
  if depth < least or depth > _DEEPEST * len(mean):
    return 0
  far = far if far <= _DEEPEST * len(mean) else 0  # of the bar on the other side
  if like[depth : len(mean) - far].mean() >= _GROUND:
    return 0  # a line of text before plain ground has a straight edge too
  # Where the picture begins: lossy coding smears the edge over a few rows.
  inside = mean[min(depth + 2, len(mean) - 1)]
  outside = mean[max(depth - 2, 0)]
  # Bars on the other two sides have no edge here.
  filled = (abs(mean - level) > _FLAT).any(axis=0)
  straight = filled.mean() >= 0.5 and np.mean(abs(inside - outside)[filled] >= _EDGE) >= _ALONG
  return depth if straight and lines[depth - 2 : depth + 3].any() else 0


def _run(alike) -> int:
  """How many are true from the start on."""
  return len(alike) if alike.all() else int(np.argmin(alike))


def _edges(lines, least) -> int:
  """Rows between each end and a lasting edge, if there is one at the same depth on both."""
  for depth in range(least, int(_DEEPEST * len(lines))):
    near, far = lines[depth - 1 : depth + 2], lines[::-1][depth - 1 : depth + 2]
    if near.any() and far.any():
      return depth
  return 0
