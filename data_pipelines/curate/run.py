"""The driver of a run: lists the sources, hands out what is not done, and decides.

What a unit is computed from has a digest, which its commit repeats; a unit whose stages all have
commits with the digest of today is done. So the same command again does what is new, and after a
crash what was not committed. Not here: what a unit does (`work`), flags and printing
(`__main__`).
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.curate import decode, select, sources, work
from data_pipelines.curate.engines import Engine
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stage import FrameStage, SourceStage, Stage, TableStage
from data_pipelines.curate.store import (
  SCHEMA_VERSION,
  Commit,
  Store,
  not_written,
  read_table,
  table_of,
  write_table,
  write_text,
)
from mgen_jax.errors import UserError

RUN_NAME = "run.json"
SELECTION = "selection.parquet"
_LOCK = ".lock"

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """One output folder with what it is made from.

  Attributes:
    name: of the config.
    recipe: the stages.
    store: the folder.
    input_root: the folder of the videos.
  """

  name: str
  recipe: Recipe
  store: Store
  input_root: Path

  @property
  def selection_path(self) -> Path:
    return self.store.root / SELECTION


def create(name: str, recipe: Recipe, pattern: str, output: str) -> tuple[Run, list[str]]:
  """Opens the output folder for this config, makes it if it is new; the run and paths found.

  Raises:
    UserError: no input, the folder cannot be written or is of another config.
  """
  root, paths = sources.find(pattern)
  store = Store(output)
  try:
    store.root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise not_written(store.root, error) from error
  if store.root.resolve().is_relative_to(root) and os.path.isdir(pattern):
    raise UserError(
      f"--output={output} lies in --input={pattern}: the next run would take its results for"
      " sources; give a folder elsewhere."
    )
  identity = _identity(name, recipe)
  earlier = _read_run(store.root)
  if earlier is None and any(path.name != _LOCK for path in store.root.iterdir()):
    raise UserError(f"--output={output} holds something else; give an empty or a new folder.")
  if earlier is not None:
    _check_identity(earlier, identity, output)
  found = identity | {"input": str(root), "recipe": recipe.plain()}
  write_text(store.root / RUN_NAME, json.dumps(found, indent=2, default=list) + "\n")
  return Run(name, recipe, store, root), paths


def reopen(name: str, recipe: Recipe, output: str) -> Run:
  """The run in a folder, with the thresholds of `recipe`; nothing is written.

  Raises:
    UserError: there is none, or it is of another config.
  """
  earlier = _read_run(Path(output))
  if earlier is None:
    raise UserError(f"--output={output} holds no run of curation; give --input to start one.")
  _check_identity(earlier, _identity(name, recipe), output)
  return Run(name, recipe, Store(output), Path(earlier["input"]))


def _identity(name: str, recipe: Recipe) -> dict[str, Any]:
  """What a folder belongs to. Settings of stages are not in it: their versions tell them apart."""
  return {
    "schema_version": SCHEMA_VERSION,
    "config": name,
    "seed": recipe.seed,
    "partitions": recipe.partitions,
  }


def _check_identity(earlier: dict[str, Any], identity: dict[str, Any], output: str) -> None:
  for key, value in identity.items():
    if earlier.get(key) != value:
      raise UserError(
        f"--output={output} was made with {key}={earlier.get(key)!r}, now it is {value!r}; give"
        " another folder."
      )


def _read_run(root: Path) -> dict[str, Any] | None:
  try:
    return json.loads((root / RUN_NAME).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f"{root / RUN_NAME} cannot be read ({error}); give another folder.") from error


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
  """No second run writes into the folder meanwhile. Raises UserError if one does."""
  try:
    file = (root / _LOCK).open("w")
  except OSError as error:
    raise not_written(root / _LOCK, error) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f"another curation is at work in {root}; wait for it.") from error
    yield


def score(
  run: Run,
  paths: list[str],
  engine: Engine,
  *,
  limits: decode.Limits | None = None,
  progress: Progress | None = None,
  checksums: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Computes what is missing; {"sources", "clips", "units", "wall_s"} of this call.

  Args:
    paths: of all files, relative to the input, see `sources.find`.
    progress: called with (what, done, in all).
    checksums: what files should be, see `checksums.read`; others are rejected.
  """
  say = progress or (lambda what, done, total: None)
  began = time.monotonic()
  run.store.remove_leftovers()
  listed = sources.update(
    run.store.root,
    run.input_root,
    paths,
    run.recipe.partitions,
    progress=lambda done, total: say("hashing files", done, total),
    checksums=checksums,
  )
  units = 0
  # By partition, the most that a phase has scored: what two phases score is not two.
  files: collections.Counter[int] = collections.Counter()
  clips: collections.Counter[int] = collections.Counter()
  with select.Catalogue(run.store, run.recipe) as catalogue:
    for phase, stages in enumerate(run.recipe.phases):
      if isinstance(stages[0], TableStage):
        say(stages[0].name, 0, 1)
        scores = _score_table(run, catalogue, stages[0])
        catalogue.add(stages[0], scores)
        say(stages[0].name, 1, 1)
        continue
      tasks = _due(run, listed, phase, limits or decode.Limits())
      _read_texts(run, listed, stages, tasks)
      name = stages[0].name if phase else "scoring"
      say(name, 0, len(tasks))
      # Rows alone are quicker done here than workers are started for them.
      dear = any(_is_dear(stage) for stage in stages)
      results = engine.run(work.run_task, tasks) if dear else map(work.run_task, tasks)
      for number, _ in enumerate(results, start=1):
        say(name, number, len(tasks))
      units += len(tasks)
      lost = [task.partition for task in tasks if not _is_done(run, task)]
      if lost:
        raise UserError(
          f"the engine ended without the partitions {lost[:10]} of {len(lost)} that are not done;"
          " run again, what is done is kept."
        )
      for task in tasks:
        new = [commit.counters for commit in _commits(run, task) if commit is not None]
        files |= collections.Counter({task.partition: max(c["new_sources"] for c in new)})
        clips |= collections.Counter({task.partition: max(c["new_clips"] for c in new)})
      for stage in stages:
        catalogue.add(stage)
  totals = {"sources": files.total(), "clips": clips.total(), "units": units}
  return totals | {"wall_s": time.monotonic() - began}


