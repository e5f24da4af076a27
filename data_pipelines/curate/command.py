"""The flags of `python -m data_pipelines.curate`, and what each --action does.

Not in `__main__`: every process of a run imports that file once more.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich import console
from rich import progress as rich_progress

from data_pipelines.curate import checksums, engines, export, funnel, report, shards, sources
from data_pipelines.curate import config as config_lib
from data_pipelines.curate import run as running
from mgen_jax.errors import UserError

_ACTIONS = ("run", "select", "verify")


def main(argv: Sequence[str]) -> None:
  """Reads the flags and does what --action says."""
  del argv
  values = flags.FLAGS
  if values.config is None:
    raise UserError(
      "--config is missing: name one, like data_pipelines/curate/configs/movie_gen_720.py."
    )
  if values.output is None:
    raise UserError("--output is missing: name the folder of the results.")
  if values.workers < 0:
    raise UserError(f"--workers={values.workers}: it must be 0 (one for each core) or more.")
  config = config_lib.resolve(values.config)
  recipe = config.recipe()
  if values["what-if"].value:
    _what_if(config, recipe, values.output, values["what-if"].value)
  elif values.action == "verify":
    _verify(running.reopen(config.name, recipe, values.output))
  elif values.action == "select":
    run = running.reopen(config.name, recipe, values.output)
    with running.only_one(run.store.root):
      _decide(run, config)
  else:
    _run(config, recipe)


def _run(config: config_lib.CurateConfig, recipe) -> None:
  values = flags.FLAGS
  if values.input is None:
    raise UserError("--input is missing: name a folder of videos, a file, or a pattern.")
  sums = _checksums(values.checksums, *sources.find(values.input))  # before an engine starts
  engine = engines.make(values.engine, values.workers, values.engine_options)
  began = time.monotonic()
  try:
    run, paths = running.create(config.name, recipe, values.input, values.output)
    with running.only_one(run.store.root), _Bar() as bar:
      totals = running.score(run, paths, engine, limits=config.limits, progress=bar, checksums=sums)
      table = _decide(run, config)
      if values.export:
        made = export.export(run, table, engine, config.export, limits=config.limits, progress=bar)
        if config.export.shards:
          sharded = shards.write(run, engine, config.export, progress=bar)
  finally:
    engine.close()
  print(
    f"scored {totals['sources']} files and {totals['clips']} clips anew in"
    f" {time.monotonic() - began:.0f} s"
  )
  if values.export:
    failed = f"; {made['failed']} could not be cut, see the log" if made["failed"] else ""
    print(
      f"{made['clips']} clips, {made['bytes'] / 1e6:.1f} MB:"
      f" {run.store.root / export.FOLDER}{failed}"
    )
    if config.export.shards:
      print(
        f"{sharded['records']} of them in {sharded['shards']} shards of {sharded['buckets']}"
        f" buckets: {run.store.root / shards.FOLDER}"
      )


def _checksums(file: str | None, root: Path, paths: Sequence[str]) -> dict[str, str]:
  """What --checksums says of the files; tells which of them it does not list, and lists in vain."""
  if file is None:
    return {}
  sums = checksums.read(file, root)
  unknown = sorted(set(paths) - sums.keys())
  if len(unknown) == len(paths):
    raise UserError(
      f"--checksums={file} lists none of the {len(paths)} files; its paths must be relative to"
      f" {root}, like {paths[0]}."
    )
  missing = sorted(sums.keys() - set(paths))
  for names, what in ((unknown, "are not listed, so not checked"), (missing, "are not there")):
    if names:
      print(f"--checksums: {len(names)} files {what}, like {names[0]}", file=sys.stderr)
  return sums


def _decide(run: running.Run, config: config_lib.CurateConfig):
  table = running.decide(run)
  running.save_selection(run, table)
  found = report.write(
    run.store.root,
    run.name,
    run.recipe,
    table,
    running.costs(run),
    run.input_root,
    config.limits,
  )
  print(funnel.text(found["funnel"]))
  for sentence in funnel.steep(run.recipe, found["funnel"]):
    print(sentence, file=sys.stderr)
  if not table.num_rows or not found["kept"]:
    print("nothing is kept: the report shows which threshold to look at", file=sys.stderr)
  print(f"report: {run.store.root / 'report.html'}")
  return table


def _what_if(config, recipe, output: str, changes: Sequence[str]) -> None:
  run = running.reopen(config.name, recipe, output)
  other = running.reopen(config.name, config_lib.what_if(recipe, changes), output)
  now, then = running.decide(run), running.decide(other)
  rows = funnel.rows(other.recipe, then)
  print(funnel.text(funnel.rows(run.recipe, now), rows))
  kept = [set(table.filter(table["keep"])["clip_id"].to_pylist()) for table in (now, then)]
  print(
    f"{len(kept[1])} clips instead of {len(kept[0])}: {len(kept[1] - kept[0])} more,"
    f" {len(kept[0] - kept[1])} less; nothing was changed"
  )
  unscored = then["first_fail"].to_pylist().count("not_scored")
  if unscored:
    print(f"{unscored} clips lack a score that was not needed so far; a run would tell")


def _verify(run: running.Run) -> None:
  found = run.store.faults() + export.faults(run) + shards.faults(run)
  for sentence in found:
    print(sentence)
  if found:
    raise UserError(f"{len(found)} files are at fault; run again to make them anew.")
  print(f"{run.store.root}: every committed file is whole")


class _Bar:
  """Progress on a terminal, one line for each kind of work."""

  def __init__(self):
    self._bar = rich_progress.Progress(
      rich_progress.TextColumn("{task.description}"),
      rich_progress.BarColumn(),
      rich_progress.MofNCompleteColumn(),
      rich_progress.TimeRemainingColumn(),
      console=console.Console(stderr=True),
      transient=True,
    )
    self._tasks: dict[str, rich_progress.TaskID] = {}

  def __enter__(self) -> "_Bar":
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  def __call__(self, what: str, done: int, total: int) -> None:
    if what not in self._tasks:
      self._tasks[what] = self._bar.add_task(what, total=total)
    self._bar.update(self._tasks[what], completed=done, total=total)


def define_flags() -> None:
  """All but those of `mgen_jax.cli`; `main` reads them."""
  config_flags.DEFINE_config_file("config", help_string="The settings; see configs/.")
  flags.DEFINE_string("input", None, "Folder of videos, a file, or a pattern in quotes.")
  flags.DEFINE_string("output", None, "Folder of the results.")
  flags.DEFINE_string("checksums", None, "What the videos should be, as sha256sum writes it.")
  flags.DEFINE_enum("action", "run", _ACTIONS, "What to do.")
  flags.DEFINE_enum("engine", "local", engines.NAMES, "Who does the work.")
  flags.DEFINE_integer("workers", 0, "Units of work at once; 0: one for each core.")
  flags.DEFINE_list("engine_options", [], "Address of a Ray cluster, or Beam's own flags.")
  flags.DEFINE_list("what-if", [], "stage.key=value: what another threshold would leave.")
  flags.DEFINE_bool("export", True, "Cut the kept clips into files.")
