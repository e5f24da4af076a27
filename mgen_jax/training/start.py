"""What a stage starts with: parameters of an earlier one, fitted to its model, or files of others.

Everything that a start changes is reported tensor by tensor in the log: what grew, what was added,
what was left out. Not here: from where a run that was interrupted continues (`loop.py`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from mgen_jax import schema, tasks
from mgen_jax.config import LoraConfig, TrainStage
from mgen_jax.errors import UserError
from mgen_jax.tasks.base import Task
from mgen_jax.training import inputs, lora, parameters
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import CheckpointError, Checkpoints
from mgen_jax.weights import files as weight_files
from mgen_jax.workdir import Workdir

Loader = Callable[[Any, Any], Any]  # (shapes, shardings) -> parameters


def loader(
  work: Workdir,
  name: str,
  task: Task,
  mesh: jax.sharding.Mesh,
  latents: Mapping[str, Any] | None,
) -> Loader | None:
  """What gives stage `name` its first parameters; None: they are random.

  Args:
    work: of the run.
    name: of the stage.
    task: that it trains.
    mesh: its devices.
    latents: statistics of the latents that it reads; None for media.
  """
  stage = work.experiment.stages[name]
  load = None
  if stage.init_from is not None:
    logging.info("stage %s starts from the averaged parameters of %s", name, stage.init_from)
    load = functools.partial(load_origin, work, name, task, mesh, latents)
  elif stage.init_weights is not None:
    logging.info("stage %s starts from %s", name, stage.init_weights)
    load = functools.partial(_load_weights, work, name, task)
  if hasattr(task, "pretrained"):
    load = functools.partial(_load_files, work, name, task, load)
  return load


def check_weights(work: Workdir, names: Sequence[str]) -> None:
  """Raises UserError where a stage that has not begun is to start from weights that are not there.

  Asked before the first stage, since it may be days until that one begins.
  """
  for name in names:
    stage = work.experiment.stages[name]
    if not isinstance(stage, TrainStage) or stage.init_weights is None:
      continue
    begun = (work.folder(name) / "checkpoints").exists()
    if not begun and not Path(stage.init_weights).exists():
      raise UserError(
        f"config.stages.{name}.init_weights is {stage.init_weights}, which is not there: name a "
        "safetensors file, or a folder that has one."
      )


def model_of(meta: Mapping[str, Any]) -> Task:
  """The task that a checkpoint's meta describes, with the adapters that it was trained with."""
  values = dict(meta["task"])
  task = tasks.make(schema.build(tasks.CONFIGS[values["name"]], values, "task"))
  return _with_adapters(task, meta)


def _with_adapters(task: Task, meta: Mapping[str, Any]) -> Task:
  return lora.wrap(task, schema.build(LoraConfig, meta.get("lora", {}), "lora"))


def read(
  folder: Path, mesh: jax.sharding.Mesh, task: Task | None = None, step: int | None = None
) -> tuple[Task, Any, dict[str, Any]]:
  """The model of a stage's folder, adapters merged: its task, averaged parameters and meta.

  Args:
    folder: of a train or an average stage, of any run.
    mesh: where the parameters go.
    task: as it is now configured; by default as it was when the checkpoint was written.
    step: of the checkpoint; the newest by default.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged or of another model.
  """
  with Checkpoints(str(folder / "checkpoints"), read_only=True) as checkpoints:
    meta = checkpoints.read_meta(step)
    saved = model_of(meta) if task is None else _with_adapters(task, meta)
    shapes, layout = state_lib.param_shapes(saved), state_lib.param_shardings(saved, mesh)
    reference = meta.get("base")
    if reference is not None:
      shapes, layout = ({lora.ADAPTERS: tree[lora.ADAPTERS]} for tree in (shapes, layout))
    params = checkpoints.restore_ema(shapes, layout, step)
  if reference is not None:
    params = {lora.BASE: _read_base(folder, reference, mesh, saved.task), **params}
  if isinstance(saved, lora.LoraTask):
    whole = state_lib.param_shardings(saved.task, mesh)
    return saved.task, jax.jit(saved.merged, out_shardings=whole)(params), meta
  return saved, params, meta


class Base(NamedTuple):
  """The base of a stage's adapters, where its checkpoints refer to it."""

  reference: dict[str, Any]  # "stage", "step" and "sha256": in the meta of the checkpoints
  load: Loader


def base(work: Workdir, name: str, task: Task, mesh: jax.sharding.Mesh) -> Base | None:
  """The base that stage `name` refers to; None: its checkpoints hold all that they need.

  Args:
    work: of the run.
    name: of a train stage.
    task: that it trains, without adapters.
    mesh: its devices.
  """
  stage = work.experiment.stages[name]
  if not stage.lora.rank or stage.lora.save_base or stage.init_from is None:
    return None
  shapes = state_lib.param_shapes(task)
  if state_lib.param_shapes(tasks.make(work.experiment.stages[stage.init_from].task)) != shapes:
    logging.info("stage %s has grown from %s: checkpoints hold its base", name, stage.init_from)
    return None
  if hasattr(task, "pretrained") and task.pretrained(tuple(shapes)):  # some of it is from files
    return None
  with Checkpoints(str(work.folder(stage.init_from) / "checkpoints"), read_only=True) as origin:
    step, digest = origin.digest()
  reference = {"stage": stage.init_from, "step": step, "sha256": digest}

  def load(shapes: Any, layout: Any) -> Any:
    del shapes
    return jax.tree.map(
      jax.device_put, _read_base(work.folder(name), reference, mesh, task), layout
    )

  return Base(reference, load)