def _is_dear(stage: Stage) -> bool:
  """Whether it opens files."""
  if isinstance(stage, FrameStage):
    return stage.needs_frames()
  return isinstance(stage, SourceStage)


def _due(run: Run, listed: pa.Table, phase: int, limits: decode.Limits) -> list[work.Task]:
  tasks = []
  for partition, inputs in _inputs(run, listed, phase).items():
    task = work.Task(
      str(run.store.root.resolve()),
      str(run.input_root),
      run.recipe,
      phase,
      partition,
      inputs,
      limits,
    )
    if not _is_done(run, task):
      tasks.append(task)
  sizes = collections.Counter()
  columns = (listed[name].to_pylist() for name in ("partition", "bytes"))
  for partition, size in zip(*columns, strict=True):
    sizes[partition] += size or 0
  # The largest first: one that came last would be waited for alone.
  return sorted(tasks, key=lambda task: -sizes[task.partition])


def _read_texts(
  run: Run, listed: pa.Table, stages: Sequence[Stage], tasks: list[work.Task]
) -> None:
  """Reads what lies beside the files that are due, before hours of decoding end at one of them.

  Raises UserError that names the first text that cannot be read, and how many there are.
  """
  due = {task.partition for task in tasks}
  rows = listed.select(["path", "partition", "listed_error"]).to_pylist()
  paths = [row["path"] for row in rows if row["partition"] in due and not row["listed_error"]]
  faults: dict[str, None] = {}
  for stage in stages:
    if isinstance(stage, SourceStage) and stage.beside:
      for path in paths:
        try:
          stage.score(os.path.join(run.input_root, path))
        except UserError as error:
          faults[str(error)] = None
  if faults:
    more = f" (and {len(faults) - 1} more texts like it)" if len(faults) > 1 else ""
    raise UserError(f"{next(iter(faults))}{more}")


def _is_done(run: Run, task: work.Task) -> bool:
  return all(c is not None and c.inputs == task.inputs for c in _commits(run, task))


def _commits(run: Run, task: work.Task) -> list[Commit | None]:
  """Of each stage of a unit."""
  versions = run.recipe.versions
  return [
    run.store.commit_of(stage.name, versions[stage.name], task.partition)
    for stage in run.recipe.phases[task.phase]
  ]


