"""One optimizer step, as a pure function of (state, batch): the only code in the hot loop."""

import os
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import cpu, rules
from mgen_jax.tasks.base import Task, complete
from mgen_jax.training import guard, parameters
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.outline import outline
from mgen_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def objective(task: Task, step: jax.Array, frozen: Any = None) -> Callable[..., Any]:
  """What a step descends: (params, batch, keys) -> (loss, metrics).

  Of a task with several players it is the sum of their losses. Each of these has a gradient for its
  own part of the parameters only, so one backward pass serves them all.

  Args:
    task: what is learned.
    step: the losses of several players may depend on it.
    frozen: parameters that complete each batch on the way (`tasks.base.complete`); None: none.
  """
  if not hasattr(task, "loss_at"):
    return lambda params, batch, keys: task.loss(params, complete(task, frozen, batch), keys)

  def total(params, batch, keys):
    losses, metrics = task.loss_at(params, complete(task, frozen, batch), keys, step)
    if len(losses) > 1:
      metrics = metrics | {f"{player}_loss": loss for player, loss in losses.items()}
    return sum(losses.values()), metrics

  return total


def loss_and_gradients(
  loss: Callable[..., Any], params: Any, batch: Batch, keys: jax.Array, accumulate: int
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Mean of a `loss`, metrics and gradients over a batch, in `accumulate` passes of equal size.

  Every example has its own key (or number, of which `loss` makes it), so the split changes the
  order of summation and nothing else.
  """
  if accumulate == 1:
    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, keys)
    return total, metrics, gradients

  def share(*inputs):  # of the mean, so that the sum over the passes need not be divided
    return jax.tree.map(lambda x: x / accumulate, loss(*inputs))

  gradient = jax.value_and_grad(share, has_aux=True)

  @outline
  def rows_of(number, examples):
    # Rows i::accumulate form pass i, so that each device keeps the rows that it already holds.
    def one(x):  # [B, ...] -> [B / accumulate, ...]
      x = x.reshape(-1, accumulate, *x.shape[1:])
      start = 0, number, *[0] * (x.ndim - 2)
      sizes = x.shape[0], 1, *x.shape[2:]
      x = jax.lax.dynamic_slice(x, start, sizes, allow_negative_indices=False)
      return jax.lax.squeeze(x, [1])

    return jax.tree.map(one, examples)

  def one_pass(number, sums):
    (part, metrics), gradients = gradient(params, *rows_of(number, (batch, keys)))
    return jax.tree.map(jnp.add, sums, (part, metrics, gradients))

  first = jax.eval_shape(rows_of, jnp.int32(0), (batch, keys))
  (part, metrics), gradients = jax.eval_shape(gradient, params, *first)
  shapes = part, metrics, gradients
  zeros = outline(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
  return jax.lax.fori_loop(0, accumulate, one_pass, zeros())


def ema_decay(config: TrainStage) -> Callable[[jax.Array], jax.Array]:
  """Step -> decay of the moving average of a stage; see `TrainStage.ema`."""
  if config.ema == "constant":
    return lambda step: jnp.full_like(step, config.ema_decay)
  if config.ema == "power":
    # (1 - 1/n)^(1 + gamma) with n = step + 1: at the first step the average is the parameters.
    return lambda step: (step / (step + 1)) ** (1 + config.ema_gamma)
  return lambda step: jnp.minimum(config.ema_decay, (1 + step) / (10 + step))


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: TrainState,
  *,
  seed: int,
  passes: Callable[[int], int],
  ema_decay: Callable[[jax.Array], jax.Array],
  contents: state_lib.Contents = state_lib.PLAIN,
  spike: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """The step; the state is donated. Compiled once for each bucket by `compile_for`.

  Parameters, moments and averages are kept as they were when the loss or the gradient is not finite
  or a spike; the loop sees the "verdict" when it next reads metrics, with nothing spoilt.

  Args:
    task: what is learned.
    optimizer: from `make_optimizer`.
    schedule: its learning rate, for the metrics.
    layout: shardings of the state.
    seed: of the run; the stream "train" of it is used.
    passes: number of passes over equal parts of a batch, by its number of examples.
    ema_decay: of the parameters' moving average, by step (`ema_decay`).
    contents: of the state.
    spike: robust standard deviations above the running median that make one (`guard.judge`).

  Returns:
    step(state, batch) -> (state, metrics), all metrics scalars; of a task with frozen
    parameters step(state, batch, frozen).
  """

  def update(state: TrainState, loss: jax.Array, gradients: Any):
    norm = optimizer_lib.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    if contents.plateau:  # every update is the learning rate times something: so this scales it
      updates = jax.tree.map(lambda update: update * state.plateau.factor, updates)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if contents.ema:
      decay = ema_decay(state.step.astype(jnp.float32))
      ema = optax.incremental_update(contents.averaged(params), state.ema, 1 - decay)

    verdict, history = guard.judge(state.history, loss, norm, spike)
    good = verdict == guard.GOOD
    new = (params, opt_state, ema)
    old = (state.params, state.opt_state, state.ema)
    kept = jax.tree.map(lambda a, b: jax.lax.select(good, a, b), new, old)
    lr = jnp.asarray(schedule(state.step), jnp.float32)
    return norm, lr, verdict, (*kept, history)

  def drawn_objective(step: jax.Array, frozen: Any) -> Callable[..., Any]:
    inner = objective(task, step, frozen)

    def drawn(params, batch, numbers):  # of the examples in the batch
      keys = state_lib.example_keys(seed, "train", step, numbers)
      return inner(parameters.held(params, contents.frozen), batch, keys)

    return drawn

  def train_step(state: TrainState, batch: Batch, frozen: Any = None):
    examples = jax.tree.leaves(batch)[0].shape[0]
    loss, metrics, gradients = loss_and_gradients(
      drawn_objective(state.step, frozen),
      state.params,
      batch,
      jnp.arange(examples),
      passes(examples),
    )
    shardings = layout, layout.step, layout.params
    norm, lr, verdict, changed = outline(update, shardings)(state, loss, gradients)
    metrics = {
      **metrics,
      "loss": loss,
      "grad_norm": norm,
      "lr": lr * state.plateau.factor if contents.plateau else lr,
      "verdict": verdict,
    }
    return TrainState(state.step + 1, *changed, state.plateau), metrics

  mesh = layout.step.mesh
  return jax.jit(train_step, donate_argnums=0, out_shardings=(layout, rules.replicated(mesh)))


def compile_for(
  train_step: Callable[..., Any],
  state: TrainState,
  batches: Mapping[tuple[Bucket, int], Mapping[str, jax.ShapeDtypeStruct]],
  frozen: Any = None,
) -> dict[tuple[Bucket, int], Callable[..., tuple[TrainState, dict[str, jax.Array]]]]:
  """Compiles the step for every bucket and size of batch before the first one runs, side by side.

  So a rare bucket cannot stall a run in the middle, nothing can compile twice, and a program that
  does not fit the memory fails at once.

  Args:
    train_step: from `make_train_step`.
    state: shapes, dtypes and shardings.
    batches: likewise, of each bucket and number of examples.
    frozen: likewise, of the parameters that no step changes; None: the step takes none.

  Returns:
    The compiled step of each.
  """
  began = time.perf_counter()
  # Tracing holds Python's lock and depends on the mesh in use; only XLA's part runs side by side.
  extra = () if frozen is None else (frozen,)
  lowered = {b: train_step.lower(state, dict(batch), *extra) for b, batch in batches.items()}
  compiled = compile_side_by_side(lowered, state.step.sharding.mesh)
  seconds = time.perf_counter() - began
  logging.info("compiled the step for %d shapes of batches in %.1f s", len(compiled), seconds)
  return compiled


def compile_side_by_side(
  lowered: Mapping[Any, jax.stages.Lowered], mesh: jax.sharding.Mesh
) -> dict[Any, Any]:
  """Compiles several programs of a mesh at once, a thread each."""
  options = [cpu.chosen_for(program, mesh) for program in lowered.values()]
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    programs = pool.map(
      lambda program, chosen: program.compile(compiler_options=chosen), lowered.values(), options
    )
    return dict(zip(lowered, programs, strict=True))
