"""The folder of a run: where each stage writes, which stages are done, and whose folder it is.

  WORKDIR/config.json          the resolved experiment, as it was last run
  WORKDIR/added.json           stages that commands have added to it, each with its config
  WORKDIR/STAGE/stage.json     the config the stage was started with
  WORKDIR/STAGE/done.json      written when it is finished: seconds, what it was made from
  WORKDIR/STAGE/...            checkpoints, metrics, records, report: the stage's own

Only process 0 writes here; all processes read.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from absl import logging

from mgen_jax import config as config_lib
from mgen_jax import schema
from mgen_jax.data import files
from mgen_jax.errors import UserError

CONFIG_NAME, ADDED_NAME = "config.json", "added.json"

# Keys of a stage that may change between an interrupted run and the one that continues it: they
# do not change what is learned (or, for `steps`, only how long). Batches and sets of data may
# change in steps to come: the checkpoint knows the order of what was drawn so far, and guards it.
FREE_KEYS = (
  *("steps", "batch_changes", "mixture", "log_every", "validate_every", "validate_batches"),
  *("checkpoint_every", "keep", "threads", "workers", "mesh", "show"),
  *("observe", "fall_back", "guard"),
)


class Workdir:
  """The folder of one experiment's run."""

  def __init__(self, root: Path | str, experiment: config_lib.Experiment):
    self.root = Path(root)
    self.experiment = experiment

  @classmethod
  def create(cls, root: Path | str, experiment: config_lib.Experiment) -> "Workdir":
    """Opens the folder for a run of `experiment`, and writes its config there.

    Raises:
      UserError: the folder belongs to another experiment, is no folder, or is not empty and not
        a run.
    """
    work = cls(root, experiment)
    path = work.root / CONFIG_NAME
    if jax.process_index() != 0:  # process 0 looks, makes and complains for all
      return work
    if work.root.exists() and not work.root.is_dir():
      raise UserError(f"--workdir={root} is a file: name a folder.")
    if path.exists():
      before = read_json(path)
      if before.get("name") != experiment.name:
        raise UserError(
          f'--workdir={root} belongs to the experiment "{before.get("name")}", and this one is '
          f'"{experiment.name}": name another --workdir.'
        )
    elif work.root.is_dir() and any(work.root.iterdir()):
      raise UserError(f"--workdir={root} holds other files and no run: name an empty folder.")
    files.make_folder(work.root, f"--workdir={root}")
    files.write_text_atomic(path, config_lib.to_json(experiment))
    return work

  @classmethod
  def open(cls, root: Path | str) -> "Workdir":
    """Opens the folder of a run that exists: the experiment that is written there, and the stages
    that were added to it.

    Raises:
      UserError: it is not one.
    """
    experiment = config_lib.from_json(str(Path(root) / CONFIG_NAME))
    for name, stage in _added(Path(root)).items():
      if name in experiment.stages:  # the experiment has one of its own by now
        continue
      try:
        experiment = _with_stage(experiment, name, stage)
      except UserError as error:  # the experiment has changed since
        logging.warning("stage %s, which was added to %s, is left out: %s", name, root, error)
    return cls(root, experiment)

  def with_stage(self, name: str, stage: Any) -> "Workdir":
    """The same folder with one more stage, after those of the experiment; see `keep_stage`.

    Raises:
      ConfigError: it does not fit them.
    """
    return Workdir(self.root, _with_stage(self.experiment, name, schema.to_plain(stage)))

  def keep_stage(self, name: str) -> None:
    """Writes down a stage of `with_stage`: `open` finds it from now on, whatever the experiment is
    run with by then."""
    if jax.process_index() == 0:
      stages = {**_added(self.root), name: schema.to_plain(self.experiment.stages[name])}
      files.write_text_atomic(self.root / ADDED_NAME, json.dumps(stages, indent=2) + "\n")

  def is_added(self, name: str) -> bool:
    """Whether a stage is one of those that commands have added, and not the experiment's own."""
    plain = json.loads(json.dumps(schema.to_plain(self.experiment.stages[name])))
    return _added(self.root).get(name) == plain

  def folder(self, stage: str) -> Path:
    """Where a stage writes."""
    return self.root / stage

  def latents(self, stage: str) -> Path:
    """Where the latents of an encode stage are."""
    folder = self.experiment.stages[stage].folder
    return self.folder(stage) if folder is None else Path(folder)

  def start(self, stage: str) -> None:
    """Notes the config a stage starts with, or checks that it is the one it was started with.

    Raises:
      UserError: it was started with another config, or from another result of an earlier stage.
    """
    path = self.folder(stage) / "stage.json"
    now = self._identity(stage)
    if path.exists():
      before = read_json(path)
      self._check_same(stage, before, now)
      # A set of data that a stage reads from a later step on may have come since.
      now["made_from"] = {**before["made_from"], **now["made_from"]}
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_text_atomic(path, json.dumps(now, indent=2) + "\n")

  def is_done(self, stage: str) -> bool:
    """Whether a stage is finished (and a train stage has reached the steps that are asked for).

    Raises:
      UserError: it was finished with another config, or from another earlier stage.
    """
    done = self.done_record(stage)
    if done is None:
      return False
    self._check_same(stage, read_json(self.folder(stage) / "stage.json"), self._identity(stage))
    config = self.experiment.stages[stage]
    return not isinstance(config, config_lib.TrainStage) or done["steps"] >= config.steps

  def done_record(self, stage: str) -> dict[str, Any] | None:
    """What `finish` wrote for a stage, or None."""
    path = self.folder(stage) / "done.json"
    return read_json(path) if path.exists() else None

  def finish(self, stage: str, seconds: float, **facts: Any) -> None:
    """Marks a stage as done."""
    if jax.process_index() == 0:
      record = {"seconds": round(seconds, 1), **facts}
      files.write_text_atomic(self.folder(stage) / "done.json", json.dumps(record, indent=2) + "\n")

  def _identity(self, stage: str) -> dict[str, Any]:
    """What a stage's result depends on: its config, the data, the seed, the stages before it."""
    experiment = self.experiment
    plain = {
      key: value
      for key, value in schema.to_plain(experiment.stages[stage]).items()
      if key not in FREE_KEYS
    }
    made_from = {}
    for name in config_lib.inputs_of(experiment, stage):
      done = self.done_record(name)
      if done is None:
        raise UserError(
          f"stage {stage} needs stage {name}, which is not finished in {self.root}: run without "
          "--stage, or that stage first."
        )
      made_from[name] = hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]
    config, data = experiment.stages[stage], None
    if isinstance(config, config_lib.AverageStage):
      for entry in config.of:
        path = Path(entry.partition("@")[0]) / "done.json"
        if "/" in entry and path.exists():  # of another run, which may change
          made_from[entry] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    else:
      data = schema.to_plain(config_lib.data_of(experiment, stage))
    identity = {
      "seed": experiment.seed,
      "data": data,
      "stage": plain,
      "made_from": made_from,
    }
    return json.loads(json.dumps(identity))  # tuples as JSON keeps them

  def _check_same(self, stage: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = config_lib.differences(before, now)
    # What a stage reads follows from its config, so an input that came or went is no fault itself.
    changed = {
      key: pair
      for key, pair in changed.items()
      if not (key.startswith("made_from.") and None in pair)
    }
    if not changed:
      return
    folder = self.folder(stage)
    older = [key.removeprefix("made_from.") for key in changed if key.startswith("made_from.")]
    if older:
      raise UserError(
        f"stage {stage} in {self.root} was made from an earlier result of stage "
        f"{', '.join(older)}: delete {folder} to make it again, or use another --workdir."
      )
    listed = "; ".join(f"{key}: {a!r} then, {b!r} now" for key, (a, b) in list(changed.items())[:5])
    raise UserError(
      f"stage {stage} in {self.root} was started with another config ({listed}): use that one, "
      f"another --workdir, or delete {folder} and those of the stages after it."
    )


def last_trained(work: Workdir, *names: str) -> str:
  """The last finished train or average stage of one of the tasks `names`.

  Raises:
    UserError: there is none.
  """
  for name in reversed(work.experiment.recipe):
    config = work.experiment.stages[name]
    if (
      isinstance(config, config_lib.TrainStage | config_lib.AverageStage)
      and config.task.name in names
      and work.done_record(name) is not None
    ):
      return name
  raise UserError(
    f"{work.root} has no finished stage that trains {' or '.join(names)}: run the experiment first."
  )


def _added(root: Path) -> dict[str, Any]:
  """The stages that commands have added to a run, as plain values."""
  path = root / ADDED_NAME
  return read_json(path) if path.exists() else {}


def _with_stage(
  experiment: config_lib.Experiment, name: str, plain: dict[str, Any]
) -> config_lib.Experiment:
  recipe = (*(other for other in experiment.recipe if other != name), name)
  values = schema.to_plain(dataclasses.replace(experiment, recipe=recipe))
  return config_lib.resolve({**values, "stages": {**values["stages"], name: plain}})


def read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError("it is no object")
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}): restore it or delete its folder.") from error
  return value