def _inputs(run: Run, listed: pa.Table, phase: int) -> dict[int, str]:
  """Digest of what each partition's unit of a phase is computed from: its sources, the rules that
  decide what is worth scoring, and the parts of earlier phases."""
  recipe = run.recipe
  stages = recipe.phases[phase]
  gates = [
    [stage.name, [dataclasses.astuple(rule) for _, rule in recipe.rules(before=stage.name)]]
    for stage in stages
    if stage.name in recipe.dear
  ]
  if recipe.gate_sources:
    of_sources = [s for s in recipe.stages if recipe.levels[s.name] == "source"]
    gates.append(["", [dataclasses.astuple(rule) for s in of_sources for rule in s.rules()]])
  versions = [[stage.name, recipe.versions[stage.name]] for stage in stages]
  keys: dict[int, list] = {partition: [] for partition in range(recipe.partitions)}
  columns = listed.select(["partition", "source_id", "copy", "listed_error", "beside"]).to_pydict()
  for partition, *key in zip(*columns.values(), strict=True):
    keys[partition].append(key)
  found = {}
  for partition, members in keys.items():
    upstream = [
      [stage.name, getattr(commit, "sha256", None)]
      for earlier in recipe.phases[:phase]
      for stage in earlier
      for commit in [run.store.commit_of(stage.name, recipe.versions[stage.name], partition)]
    ]
    content = json.dumps([versions, gates, members, upstream], default=list)
    if members:
      found[partition] = hashlib.sha256(content.encode()).hexdigest()
  return found


def _score_table(run: Run, catalogue: select.Catalogue, stage: TableStage) -> pa.Table:
  """The scores of a table stage, committed by partition; taken over if its input is the same."""
  version = run.recipe.versions[stage.name]
  survivors = catalogue.survivors(stage)
  inputs = select.digest(survivors)
  commits = run.store.commits(stage.name, version, run.recipe.partitions)
  if len(commits) == run.recipe.partitions and all(c.inputs == inputs for c in commits):
    parts = [run.store.read(stage.name, version, p) for p in range(run.recipe.partitions)]
    return pa.concat_tables(part for part in parts if part is not None)
  began = time.process_time()
  scores = select.score_tables(catalogue, stage)
  seconds = time.process_time() - began
  keyed = catalogue.keyed(scores)
  types = work.part_types(run.recipe, stage)
  for partition in range(run.recipe.partitions):
    rows = keyed.filter(pc.field("partition") == partition)
    table = table_of(rows.to_pylist(), types)
    counters = {
      "in": survivors.num_rows,
      "out": table.num_rows,
      "errors": {},
      "cpu_s": seconds / run.recipe.partitions,
    }
    run.store.write(stage.name, version, partition, table, inputs=inputs, counters=counters)
  return scores


def decide(run: Run) -> pa.Table:
  """The decision over the stored scores with the thresholds of the recipe; nothing is written."""
  with select.Catalogue(run.store, run.recipe) as catalogue:
    for stage in run.recipe.stages:
      scores = None
      if isinstance(stage, TableStage):
        scores = select.score_tables(catalogue, stage)
      catalogue.add(stage, scores)
    return catalogue.decide()


def save_selection(run: Run, table: pa.Table) -> None:
  """Writes selection.parquet: kept and rejected, every score, which scorer decided."""
  scorers = {stage.name: stage.scorer() for stage in run.recipe.stages if stage.scorer()}
  metadata = {
    "schema_version": str(SCHEMA_VERSION),
    "config": run.name,
    "scorers": json.dumps(scorers, sort_keys=True),
    "recipe": json.dumps(run.recipe.plain(), sort_keys=True, default=list),
  }
  write_table(run.selection_path, table.replace_schema_metadata(metadata))


def read_selection(run: Run) -> pa.Table:
  """What `save_selection` wrote."""
  if not run.selection_path.is_file():
    raise UserError(f"{run.selection_path} does not exist yet; run curation first.")
  return read_table(run.selection_path)


def costs(run: Run) -> dict[str, Any]:
  """From the commits: CPU seconds and errors by stage, frames decoded."""
  found: dict[str, Any] = {"stages": {}, "frames": 0, "decode_cpu_s": 0.0}
  for stage in run.recipe.stages:
    version = run.recipe.versions[stage.name]
    commits = run.store.commits(stage.name, version, run.recipe.partitions)
    found["stages"][stage.name] = {
      "version": version,
      "rows": sum(commit.records for commit in commits),
      "cpu_s": sum(commit.counters["cpu_s"] for commit in commits),
    }
    for commit in commits:
      found["frames"] += commit.counters.get("frames", 0)
      found["decode_cpu_s"] += commit.counters.get("decode_cpu_s", 0.0)
  return found
