"""One unit of work: a phase of stages on one partition, from its sources to committed parts.

Only what is missing is computed: rows of earlier runs are taken over one by one, so a new file or a
looser threshold costs what is new. Nothing here depends on which process runs it or when, and the
rows are sorted, so any number of workers writes the same bytes. Not here: which units there are
(`run`), who runs them (`engines`), one pass over a file (`watch`).
"""

import atexit
import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.curate import decode, sources, watch
from data_pipelines.curate.recipe import CLIP_KEYS, SOURCE_COLUMNS, SOURCE_KEYS, Recipe, passes
from data_pipelines.curate.stage import UNSEEN, FrameStage, SourceStage, Stage, clip_id
from data_pipelines.curate.store import Store, rows_of, table_of

Row = dict[str, Any]
_TOGETHER = 32  # clips that networks see at once; each leaves 150 KB a picture
FAULT = {"error_code": pa.string(), "error": pa.string()}


@dataclasses.dataclass(frozen=True)
class Task:
  """What travels to a worker: names and numbers, never a byte of video.

  Attributes:
    root, input_root: the folder of the run and that of the videos, as every worker sees them.
    phase: of `Recipe.phases`.
    partition: its number.
    inputs: digest of what the unit is computed from, see `run`.
  """

  root: str
  input_root: str
  recipe: Recipe
  phase: int
  partition: int
  inputs: str
  limits: decode.Limits


def run_task(task: Task) -> None:
  """Computes and commits one unit; what was committed before is left as it is."""
  unit = _Unit(task)
  listed = sources.of_partition(unit.store.root, task.partition)
  if task.phase == 0:
    for row in listed:
      unit.do_source(row)
    unit.do_waiting()
  else:
    for clip in clip_rows(unit.store, task.recipe, task.partition, task.phase):
      unit.do_clip(clip, os.path.join(task.input_root, clip["path"]))
  unit.commit(len(listed))


