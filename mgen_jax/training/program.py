"""What a train stage runs: optimizer, shapes, shardings and the step, before anything is compiled.

No array is made here, so that a program can be planned for devices that are elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks.base import Task
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib


class Program(NamedTuple):
  """What a stage runs, before it is compiled."""

  optimizer: optax.GradientTransformation
  shapes: state_lib.TrainState  # of the state
  layout: state_lib.TrainState  # its shardings
  train_step: Callable[..., Any]  # from `step.make_train_step`

  def compile(self, rows_of: Mapping[Bucket, Any], frozen: Any = None) -> Mapping[Bucket, Any]:
    """The step of each bucket."""
    state = state_lib.with_layout(self.shapes, self.layout)
    return step_lib.compile_for(self.train_step, state, rows_of, frozen)


def make_program(task: Task, config: TrainStage, mesh: jax.sharding.Mesh, seed: int) -> Program:
  """The train step of a stage on a mesh, which may be one of devices that are not here."""
  optimizer = optimizer_lib.make_optimizers(
    config.optimizer, config.optimizers, state_lib.untrained_parts(task), config.steps
  )
  layout = state_lib.shardings(task, optimizer, mesh)
  train_step = step_lib.make_train_step(
    task,
    optimizer,
    optimizer_lib.make_schedule(config.optimizer, config.steps),
    layout,
    seed=seed,
    passes=lambda examples: config.passes(examples, mesh_lib.batch_shards(mesh)),
    ema_decay=config.ema_decay,
    spike=config.guard.spike,
  )
  return Program(optimizer, state_lib.shapes(task, optimizer), layout, train_step)


def batch_shapes(
  task: Task, batch_sizes: Mapping[Bucket, int], mesh: jax.sharding.Mesh
) -> dict[Bucket, dict[str, jax.ShapeDtypeStruct]]:
  """The batch of each bucket as shapes, dtypes and shardings, which follow the rules table."""
  return {
    bucket: {
      name: jax.ShapeDtypeStruct(
        spec.shape, spec.dtype, sharding=rules.sharding(mesh, spec.axes, spec.shape)
      )
      for name, spec in task.batch_spec(bucket, examples).items()
    }
    for bucket, examples in batch_sizes.items()
  }
