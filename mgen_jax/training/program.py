"""What a train stage runs: optimizer, shapes, shardings and the step, before anything is compiled.

No array is made here, so that a program can be planned for devices that are elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks.base import Task
from mgen_jax.training import lora, parameters, plateau
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib


class Program(NamedTuple):
  """What a stage runs, before it is compiled."""

  optimizer: optax.GradientTransformation
  shapes: state_lib.TrainState  # of the state
  layout: state_lib.TrainState  # its shardings
  train_step: Callable[..., Any]  # from `step.make_train_step`
  contents: state_lib.Contents  # of the state

  def compile(self, rows_of: Mapping[Any, Any], frozen: Any = None) -> Mapping[Any, Any]:
    """The step of each bucket, by the keys of `rows_of`."""
    state = state_lib.with_layout(self.shapes, self.layout)
    return step_lib.compile_for(self.train_step, state, rows_of, frozen)

  def follow(
    self, state: state_lib.TrainState, loss: np.float32, config: TrainStage
  ) -> state_lib.TrainState:
    """The state with a learning rate that has seen a validation loss, if it follows it."""
    if not self.contents.plateau:
      return state
    observe = jax.jit(plateau.observe, static_argnums=2, out_shardings=self.layout.plateau)
    return state.replace(plateau=observe(state.plateau, loss, config.optimizer.plateau))


def make_program(task: Task, config: TrainStage, mesh: jax.sharding.Mesh, seed: int) -> Program:
  """The train step of a stage on a mesh, which may be one of devices that are not here."""
  task = lora.wrap(task, config.lora)
  untrained = state_lib.untrained_parts(task)
  names = list(parameters.flatten(state_lib.param_shapes(task)))
  frozen = parameters.matching(config.frozen, names, "frozen") | parameters.matching(
    untrained, names, "untrained"
  )
  for part in (config.optimizer, *config.optimizers.values()):
    parameters.matching(part.adam, names, "optimizer.adam")
  contents = state_lib.Contents(
    frozen, ema=config.ema != "off", plateau=config.optimizer.schedule == "plateau"
  )
  optimizer = optimizer_lib.make_optimizers(
    config.optimizer, config.optimizers, untrained, config.steps, frozen
  )
  layout = state_lib.shardings(task, optimizer, mesh, contents)
  train_step = step_lib.make_train_step(
    task,
    optimizer,
    optimizer_lib.make_schedule(config.optimizer, config.steps),
    layout,
    seed=config.seeded(seed),
    passes=lambda examples: config.passes(examples, mesh_lib.batch_shards(mesh)),
    ema_decay=step_lib.ema_decay(config),
    contents=contents,
    spike=config.guard.spike,
  )
  shapes = state_lib.shapes(task, optimizer, contents)
  return Program(optimizer, shapes, layout, train_step, contents)


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