def base_folder(folder: Path, reference: Mapping[str, Any]) -> Path:
  """Where the base that a checkpoint of the stage in `folder` refers to lies, once compared.

  Raises:
    CheckpointError: it is gone, or is another one by now.
  """
  origin = folder.parent / reference["stage"]
  kept = (
    f"the adapters in {folder} are of step {reference['step']} of {origin}: bring that checkpoint "
    "back (another time, set lora.save_base to keep the base with the adapters)."
  )
  try:
    with Checkpoints(str(origin / "checkpoints"), read_only=True) as checkpoints:
      found = checkpoints.digest(reference["step"])[1]
  except CheckpointError as error:
    raise CheckpointError(f"{kept} {error}") from error
  if found != reference["sha256"]:
    raise CheckpointError(f"what is there is another one by now; {kept}")
  return origin


def _read_base(
  folder: Path, reference: Mapping[str, Any], mesh: jax.sharding.Mesh, task: Task
) -> Any:
  return read(base_folder(folder, reference), mesh, task, reference["step"])[1]


def origin_latents(work: Workdir, stage: TrainStage) -> dict[str, Any] | None:
  """The statistics of the latents that the model a stage starts from has learned; None: it starts
  from none, or from one of media."""
  if stage.init_from is None:
    return None
  folder = work.folder(stage.init_from) / "checkpoints"
  with Checkpoints(str(folder), read_only=True) as checkpoints:
    return checkpoints.read_meta()["latents"]


def report(name: str, found: Any, fitted: Any) -> list[str]:
  """What a start changed, one line for each tensor; also logged.

  Args:
    name: of the stage.
    found: parameters of the earlier stage, or their shapes.
    fitted: those of this one, likewise.
  """
  before, after = parameters.flatten(found), parameters.flatten(fitted)
  lines = []
  for tensor in sorted(before.keys() | after.keys()):
    if tensor not in before:
      lines.append(f"added    {tensor} {tuple(after[tensor].shape)}")
    elif tensor not in after:
      lines.append(f"dropped  {tensor} {tuple(before[tensor].shape)}")
    elif before[tensor].shape != after[tensor].shape:
      shapes = f"{tuple(before[tensor].shape)} -> {tuple(after[tensor].shape)}"
      lines.append(f"changed  {tensor} {shapes}")
  same = len(before.keys() & after.keys()) - sum(line.startswith("changed") for line in lines)
  logging.info(
    "stage %s: %d tensors unchanged, %d added, dropped or reshaped", name, same, len(lines)
  )
  for line in lines:
    logging.info("  %s", line)
  return lines


def load_origin(
  work: Workdir,
  name: str,
  task: Task,
  mesh: jax.sharding.Mesh,
  latents: Mapping[str, Any] | None,
  shapes: Any,
  layout: Any,
) -> Any:
  """The averaged parameters of the stage that stage `name` starts from, fitted to its task."""
  stage = work.experiment.stages[name]
  before = origin_latents(work, stage)
  if latents is not None and before is not None:
    inputs.check_autoencoder(before, latents, f"what stage {stage.init_from} has learned")
  origin = tasks.make(work.experiment.stages[stage.init_from].task)
  found = state_lib.param_shapes(origin)
  fitted = jax.eval_shape(task.adapt, found, shapes)
  if fitted != shapes:
    faults = "; ".join(report(name, fitted, shapes)[:3])
    raise UserError(
      f"stage {name} cannot start from stage {stage.init_from}: their models differ in more than "
      f"what can grow from stage to stage ({faults}); give both the same task.model."
    )
  report(name, found, shapes)
  _, params, _ = read(work.folder(stage.init_from), mesh, origin)
  if found == shapes:
    return jax.tree.map(jax.device_put, params, layout)

  def fit(params):
    key = state_lib.stream_key(work.experiment.seed, "init", 0)
    return task.adapt(params, state_lib.init_params(task, key))

  return jax.jit(fit, out_shardings=layout)(params)


def _load_weights(work: Workdir, name: str, task: Task, shapes: Any, layout: Any) -> Any:
  """Parameters that start from a safetensors file of others; what it lacks is random."""
  flat = weight_files.read_tensors(work.experiment.stages[name].init_weights)
  key = state_lib.stream_key(work.experiment.seed, "init", 0)
  fresh = jax.device_get(jax.jit(functools.partial(state_lib.init_params, task))(key))
  made = task.from_weights(flat, fresh)
  found = jax.tree.map(lambda leaf: leaf.shape, made)
  if found != jax.tree.map(lambda leaf: leaf.shape, shapes):
    raise UserError(f"the weights of stage {name} do not fill its model: give both the same size.")
  return jax.tree.map(jax.device_put, made, layout)


def _load_files(
  work: Workdir, name: str, task: Task, load_rest: Loader | None, shapes: Any, layout: Any
) -> Any:
  """The parameters that stage `name` starts with: some from files, the rest from the stage before
  (`load_rest`) or random."""
  stage = work.experiment.stages[name]
  have: tuple[str, ...] = ()
  if stage.init_from is not None:
    have = tuple(state_lib.param_shapes(tasks.make(work.experiment.stages[stage.init_from].task)))
  found = task.pretrained(have)
  params = None if load_rest is None else load_rest(shapes, layout)
  if not found:
    return params
  if params is None:
    key = state_lib.stream_key(work.experiment.seed, "init", 0)
    params = jax.jit(lambda: state_lib.init_params(task, key), out_shardings=layout)()
  flat, places = parameters.flatten(params), parameters.flatten(layout)
  for path, value in found.items():
    if flat[path].shape != value.shape:
      raise UserError(
        f"stage {name}: {path} is {value.shape} in its file and {flat[path].shape} in the model."
      )
    flat[path] = jax.make_array_from_callback(
      value.shape, places[path], lambda index, value=value: np.asarray(value[index])
    )
  return parameters.unflatten(flat)
