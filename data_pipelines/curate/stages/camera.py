"""How the camera moves: one of Movie Gen's 16 classes, and how sure that is.

By default geometry decides: corners are tracked over two fifths of a second, a similarity transform
is fitted to those that agree, and the transforms of a clip are summed up. That tells pan, tilt,
zoom, static and handheld. It cannot tell pan from truck, tilt from pedestal, zoom from push, nor
see arc and tracking shots: these need depth. A trained classifier of all 16 can be given as ONNX.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate import models
from data_pipelines.curate.stage import Frame, FrameStage, Row
from mgen_jax.errors import UserError

CLASSES = (
  "zoom in", "zoom out", "push in", "pull out", "pan right", "pan left", "truck right",
  "truck left", "tilt up", "tilt down", "pedestal up", "pedestal down", "arc shot",
  "tracking shot", "static shot", "handheld shot",
)  # fmt: skip
_CORNERS = 200  # at most
_TEXTURE = 1e-5  # least eigenvalue of a corner, of luma in 0 to 1
_STEPS = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 10, 0.03)  # of the tracker
_CELLS = 64  # pixels across, of the small picture that says how much stays as it is


@dataclasses.dataclass(frozen=True)
class Camera(FrameStage):
  """Settings of the geometry, or of the classifier.

  Attributes:
    step: seconds between two frames that are compared.
    width: pixels across, of the frames that are compared.
    moves: how far the camera must go in a clip, in short sides at the edge of the picture.
    shakes: its unsteadiness from step to step, in short sides, from which on it is held by hand.
    model: path of an ONNX classifier; "" for geometry. Its input is float32 [1, T, H, W, 3] of
      fixed T, H and W: RGB in 0 to 1, frames in the middles of T equal parts; its output float32
      [1, 16], probabilities in the order of CLASSES.
  """

  name: ClassVar[str] = "camera"
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {
    "camera": pa.string(),  # of CLASSES, "roll", or "" if nothing could be made out
    "camera_confidence": pa.float64(),
    "camera_pan": pa.float64(),  # over the clip, in short sides, to the right
    "camera_tilt": pa.float64(),  # upwards
    "camera_zoom": pa.float64(),  # over the clip, log of the scale, in
    "camera_roll": pa.float64(),  # over the clip, degrees
    "camera_shake": pa.float64(),  # from step to step, short sides
  }

  step: float = 0.4
  width: int = 320
  moves: float = 0.04
  shakes: float = 0.004
  model: str = ""

  def scorer(self) -> str:
    return f"onnx {models.fingerprint(self.model)}" if self.model else "similarity"

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self)


@dataclasses.dataclass(frozen=True)
class _Step:
  """The picture's movement in one step, or None if it could not be made out."""

  x: float  # short sides, at the centre
  y: float
  zoom: float  # log of the scale
  roll: float  # radians


class _Observer:
  def __init__(self, stage: Camera):
    self._stage = stage
    self._next = 0
    self._before: np.ndarray | None = None
    self._steps: list[_Step | None] = []
    self._pictures = _Pictures(stage.model) if stage.model else None

  def frame(self, frame: Frame) -> None:
    if self._pictures is not None:
      self._pictures.frame(frame)
    if frame.time < self._next * self._stage.step - 1e-6:
      return
    self._next = int(frame.time / self._stage.step + 1e-6) + 1
    luma = frame.luma_at(self._stage.width)
    before, self._before = self._before, luma
    if before is not None and before.shape == luma.shape:
      self._steps.append(_movement(before, luma))

  def scores(self) -> dict[str, Any]:
    if not self._steps:
      return dict.fromkeys(Camera.columns)
    scores = _classify(self._steps, self._stage)
    if self._pictures is not None:
      scores["camera"], scores["camera_confidence"] = self._pictures.classify()
    return scores