class _Unit:
  """The rows of one unit: those that were there, and those that are made now."""

  def __init__(self, task: Task):
    self.task = task
    self.recipe = task.recipe
    self.store = Store(task.root)
    self.stages = self.recipe.phases[task.phase]
    self.at_source = [s for s in self.stages if self.recipe.levels[s.name] == "source"]
    self.at_clips = [
      s for s in self.stages if s not in self.at_source and s is not task.recipe.split
    ]
    self.gates = {
      stage.name: tuple(rule for _, rule in self.recipe.rules(before=stage.name))
      for stage in self.stages
      if stage.name in self.recipe.dear
    }
    self.old = {stage.name: self._load(stage) for stage in self.stages}
    self.rows: dict[str, list[Row]] = {stage.name: [] for stage in self.stages}
    self.cpu: dict[str, float] = collections.defaultdict(float)
    self.frames = 0
    self.waiting: list[tuple[Row, str, Row]] = []  # clips, their files, what was seen of them
    self.new_sources: set[tuple] = set()
    self.new_clips: set[str] = set()
    self.began = time.time()

  def _load(self, stage: Stage) -> dict[Any, list[Row]]:
    """Rows of an earlier run: by source, or of clip stages by clip."""
    table = self.store.read(stage.name, self.recipe.versions[stage.name], self.task.partition)
    found: dict[Any, list[Row]] = collections.defaultdict(list)
    if table is None or not set(part_types(self.recipe, stage)) <= set(table.column_names):
      return {}
    for row in rows_of(table):
      found[row["clip_id"] if stage in self.at_clips else _source_key(row)].append(row)
    return dict(found)

  # From files.

  def do_source(self, listed: Row) -> None:
    """All stages of this phase for one source and its clips."""
    row = {name: listed[name] for name in SOURCE_COLUMNS}
    path = os.path.join(self.task.input_root, row["path"])
    on_frames: list[FrameStage] = []
    for stage in self.at_source:
      if isinstance(stage, FrameStage):
        if not self._take_over(stage, row):
          on_frames.append(stage)
      elif set(stage.needs) <= set(row) and not self._take_over(stage, row):
        self._add(stage, row, self._score_source(stage, row, path, listed["listed_error"]))
      if self._fault(stage, row):
        return
    if self._worth_decoding(row):
      self._decode(row, path, on_frames)

  def _score_source(self, stage: Stage, row: Row, path: str, listed_error: str | None) -> Row:
    if not stage.beside:
      self.new_sources.add(_source_key(row))
    if listed_error:
      return {"error_code": listed_error, "error": sources.REASONS[listed_error]}
    if isinstance(stage, SourceStage):
      return self._probe(stage, row, path)
    return self._timed(stage, row)

  def _probe(self, stage: SourceStage, row: Row, path: str) -> Row:
    try:
      values, seconds = guard(self.task.limits).call(_score_file, stage, path)
    except decode.DecodeError as error:
      return _fault_of(error, row)
    self.cpu[stage.name] += seconds
    return values

  def _worth_decoding(self, row: Row) -> bool:
    """Whether what is known without a decode meets the rules of sources."""
    return not self.recipe.gate_sources or all(
      passes(rule, row.get(rule.column)) is not False
      for stage, rule in self.recipe.rules()
      if stage in self.at_source and not isinstance(stage, FrameStage)
    )

  def _decode(self, row: Row, path: str, on_frames: Sequence[FrameStage]) -> None:
    """One pass over the file for what is not known of the source and its clips."""
    split = self.recipe.split
    known = self.old[split.name].get(_source_key(row))
    if known is None:
      observed = [s for s in self.at_clips if isinstance(s, FrameStage) and s.needs_frames()]
      watched = self._watch(row, path, on_frames, split, None, observed)
      if isinstance(watched, dict):
        self._add(split, row | {"clip_id": None}, watched)
        return
      clips = [dict.fromkeys(split.columns) | clip for clip in watched.clips]
      for clip in clips:
        clip["clip_id"] = clip_id(row, clip)
        self._add(split, row | clip, clip)
      if not clips:
        self._add(split, row | {"clip_id": None}, {})
      self._after_frames(row, on_frames, watched.source)
      seen = watched.clips
    else:
      self.rows[split.name] += known
      clips = [old for old in known if old["clip_id"] is not None]
      seen = [{}] * len(clips)
      watched = self._watch(row, path, on_frames, None, None, ()) if on_frames else None
      if isinstance(watched, dict):
        self._add(on_frames[0], row, watched)
        return
      self._after_frames(row, on_frames, watched.source if watched else {})
    for clip, values in zip(clips, seen, strict=True):
      known = row | {name: clip[name] for name in ("clip_id", *split.columns)}
      self.waiting.append((known, path, values))
    if len(self.waiting) >= _TOGETHER:
      self.do_waiting()

  def _after_frames(self, row: Row, on_frames: Sequence[FrameStage], values: Row) -> None:
    """Adds what the frames told of a source, and the stages of rows that waited for it."""
    for stage in self.at_source:
      if stage in on_frames:
        self._add(stage, row, values)
      elif not set(stage.columns) <= set(row) and not self._take_over(stage, row):
        self._add(stage, row, self._timed(stage, row))

  def _watch(self, row, path, on_source, split, clips, on_clips) -> watch.Watched | Row:
    """One pass over the file; its fault instead if it cannot be used."""
    self.new_sources.add(_source_key(row))
    limits = self.task.limits
    stages = (tuple(on_source), split, clips, tuple(on_clips))
    try:
      watched = guard(limits).call(watch.watch, path, dict(row), *stages, limits, self.gates)
    except decode.DecodeError as error:
      return _fault_of(error, row)
    self.frames += watched.frames
    for name, seconds in watched.cpu.items():
      self.cpu[name] += seconds
    return watched

  # Of clips.

  def do_waiting(self) -> None:
    """The rest of the clips that were watched: networks see all of them at once."""
    self._show([values for _, _, values in self.waiting])
    for clip, path, values in self.waiting:
      self.do_clip(clip, path, values)
    self.waiting.clear()

  def _show(self, seen: Sequence[Row]) -> None:
    """Adds what networks say to the columns of clips that left something to them."""
    for stage in self.at_clips:
      due = [row for row in seen if stage.name in row.get(UNSEEN, ())]
      if not due:
        continue
      pictures = [row[UNSEEN].pop(stage.name) for row in due]
      try:
        found, seconds = guard(self.task.limits).call(watch.see, stage, pictures)
      except decode.DecodeError as error:
        code = {"error_code": error.code, "error": f"{stage.name}: {error}"}
        found, seconds = [dict.fromkeys(stage.columns) | code for _ in due], 0.0
      self.cpu[stage.name] += seconds
      for row, columns in zip(due, found, strict=True):
        row |= columns

  def do_clip(self, clip: Row, path: str, seen: Mapping[str, Any] | None = None) -> None:
    """The stages of this phase for one clip, in order.

    Args:
      clip: all columns of its source, and those of the clip that are known.
      path: of its source, for stages that need frames.
      seen: columns of such stages that a pass over the source has given already.
    """
    seen = dict(seen or {})
    for stage in self.at_clips:
      if self._take_over(stage, clip) or not self._passes_gate(stage, clip):
        continue
      self.new_clips.add(clip["clip_id"])
      if not isinstance(stage, FrameStage):
        self._add(stage, clip, self._timed(stage, clip))
        continue
      if not stage.needs_frames():
        self._add(stage, clip, stage.observer(clip).scores())
        continue
      if not set(stage.columns) <= set(seen):
        seen |= self._look_again(clip, path, seen)
      self._add(stage, clip, seen)

  def _look_again(self, clip: Row, path: str, seen: Row) -> Row:
    """The columns of all stages that are due and need frames, from a pass over this clip alone."""
    due = [
      stage
      for stage in self.at_clips
      if isinstance(stage, FrameStage)
      and stage.needs_frames()
      and not self._is_known(stage, clip)
      and not set(stage.columns) <= set(clip) | set(seen)
      and self._passes_gate(stage, clip)
    ]
    span = {name: clip[name] for name in self.recipe.split.columns}
    watched = self._watch(clip, path, (), None, [span], due)
    if isinstance(watched, dict):
      return dict.fromkeys(name for stage in due for name in stage.columns) | watched
    self._show(watched.clips)
    return watched.clips[0]

  def _passes_gate(self, stage: Stage, clip: Row) -> bool:
    """Whether a dear stage is worth its cost: no rule before it rejects the clip."""
    rules = self.gates.get(stage.name, ())
    return all(passes(rule, clip.get(rule.column)) is not False for rule in rules)

  # Of all.

  def _timed(self, stage: Stage, row: Row) -> Row:
    began = time.process_time()
    values = stage.score(row)
    self.cpu[stage.name] += time.process_time() - began
    return values

  def _take_over(self, stage: Stage, row: Row) -> bool:
    """Keeps the old row of a source or clip, adds its columns to `row`; whether there is one."""
    key = row.get("clip_id") if stage in self.at_clips else _source_key(row)
    old = self.old[stage.name].get(key)
    if old is None or stage.beside:
      return False
    if stage.name in self.recipe.from_beside and old[0]["made_from"] != _made_from(stage, row):
      return False
    self.rows[stage.name] += old
    row |= {name: old[0][name] for name in stage.columns}
    return True

  def _is_known(self, stage: Stage, clip: Row) -> bool:
    old = self.old[stage.name].get(clip["clip_id"])
    depends = stage.name in self.recipe.from_beside
    return old is not None and (not depends or old[0]["made_from"] == _made_from(stage, clip))

  def _add(self, stage: Stage, row: Row, values: Mapping[str, Any]) -> None:
    """Adds a row of the stage, and its columns to `row`."""
    keys = {name: row[name] for name in CLIP_KEYS if name in row}
    scores = {name: values.get(name) for name in stage.columns}
    fault = {name: values.get(name) or None for name in FAULT}
    if stage.name in self.recipe.from_beside:
      fault["made_from"] = _made_from(stage, row)
    self.rows[stage.name].append(keys | scores | fault)
    row |= scores

  def _fault(self, stage: Stage, row: Row) -> bool:
    made = self.rows[stage.name]
    return bool(made) and _source_key(made[-1]) == _source_key(row) and bool(made[-1]["error_code"])

  def commit(self, listed: int) -> None:
    """Writes the part of each stage, and its commit last."""
    for stage in self.stages:
      version = self.recipe.versions[stage.name]
      earlier = self.store.commit_of(stage.name, version, self.task.partition)
      if earlier is not None and earlier.inputs == self.task.inputs:
        continue
      rows = sorted(self.rows[stage.name], key=_order)
      errors = collections.Counter(row["error_code"] for row in rows if row["error_code"])
      counters = {
        "in": listed,
        "out": len(rows),
        "new_sources": len(self.new_sources),
        "new_clips": len(self.new_clips),
        "errors": dict(sorted(errors.items())),
        "cpu_s": self.cpu.get(stage.name, 0.0),
        "wall_s": round(time.time() - self.began, 3),
        "host": os.uname().nodename,
        "finished": round(time.time(), 3),
      }
      if stage is self.recipe.split:
        counters |= {"frames": self.frames, "decode_cpu_s": self.cpu.get("decode", 0.0)}
      for name in ("cpu_s", "decode_cpu_s", "frames"):  # what the rows have cost altogether
        if earlier is not None and name in counters:
          counters[name] += earlier.counters.get(name, 0)
      table = table_of(rows, part_types(self.recipe, stage))
      self.store.write(
        stage.name,
        version,
        self.task.partition,
        table,
        inputs=self.task.inputs,
        counters=counters,
      )


