"""A train stage of an experiment: gathers what the loop needs, and finds what it has made."""

from typing import Any

import jax
from absl import logging

from mgen_jax import schema, tasks
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.base import Task, frozen_shapes
from mgen_jax.training import inputs, loop, start
from mgen_jax.training import state as state_lib
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
  stream, latents = inputs.make_stream(work, name, task, start.origin_latents(work, stage))
  meta = {
    "experiment": work.experiment.name,
    "stage": name,
    "task": schema.to_plain(stage.task),
    "lora": schema.to_plain(stage.lora),
    "latents": latents,
    "buckets": [bucket.name for bucket in stream.buckets()],  # those that had examples
  }
  base = start.base(work, name, task, mesh)
  if base is not None:
    meta["base"] = base.reference
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
    load_initial=start.loader(work, name, task, mesh, latents),
    frozen=frozen,
    load_base=None if base is None else base.load,
  )
  work.finish(name, seconds, steps=stage.steps)


def load_trained(
  work: Workdir, name: str, mesh: jax.sharding.Mesh
) -> tuple[Task, Any, dict[str, Any]]:
  """The task of a train or average stage, its parameters (averaged over its steps, adapters
  merged) on `mesh`, and its checkpoint's meta.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged or of another model.
  """
  task = tasks.make(work.experiment.stages[name].task)
  return start.read(work.folder(name), mesh, task)
