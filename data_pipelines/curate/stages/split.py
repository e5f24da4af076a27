"""Which clips a source gives: no head, windows laid out in each scene, and of them the best.

A scene's windows follow one another from its start, each as long as a clip may be, the last as long
as what is left. So a clip's bounds depend on nothing that comes after it, and clips can be observed
in the same pass that finds them (`watch`). Of each scene one window is drawn, and of the scenes the
first few: full windows before shorter ones, and among equals by a hash of seed, source and start.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import pyarrow as pa

from data_pipelines.curate.stage import Row, Rule, SplitStage, threshold


class Span(Protocol):
  """Seconds of a source; `scene` counts from 0."""

  start: float
  end: float
  scene: int


class _Window(NamedTuple):
  start: float
  end: float
  scene: int


@dataclasses.dataclass(frozen=True)
class Split(SplitStage):
  """Settings of the choice.

  Attributes:
    head: seconds at the start of a source that belong to no clip (titles, fades; ours is 2).
    shortest, longest: of a clip, in seconds.
    clips_per_source: at most; the paper takes one or two.
    seed: of the choice.
    min_seconds, max_seconds: of a clip that is kept.
  """

  name: ClassVar[str] = "split"
  columns: ClassVar[dict[str, pa.DataType]] = {
    "start": pa.float64(),
    "end": pa.float64(),
    "start_pts": pa.int64(),
    "end_pts": pa.int64(),
    "clip_seconds": pa.float64(),
    "scene": pa.int32(),
  }
  needs: ClassVar[tuple[str, ...]] = ("first_pts", "time_base", "cuts", "scan_seconds")
  end_column: ClassVar[str] = "scan_seconds"

  head: float = 2.0
  shortest: float = 4.0
  longest: float = 16.0
  clips_per_source: int = 2
  seed: int = 0
  min_seconds: float = threshold(4.0)
  max_seconds: float = threshold(16.0)

  def rules(self) -> tuple[Rule, ...]:
    # Times are of frames: a clip of 4 s may lack a part of its last one.
    return (
      Rule(
        "clip_seconds", "scene_length", "scene",
        at_least=self.min_seconds - 0.05, at_most=self.max_seconds + 0.05,
      ),
    )  # fmt: skip

  def clips(self, source: Row) -> list[dict[str, Any]]:
    """Clips in order of time, none if no scene is long enough."""
    windows = [w for w in self._windows(source) if self.long_enough(w.start, w.end)]
    chosen = self.best(source, windows)
    base, first = source["time_base"], source["first_pts"]
    return [
      {
        "start": w.start,
        "end": w.end,
        "start_pts": first + round(w.start / base),
        "end_pts": first + round(w.end / base),
        "clip_seconds": w.end - w.start,
        "scene": w.scene,
      }
      for w in sorted(chosen, key=lambda w: w.start)
    ]

  def _windows(self, source: Row) -> Iterator[_Window]:
    edges = [0.0, *source["cuts"], source[self.end_column]]
    for scene, (begin, end) in enumerate(itertools.pairwise(edges)):
      start = self.first_start(begin)
      while start < end:
        stop = min(self.window_end(start), end)
        yield _Window(start, stop, scene)
        start = self.window_end(start)

  def first_start(self, scene_start: float) -> float:
    """Where the first window of a scene starts."""
    return max(scene_start, self.head)

  def window_end(self, start: float) -> float:
    """Where a window ends if its scene goes on."""
    return start + self.longest

  def long_enough(self, start: float, end: float) -> bool:
    """Whether a window can be a clip."""
    return end - start >= self.shortest - 0.05

  def best(self, source: Row, spans: Sequence[Span]) -> list[Any]:
    """Those of `spans` that stay: at most one of each scene, at most clips_per_source."""
    of_scene: dict[int, Span] = {}
    for span in sorted(spans, key=lambda span: self._rank(source, span)):
      of_scene.setdefault(span.scene, span)
    return list(of_scene.values())[: self.clips_per_source]

  def may_win(self, source: Row, start: float, scene: int, closed: Sequence[Span]) -> bool:
    """Whether a window that starts here could stay beside those that are closed."""
    longest = _Window(start, self.window_end(start), scene)
    return longest in self.best(source, [*closed, longest])

  def _rank(self, source: Row, span: Span):
    full = span.end - span.start >= self.longest - 0.05
    text = f"{self.seed}|{source['source_id']}|{span.start:.6f}"
    draw = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (not full, draw, span.start)
