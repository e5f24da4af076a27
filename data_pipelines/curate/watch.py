"""One pass over a file that scores the source, finds its clips and scores those too.

Decoding is what curation mostly costs, so no frame is decoded twice. But a clip is known only
after its scene has ended, and which of a source's clips are kept only after the source has. What
makes one pass enough:
  - where clips can start and end follows from the scene's start alone (`Split.window_end`), so a
    clip is observed while it passes, and dropped as soon as a better one is there;
  - stages that need a few frames say how many a second (`rate`): those frames wait until the clip
    has ended and its row is whole;
  - stages that need neither look ahead (`live`) see each frame as it passes.
What the split says of the whole source decides in the end; a clip that was not observed while it
passed, or a stage that is neither of the two, costs a second look at the clip alone.
"""

import collections
import dataclasses
import math
import time as clock
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.curate.decode import Forms, Limits, decode_frames, expect
from data_pipelines.curate.recipe import passes
from data_pipelines.curate.stage import UNSEEN, Frame, FrameStage, Rule, SplitStage

_WIDEST_SAMPLE = 1920  # pixels of frames that wait
_PICTURE = 0.5  # seconds of video that a picture counts as, where a network has a deadline


@dataclasses.dataclass
class Watched:
  """What one pass over a file gave.

  Attributes:
    source: the columns of the source's stages.
    clips: a row for each clip: its columns from the split, and those of the clips' stages.
    frames: how many were decoded.
    cpu: seconds of each stage by name, and of "decode".
  """

  source: dict[str, Any] = dataclasses.field(default_factory=dict)
  clips: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  frames: int = 0
  cpu: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

  def timed(self, stage: FrameStage, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it, and counts the CPU seconds as the stage's."""
    began = clock.process_time()
    result = function(*arguments)
    self.cpu[stage.name] += clock.process_time() - began
    return result


def watch(
  path: str,
  source: dict[str, Any],
  source_stages: Sequence[FrameStage],
  split: SplitStage | None,
  clips: Sequence[Mapping[str, Any]] | None,
  clip_stages: Sequence[FrameStage],
  limits: Limits,
  gates: Mapping[str, Sequence[Rule]] | None = None,
) -> Watched:
  """Scores a source and its clips; to be called in the child of a `decode.Guard`.

  Args:
    path: the file.
    source: its scores so far.
    source_stages: of level "source"; they see the whole file.
    split: finds clips from the source's scores; their stages see them in the same pass.
    clips: or the clips that are known already.
    clip_stages: of level "clip".
    limits: what the file may cost.
    gates: rules by clip stage: if one of them rejects a clip, the stage's columns are left out.

  Raises DecodeError if the file cannot be decoded whole.
  """
  began = clock.process_time()
  watched, gates = Watched(), gates or {}
  known: dict[float, dict[str, Any]] = {}
  if source_stages or split is not None:
    known = _watch_source(path, source, source_stages, split, clip_stages, limits, watched, gates)
  if split is not None:
    clips = split.clips({**source, **watched.source})
  for clip in clips or ():
    row = {**source, **watched.source, **clip}
    scores = known.get(clip["start"], {})
    rest = [stage for stage in clip_stages if stage.name not in scores]
    if rest:
      scores = {**scores, **_watch_clip(path, row, rest, limits, watched, gates)}
    columns, unseen = dict(clip), {}
    for stage in clip_stages:
      columns.update(scores[stage.name])
      if UNSEEN in columns:
        unseen[stage.name] = columns.pop(UNSEEN)
    watched.clips.append({**columns, UNSEEN: unseen} if unseen else columns)
  watched.cpu["decode"] = clock.process_time() - began - sum(watched.cpu.values())
  return watched


def see(
  stage: FrameStage, clips: Sequence[Sequence[np.ndarray]]
) -> tuple[list[dict[str, Any]], float]:
  """(what the stage's network says of the pictures of each clip, CPU seconds); in the child too."""
  expect(sum(map(len, clips)) * _PICTURE)
  began = clock.process_time()
  return stage.see(clips), clock.process_time() - began


def _watch_source(path, source, stages, split, clip_stages, limits, watched, gates):
  """Fills watched.source; returns {start: {stage: columns}} of clips that it saw whole."""
  observers = {stage: stage.observer(source) for stage in stages}
  scan = next((o for o in observers.values() if hasattr(o, "decided")), None)
  spans = None
  if split is not None and scan is not None:
    spans = _Spans(source, split, clip_stages, watched, gates)
  # Whether a frame begins a scene is decided a few frames later; the clips wait for that.
  waiting: collections.deque[tuple[Frame, Forms]] = collections.deque()
  end = step = 0.0
  for index, (time, pts, forms) in enumerate(
    decode_frames(path, limits, vectors=_native(clip_stages))
  ):
    frame = Frame(index, time, pts, forms, forms.frame)
    for stage, observer in observers.items():
      watched.timed(stage, observer.frame, frame)
    step = time - end if index else step
    end = time
    watched.frames += 1
    if spans is not None:
      waiting.append((frame, forms))
      while waiting and waiting[0][0].index <= scan.decided:
        spans.frame(*waiting[0], scan.begins(waiting.popleft()[0].index))
  for stage, observer in observers.items():
    watched.source.update(watched.timed(stage, observer.scores))
  if spans is None:
    return {}
  while waiting:
    spans.frame(*waiting[0], scan.begins(waiting.popleft()[0].index))
  return spans.finish({**source, **watched.source})


class _Spans:
  """The clips of a source while it passes: one is open at a time, the best of the closed stay."""

  def __init__(self, source, split, stages: Sequence[FrameStage], watched: Watched, gates):
    self._source, self._split = source, split
    self._watched, self._gates = watched, gates
    self._stages = [stage for stage in stages if _passes(stage)]
    self._open: _Span | None = None
    self._closed: list[_Span] = []
    self._scene, self._next = -1, 0.0  # the scene's number; when the next span may start

  def frame(self, frame: Frame, forms: Forms, begins: bool) -> None:
    if begins:
      self._close(frame.time)
      self._scene += 1
      self._next = self._split.first_start(frame.time)
    if self._open is not None and frame.time >= self._open.latest_end - 1e-6:
      self._close(self._open.latest_end)
    if self._open is None and frame.time >= self._next - 1e-6:
      start, end = self._next, self._split.window_end(self._next)
      while frame.time >= end - 1e-6:  # a gap between two frames longer than a clip
        start, end = end, self._split.window_end(end)
      self._open = _Span(start, end, self._scene, self._watched)
      if self._split.may_win(self._source, start, self._scene, self._closed):
        self._open.watch(self._stages, {**self._source, "start": start})
    if self._open is not None:
      self._open.frame(frame, forms)

  def _close(self, end: float):
    if self._open is None:
      return
    self._open.end, self._next = end, self._open.latest_end
    if self._split.long_enough(self._open.start, end):
      self._closed = self._split.best(self._source, [*self._closed, self._open])
    self._open = None

  def finish(self, source) -> dict[float, dict[str, dict[str, Any]]]:
    """Of each clip of the split that was seen whole: its stages' columns."""
    self._close(source[self._split.end_column])
    rows = {clip["start"]: clip for clip in self._split.clips(source)}
    seen = {}
    for span in self._closed:
      row = rows.get(span.start)
      if row is not None and span.observed and abs(row["end"] - span.end) < 1e-6:
        seen[span.start] = span.scores({**source, **row}, self._gates)
    return seen


@dataclasses.dataclass
class _Span:
  """Frames [start, end) seconds of the source, and who observes them."""

  start: float
  latest_end: float
  scene: int
  watched: Watched
  end: float = math.nan
  observed: bool = False

  def watch(self, stages: Sequence[FrameStage], row: Mapping[str, Any] | None) -> None:
    """From now on these stages observe it; `row` is None while it is not whole."""
    self.observed = True
    self._count = 0
    self._stages = stages
    self._live = {stage: stage.observer(row) for stage in stages if stage.rate is None}
    self._next = {stage.rate: 0 for stage in stages if stage.rate is not None}
    self._samples: dict[float, list[tuple[int, float, int, Forms]]] = {r: [] for r in self._next}

  def frame(self, frame: Frame, forms: Forms) -> None:
    """The next frame of the source."""
    if not self.observed:
      return
    time = frame.time - self.start
    if self._live:
      shared = Frame(self._count, time, frame.pts, forms, forms.frame)
      for stage, observer in self._live.items():
        self.watched.timed(stage, observer.frame, shared)
    kept = None
    for rate in self._next:
      if time >= self._next[rate] / rate - 1e-6:
        self._next[rate] = math.floor(time * rate + 1e-6) + 1
        kept = kept or forms.without_copies(_WIDEST_SAMPLE)
        self._samples[rate].append((self._count, time, frame.pts, kept))
    self._count += 1

  def scores(
    self, row: Mapping[str, Any], gates: Mapping[str, Sequence[Rule]]
  ) -> dict[str, dict[str, Any]]:
    """{stage: columns}; `row` is whole."""
    row, found = dict(row), {}
    for stage in self._stages:
      found[stage.name] = {}
      if _open(gates.get(stage.name, ()), row):
        found[stage.name] = self.watched.timed(stage, self._score, stage, row)
        row.update(found[stage.name])
    return found

  def _score(self, stage: FrameStage, row: Mapping[str, Any]) -> dict[str, Any]:
    if stage.rate is None:
      return self._live[stage].scores()
    observer = stage.observer(row)
    for index, time, pts, forms in self._samples[stage.rate]:
      observer.frame(Frame(index, time, pts, forms, forms.frame))
    return observer.scores()


def _watch_clip(path, row, stages, limits, watched, gates):
  """{stage: columns} of one clip that is known."""
  span = _Span(row["start"], row["end"], 0, watched)
  span.watch(stages, row)
  for time, pts, forms in decode_frames(
    path, limits, row["start"], row["end"], vectors=_native(stages)
  ):
    span.frame(Frame(0, time, pts, forms, forms.frame), forms)
    watched.frames += 1
  return span.scores(row, gates)


def _open(rules: Sequence[Rule], row: Mapping[str, Any]) -> bool:
  """Whether none of the rules rejects the row; what is not computed rejects nothing."""
  return all(passes(rule, row.get(rule.column)) is not False for rule in rules)


def _native(stages: Sequence[FrameStage]) -> bool:
  return any(stage.native for stage in stages)


def _passes(stage: FrameStage) -> bool:
  """Whether it can observe a clip that has not ended."""
  return stage.live or stage.rate is not None
