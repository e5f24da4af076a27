"""A train stage of an experiment: gathers what the loop needs, and finds what it has made."""

import functools
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import traverse_util

from mgen_jax import schema, tasks
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.base import Task, frozen_shapes
from mgen_jax.training import inputs, loop
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.weights import files as weight_files
from mgen_jax.workdir import Workdir


def run(work: Workdir, name: str) -> None:
  """Trains stage `name`, or continues to; marks it as done.

  Raises:
    UserError: its inputs, checkpoint or numbers cannot be used (see `loop.train`).
    Interrupted: it was asked to stop, and has saved.
  """
  stage = work.experiment.stages[name]
  task = tasks.make(stage.task)
  if stage.optimizers and (unknown := set(stage.optimizers) - set(state_lib.param_shapes(task))):
    raise UserError(
      f"config.stages.{name}.optimizers names {', '.join(sorted(unknown))}, which the task has no "
      f"parameters for: {', '.join(state_lib.param_shapes(task))}."
    )
  mesh = mesh_lib.make_mesh(stage.mesh)
  stream, latents = inputs.make_stream(work, name, task)
  meta = {
    "experiment": work.experiment.name,
    "stage": name,
    "task": schema.to_plain(stage.task),
    "latents": latents,
    "buckets": [bucket.name for bucket in stream.batch_sizes],  # those that had examples
  }
  load_initial = None
  if stage.init_from is not None:
    logging.info("stage %s starts from the averaged parameters of %s", name, stage.init_from)
    load_initial = functools.partial(_load_origin, work, name, task, mesh, latents)
  elif stage.init_weights is not None:
    logging.info("stage %s starts from %s", name, stage.init_weights)
    load_initial = functools.partial(_load_weights, work, name, task)
  if hasattr(task, "pretrained"):
    load_initial = functools.partial(_load_files, work, name, task, load_initial)
  frozen = None
  if frozen_shapes(task, None) is not None:
    logging.info("stage %s reads its frozen encoders", name)
    frozen = task.load_frozen(mesh)
  seconds = loop.train(
    task,
    stage,
    stream,
    mesh,
    name=name,
    seed=work.experiment.seed,
    folder=str(work.folder(name)),
    meta=meta,
    load_initial=load_initial,
    frozen=frozen,
  )
  work.finish(name, seconds, steps=stage.steps)


def load_trained(
  work: Workdir, name: str, mesh: jax.sharding.Mesh
) -> tuple[Task, Any, dict[str, Any]]:
  """The task of a train stage, its averaged parameters on `mesh`, and its checkpoint's meta.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged or of another model.
  """
  task = tasks.make(work.experiment.stages[name].task)
  layout = state_lib.param_shardings(task, mesh)
  params = _load_ema(work.folder(name), state_lib.param_shapes(task), layout)
  with Checkpoints(str(work.folder(name) / "checkpoints"), read_only=True) as checkpoints:
    return task, params, checkpoints.read_meta()


def _load_origin(
  work: Workdir,
  name: str,
  task: Task,
  mesh: jax.sharding.Mesh,
  latents: dict[str, Any] | None,
  shapes: Any,
  layout: Any,
) -> Any:
  """The averaged parameters of the stage that stage `name` starts from, fitted to its task."""
  stage = work.experiment.stages[name]
  folder = work.folder(stage.init_from)
  origin = tasks.make(work.experiment.stages[stage.init_from].task)
  found = state_lib.param_shapes(origin)
  with Checkpoints(str(folder / "checkpoints"), read_only=True) as checkpoints:
    before = checkpoints.read_meta()["latents"]
  if latents is not None and before is not None:
    inputs.check_autoencoder(before, latents, f"what stage {stage.init_from} has learned")
  if found == shapes:
    return _load_ema(folder, shapes, layout)
  if jax.eval_shape(task.adapt, found, shapes) != shapes:
    raise UserError(
      f"stage {name} cannot start from stage {stage.init_from}: their models differ in more than "
      "what can grow from stage to stage; give both the same task.model."
    )
  params = _load_ema(folder, found, state_lib.param_shardings(origin, mesh))

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
  work: Workdir, name: str, task: Task, load_rest: Any, shapes: Any, layout: Any
) -> Any:
  """The parameters that stage `name` starts with: some from files, the rest from the stage before
  (`load_rest`) or random."""
  stage = work.experiment.stages[name]
  have = ()
  if stage.init_from is not None:
    have = tuple(state_lib.param_shapes(tasks.make(work.experiment.stages[stage.init_from].task)))
  found = task.pretrained(have)
  params = None if load_rest is None else load_rest(shapes, layout)
  if not found:
    return params
  if params is None:
    key = state_lib.stream_key(work.experiment.seed, "init", 0)
    params = jax.jit(lambda: state_lib.init_params(task, key), out_shardings=layout)()
  flat, places = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, layout))
  for path, value in found.items():
    if flat[path].shape != value.shape:
      raise UserError(
        f"stage {name}: {path} is {value.shape} in its file and {flat[path].shape} in the model."
      )
    flat[path] = jax.make_array_from_callback(
      value.shape, places[path], lambda index, value=value: value[index]
    )
  return traverse_util.unflatten_dict(flat, sep="/")


def _load_ema(folder: Path, shapes: Any, layout: Any) -> Any:
  with Checkpoints(str(folder / "checkpoints"), read_only=True) as checkpoints:
    return checkpoints.restore_ema(shapes, layout)