def _movement(before: np.ndarray, after: np.ndarray) -> _Step | None:
  """The similarity transform that most of two pictures [H, W] agree on."""
  height, width = before.shape
  short = min(height, width)
  corners = _corners(before)
  if len(corners) >= 8:
    side = max(9, min(15, short // 8 * 2 + 1))
    found, status, _ = cv2.calcOpticalFlowPyrLK(
      before, after, corners, None, winSize=(side, side), maxLevel=3, criteria=_STEPS
    )
    kept = status[:, 0] == 1
    start, end = corners[kept, 0], found[kept, 0]
    if len(start) >= 8:
      matrix, agree = cv2.estimateAffinePartial2D(
        start, end, method=cv2.RANSAC, ransacReprojThreshold=1.0
      )
      if matrix is not None and _is_background(start, agree[:, 0] == 1, height, width):
        return _step(matrix, height, width)
  # Little to hold on to, or only on things: what does not change was not moved.
  return _Step(0.0, 0.0, 0.0, 0.0) if _mostly_unchanged(before, after) else None


def _corners(luma: np.ndarray) -> np.ndarray:
  """float32 [N, 1, 2]: the best corner of each cell, none of cells without texture.

  So things do not outnumber what is behind them.
  """
  strength = cv2.cornerMinEigenVal(luma, 5)
  height, width = luma.shape
  cell = max(4, round(math.sqrt(height * width / _CORNERS)))
  rows, columns = height // cell, width // cell
  cells = strength[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
  cells = cells.transpose(0, 2, 1, 3).reshape(rows * columns, cell * cell)
  best = cells.argmax(axis=1)
  kept = cells.max(axis=1) >= _TEXTURE
  row, column = np.divmod(np.arange(rows * columns), columns)
  y, x = row * cell + best // cell, column * cell + best % cell
  inside = (x >= 2) & (y >= 2) & (x < width - 2) & (y < height - 2)
  return np.float32(np.stack([x, y], axis=1)[kept & inside])[:, None]


def _is_background(points, agree, height, width) -> bool:
  """Whether the points that agree are half of all, and spread over the picture."""
  if agree.sum() < max(8, 0.4 * len(points)):
    return False
  hull = cv2.contourArea(cv2.convexHull(points[agree]))
  return hull >= 0.25 * height * width


def _step(matrix, height, width) -> _Step:
  centre = np.array([width / 2, height / 2])
  moved = matrix[:, :2] @ centre + matrix[:, 2] - centre
  short = min(height, width)
  scale = math.hypot(matrix[0, 0], matrix[1, 0])
  roll = math.atan2(matrix[1, 0], matrix[0, 0])
  return _Step(moved[0] / short, moved[1] / short, math.log(scale), roll)


def _mostly_unchanged(before, after) -> bool:
  size = (min(_CELLS, before.shape[1]), max(1, round(_CELLS * before.shape[0] / before.shape[1])))
  cells = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in (before, after)]
  return float(np.mean(cv2.absdiff(*cells) <= 2)) >= 0.5


def _classify(steps: list[_Step | None], stage: Camera) -> dict[str, Any]:
  seen = np.array([dataclasses.astuple(step) for step in steps if step is not None])
  if len(seen) < max(2, len(steps) / 4):
    return dict.fromkeys(Camera.columns) | {"camera": "", "camera_confidence": 0.0}
  usual = np.median(seen, axis=0)
  x, y, zoom, roll = usual * len(steps)
  shake = float(np.median(np.linalg.norm(np.diff(seen[:, :2], axis=0), axis=1)))
  # How far each moves what is at the edge of the picture; the picture moves against the camera.
  moves = {
    "pan left" if x > 0 else "pan right": (abs(x), 0),
    "tilt up" if y > 0 else "tilt down": (abs(y), 1),
    "zoom in" if zoom > 0 else "zoom out": (abs(zoom) / 2, 2),
    "roll": (abs(roll) / 2, 3),
  }
  ranked = sorted(moves.items(), key=lambda item: -item[1][0])
  (name, (most, axis)), (_, (second, _)) = ranked[:2]
  sure = len(seen) / len(steps)
  if most >= stage.moves:
    # Steps that go the same way, and how much more than in any other.
    steady = float(np.mean(seen[:, axis] * np.sign(usual[axis]) > 0.25 * abs(usual[axis])))
    sure *= steady * (1 - 0.5 * second / most)
  elif shake >= stage.shakes:
    name, sure = "handheld shot", sure * min(1.0, shake / (2 * stage.shakes))
  else:
    name, sure = "static shot", sure * (1 - most / (2 * stage.moves))
  return {
    "camera": name,
    "camera_confidence": float(sure),
    "camera_pan": float(-x),
    "camera_tilt": float(y),
    "camera_zoom": float(zoom),
    "camera_roll": float(np.degrees(roll)),
    "camera_shake": shake,
  }


class _Pictures:
  """Frames for a trained classifier, and what it says of them."""

  _SHARE = 4  # a second are kept

  def __init__(self, model: str):
    self._session = _session(model)
    shape = self._session.get_inputs()[0].shape
    if len(shape) != 5 or not all(isinstance(side, int) for side in shape[1:]) or shape[4] != 3:
      raise UserError(
        f"camera.model={model} takes {shape}; it must take [1, T, H, W, 3] of fixed sizes."
      )
    self._count, self._height, self._width = shape[1:4]
    self._kept: list[tuple[float, np.ndarray]] = []
    self._end = 0.0

  def frame(self, frame: Frame) -> None:
    self._end = frame.time
    if len(self._kept) <= frame.time * self._SHARE + 1e-6:
      small = cv2.resize(
        frame.rgb_at(2 * self._width), (self._width, self._height), interpolation=cv2.INTER_AREA
      )
      self._kept.append((frame.time, small))

  def classify(self) -> tuple[str, float]:
    times = np.array([time for time, _ in self._kept])
    wanted = (np.arange(self._count) + 0.5) * self._end / self._count
    nearest = abs(times[None] - wanted[:, None]).argmin(axis=1)
    clip = np.stack([self._kept[i][1] for i in nearest])[None].astype(np.float32) / 255
    name = self._session.get_inputs()[0].name
    (likely,) = self._session.run(None, {name: clip})[:1]
    if likely.shape != (1, len(CLASSES)):
      raise UserError(f"camera.model gives {likely.shape}; it must give (1, {len(CLASSES)}).")
    best = int(likely[0].argmax())
    return CLASSES[best], float(likely[0, best])


@functools.cache
def _session(model: str):
  import onnxruntime  # an extra: only who gives a network needs it

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  try:
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
  except Exception as error:  # its errors have no base of their own
    raise UserError(f"{model} is no ONNX network that can be opened ({error}).") from error
