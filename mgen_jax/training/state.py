"""The training state: what a checkpoint holds, how it starts and where each leaf lives.

No random key lives here: randomness is a function of (seed, stream name, step, example), see
`stream_key` and `example_keys`.
"""

import dataclasses
import zlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgen_jax.parallel import rules
from mgen_jax.tasks.base import Task
from mgen_jax.training import guard, parameters, plateau, threefry


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes. `params`, `ema` and the moments are fp32, sharded alike."""

  step: jax.Array  # int32 []: steps done
  params: Any
  opt_state: Any
  ema: Any  # exponential moving average of those params that are trained; None: there is none
  history: guard.History  # of the last good steps: what a bad one is told by
  plateau: Any = None  # of a learning rate that follows the validation loss; see `plateau.py`


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a state holds besides parameters and moments."""

  frozen: frozenset[str] = frozenset()  # names of parameters that no step changes: not averaged
  ema: bool = True
  plateau: bool = False

  def averaged(self, params: Any) -> Any:
    """The part of a tree of parameters that is averaged."""
    return parameters.without(params, self.frozen) if self.ema else None


PLAIN = Contents()  # everything is trained and averaged


def averaged(state: TrainState) -> Any:
  """The parameters to validate, sample and start from: averaged where there is an average."""
  if state.ema is None:
    return state.params
  return parameters.unflatten(parameters.flatten(state.params) | parameters.flatten(state.ema))


def stream_key(seed: int, stream: str, step: int | jax.Array) -> jax.Array:
  """The key of a named random stream at a step."""
  key = jax.random.fold_in(jax.random.key(seed, impl=threefry.KEYS), _number(stream))
  return jax.random.fold_in(key, step)


def example_keys(
  seed: int, stream: str, step: int | jax.Array, examples: int | jax.Array
) -> jax.Array:
  """One key for each example of the global batch, the same on every mesh.

  Args:
    seed, stream, step: see `stream_key`.
    examples: how many there are, or which of them are meant, [n].
  """
  which = jnp.arange(examples) if isinstance(examples, int) else examples
  # Bit for bit what splitting the stream's key gives. All of it is done for each example, so that
  # the program needs no second Threefry for a single key, only the one of the examples' own draws.
  seeds = jnp.full(which.shape, np.int64(seed).astype(np.int32))  # the 32 bits that JAX reads of it
  keys = jax.vmap(lambda seed: jax.random.key(seed, impl=threefry.KEYS))(seeds)
  for data in (_number(stream), step, which):
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(data, which.shape))
  return keys


def _number(stream: str) -> np.uint32:
  return np.uint32(zlib.crc32(stream.encode()))


def init_params(task: Task, key: jax.Array) -> Any:
  """Random parameters, unboxed, fp32: the master weights."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), nn.unbox(task.init(key)))


def param_shapes(task: Task) -> Any:
  """Shapes and dtypes of the parameters; nothing is computed."""
  return jax.eval_shape(lambda: init_params(task, jax.random.key(0)))


def untrained_parts(task: Task) -> tuple[str, ...]:
  """The top-level parameters that a task has and never trains."""
  return tuple(name for name in getattr(task, "untrained", ()) if name in param_shapes(task))


def param_shardings(task: Task, mesh: jax.sharding.Mesh) -> Any:
  """Where each parameter lies."""
  return rules.tree_shardings(mesh, jax.eval_shape(lambda: task.init(jax.random.key(0))))


def create(
  task: Task,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  contents: Contents = PLAIN,
) -> TrainState:
  """The state of step 0 (to be called inside `jit` or `eval_shape`)."""
  params = init_params(task, key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, contents.averaged(params)),
    history=guard.no_history(),
    plateau=plateau.start() if contents.plateau else None,
  )


def shapes(
  task: Task, optimizer: optax.GradientTransformation, contents: Contents = PLAIN
) -> TrainState:
  """The state as shapes and dtypes; nothing is computed."""
  return jax.eval_shape(lambda: create(task, optimizer, jax.random.key(0), contents))


def shardings(
  task: Task,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  contents: Contents = PLAIN,
) -> TrainState:
  """The sharding of each leaf: moments and EMA lie where their parameter lies."""
  params = param_shardings(task, mesh)
  whole = rules.replicated(mesh)
  masked = optax.MaskedNode  # stands where a part of the optimizer does not take a parameter
  opt_state = optax.tree.map_params(
    optimizer,
    lambda leaf, sharding: leaf if isinstance(leaf, masked) else sharding,
    shapes(task, optimizer).opt_state,
    params,
    transform_non_params=lambda _: whole,
    is_leaf=lambda leaf: isinstance(leaf, masked),
  )
  history = jax.tree.map(lambda _: whole, jax.eval_shape(guard.no_history))
  return TrainState(
    step=whole,
    params=params,
    opt_state=opt_state,
    ema=contents.averaged(params),
    history=history,
    plateau=jax.tree.map(lambda _: whole, plateau.start()) if contents.plateau else None,
  )


def with_layout(shapes: Any, layout: Any) -> Any:
  """Shapes and shardings as one tree: what is to be restored, or compiled for."""
  return jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, layout
  )


def initialise(
  task: Task,
  optimizer: optax.GradientTransformation,
  layout: TrainState,
  seed: int,
  params: Any | None = None,
  contents: Contents = PLAIN,
) -> TrainState:
  """The state of step 0 on the devices.

  Args:
    task: what is learned.
    optimizer: its optimizer.
    layout: from `shardings`.
    seed: of the run.
    params: start from these parameters (already on the devices) and not from random ones.
    contents: what else the state holds; that of `layout`.
  """
  key = stream_key(seed, "init", 0)
  state = jax.jit(lambda: create(task, optimizer, key, contents), out_shardings=layout)()
  if params is not None:
    state = state.replace(params=params, ema=jax.tree.map(jnp.copy, contents.averaged(params)))
  return state