def part_types(recipe: Recipe, stage: Stage) -> dict[str, pa.DataType]:
  """The columns of a stage's parts: keys, scores, and why there are none."""
  keys = SOURCE_KEYS if recipe.levels[stage.name] == "source" else CLIP_KEYS
  made_from = {"made_from": pa.string()} if stage.name in recipe.from_beside else {}
  return keys | dict(stage.columns) | FAULT | made_from


def clip_rows(store: Store, recipe: Recipe, partition: int, phase: int) -> list[Row]:
  """The clips of a partition with all columns that the phases before `phase` wrote, in order."""
  listed = sources.of_partition(store.root, partition)
  by_source = {_source_key(row): {n: row[n] for n in SOURCE_COLUMNS} for row in listed}
  clips: dict[str, Row] = {}
  for row in _part(store, recipe, recipe.split, partition):
    if row["clip_id"] is not None:
      clips[row["clip_id"]] = row
  stages = [stage for group in recipe.phases[:phase] for stage in group]
  for stage in stages:
    of_source = recipe.levels[stage.name] == "source"
    for row in _part(store, recipe, stage, partition) if stage is not recipe.split else ():
      known, key = (by_source, _source_key(row)) if of_source else (clips, row["clip_id"])
      if key in known:
        known[key] |= {name: row[name] for name in stage.columns}
  blank = dict.fromkeys(name for stage in stages for name in stage.columns)
  found = [blank | by_source[_source_key(clip)] | clip for clip in clips.values()]
  return sorted(found, key=_order)


