"""Motion vectors: how far blocks of the picture move from frame to frame, in pixels.

By default FFmpeg's `mestimate` looks for them in frames of one width, a few pairs a second: what an
encoder stored depends on its presets by a factor of three (it may point to frames further away),
and most codecs store none. The stored ones are to be had by option (`source="native"`: H.264,
MPEG-4 and MPEG-2).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Literal

import av
import av.filter
import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold

_REFERENCE = 768  # pixels of the short side that thresholds are given for


@dataclasses.dataclass(frozen=True)
class Vectors(FrameStage):
  """Settings of the search.

  Attributes:
    source: "mestimate" or "native".
    width: of the frames that mestimate sees.
    pairs: of frames a second that it sees; 0 is all.
    low, high: bounds of the mean vector at 768 pixels and 30 frames a second.
  """

  name: ClassVar[str] = "vectors"
  live: ClassVar[bool] = True
  columns: ClassVar[dict[str, pa.DataType]] = {
    "mv_mean": pa.float64(),  # pixels of the source a frame; blocks without a vector count as 0
    "mv_768": pa.float64(),  # at 768 pixels of the short side and 30 frames a second
    "mv_coverage": pa.float64(),  # share of the picture that has vectors
  }

  source: Literal["mestimate", "native"] = "mestimate"
  width: int = 480
  pairs: float = 1.0
  low: float = threshold(0.5)
  high: float = threshold(7.0)

  def rules(self) -> tuple[Rule, ...]:
    return (
      Rule("mv_768", "vectors_low", "motion", at_least=self.low, strict=True),
      Rule("mv_768", "vectors_high", "motion", at_most=self.high, strict=True),
    )

  def scorer(self) -> str:
    return self.source

  @property
  def native(self) -> bool:
    """Whether the decoder must hand out what the encoder stored."""
    return self.source == "native"

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self)


class _Observer:
  def __init__(self, stage: Vectors):
    self._stage = stage
    self._values: list[tuple[float, float]] = []  # mean length in pixels, coverage
    self._next = 0
    self._previous: Frame | None = None
    self._short = 0
    self._times: list[float] = []

  def frame(self, frame: Frame) -> None:
    self._times = [*self._times[:1], frame.time]
    self._count = frame.index + 1
    self._short = min(frame.luma.shape)
    previous, self._previous = self._previous, frame
    if self._stage.native:
      found = _stored(frame.native)
      if found is not None:
        self._values.append(found)
    elif previous is not None and self._due(previous.time):
      luma = frame.luma_at(self._stage.width)
      length, coverage = estimate(previous.luma_at(self._stage.width), luma)
      self._values.append((length * frame.luma.shape[1] / luma.shape[1], coverage))

  def _due(self, time: float) -> bool:
    if not self._stage.pairs:
      return True
    if time < self._next / self._stage.pairs - 1e-6:
      return False
    self._next = int(time * self._stage.pairs + 1e-6) + 1
    return True

  def scores(self) -> dict[str, Any]:
    if not self._values or len(self._times) < 2:
      return dict.fromkeys(Vectors.columns)
    fps = (self._count - 1) / (self._times[-1] - self._times[0])
    mean, coverage = np.mean(self._values, axis=0)
    return {
      "mv_mean": float(mean),
      "mv_768": float(mean * _REFERENCE / self._short * fps / 30),
      "mv_coverage": float(coverage),
    }


def estimate(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
  """Vectors from one luma [H, W] to the next: (mean length in pixels, coverage)."""
  graph = av.filter.Graph()
  graph.threads = 1
  pictures = [
    av.VideoFrame.from_ndarray(np.ascontiguousarray(luma), format="gray")
    for luma in (first, second)
  ]
  height, width = first.shape
  chain = [
    graph.add_buffer(width=width, height=height, format="gray", time_base=Fraction(1, 30)),
    graph.add("mestimate", "method=epzs:mb_size=16:search_param=7"),
    graph.add("buffersink"),
  ]
  for one, other in itertools.pairwise(chain):
    one.link_to(other)
  graph.configure()
  # The filter looks back and ahead: out comes the first frame, with its vectors to the second.
  for index, picture in enumerate(pictures):
    picture.pts = index
    graph.push(picture)
  vectors = _side_data(graph.pull())
  if vectors is None:
    return 0.0, 0.0
  vectors = vectors[vectors["source"] > 0]
  # It states places only; its other fields are whatever was in memory.
  x, y = (vectors[f"src_{axis}"].astype(np.float64) - vectors[f"dst_{axis}"] for axis in "xy")
  return _summary(vectors, x, y, width, height)


def _stored(frame: av.VideoFrame) -> tuple[float, float] | None:
  if frame.key_frame:
    return None
  vectors = _side_data(frame)
  if vectors is None:
    return None
  vectors = vectors[vectors["source"] < 0]
  x, y = (vectors[f"motion_{axis}"] / vectors["motion_scale"] for axis in "xy")
  return _summary(vectors, x, y, frame.width, frame.height)


def _side_data(frame) -> np.ndarray | None:
  for data in _motion_vectors(frame):
    return data.to_ndarray()
  return None


def _motion_vectors(frame) -> Iterator[Any]:
  kind = av.sidedata.sidedata.Type.MOTION_VECTORS
  return (data for data in frame.side_data if data.type == kind)


def _summary(vectors, x, y, width, height) -> tuple[float, float]:
  """Mean length and coverage of vectors (x, y)."""
  if not len(vectors):
    return 0.0, 0.0
  area = vectors["w"].astype(np.float64) * vectors["h"]
  length = np.hypot(x, y)
  return float((area * length).sum() / (width * height)), float(area.sum() / (width * height))