def _part(store: Store, recipe: Recipe, stage: Stage, partition: int) -> list[Row]:
  table = store.read(stage.name, recipe.versions[stage.name], partition)
  return rows_of(table) if table is not None else []


def _score_file(stage: SourceStage, path: str) -> tuple[Row, float]:
  """(columns of the file, CPU seconds); runs in the guarded child."""
  began = time.process_time()
  return stage.score(path), time.process_time() - began


def _fault_of(error: decode.DecodeError, row: Row) -> Row:
  return {"error_code": error.code, "error": f"{row['path']}: {error}"}


def _made_from(stage: Stage, row: Mapping[str, Any]) -> str:
  """Digest of what a stage reads of a row."""
  values = [[need, row.get(need)] for need in stage.needs]
  return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def _source_key(row: Mapping[str, Any]) -> tuple[str, int]:
  return row["source_id"], row["copy"]


def _order(row: Mapping[str, Any]) -> tuple:
  return row["source_id"], row["copy"], row.get("clip_id") or ""


_guards: dict[decode.Limits, decode.Guard] = {}


def guard(limits: decode.Limits) -> decode.Guard:
  """The killable child of this worker; it stays, with the models that stages loaded in it."""
  if limits not in _guards:
    guard = _guards[limits] = decode.Guard(limits)
    atexit.register(guard.close)
  return _guards[limits]
