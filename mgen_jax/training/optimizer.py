"""The optimizer of a stage: optax chains from a config. Nothing in them is ours but the order."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mgen_jax.config import OptimizerConfig
from mgen_jax.parallel import sums
from mgen_jax.training import parameters


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step, for a stage of `steps` steps (warm-up included)."""
  after = max(1, steps - config.warmup_steps)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.lr, after, alpha=config.end_factor)
  elif config.schedule == "linear":
    main = optax.linear_schedule(config.lr, config.lr * config.end_factor, after)
  elif config.schedule == "steps":
    main = _at_steps(config)
  else:  # that of "plateau" is lowered in the step, by what the state remembers
    main = optax.constant_schedule(config.lr)
  if not config.warmup_steps:
    return jax.jit(main)  # written once in the step's program: the metrics ask for it as well
  # The first step already moves: a warm-up that starts at 0 would waste it.
  first = config.lr / config.warmup_steps
  warmup = optax.linear_schedule(first, config.lr, config.warmup_steps - 1)
  return jax.jit(optax.join_schedules([warmup, main], [config.warmup_steps]))


def _at_steps(config: OptimizerConfig) -> optax.Schedule:
  """A rate that changes at fixed steps; called with the steps after the warm-up."""
  first_steps = jnp.asarray([step for step, _ in config.lr_steps])
  rates = jnp.asarray([config.lr, *(rate for _, rate in config.lr_steps)], jnp.float32)

  def schedule(step: Any) -> jax.Array:
    return rates[jnp.searchsorted(first_steps, step + config.warmup_steps, side="right")]

  return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The gradient transformation of a stage of `steps` steps."""
  parts = []
  if config.clip_norm:
    clip = clip_by_norm(config.clip_norm)
    if config.clip_from:
      clip = optax.conditionally_transform(clip, lambda step, **_: step >= config.clip_from)
    parts.append(clip)
  schedule = make_schedule(config, steps)
  if config.name == "muon":
    ratio = config.muon_lr / config.lr
    parts.append(
      optax.contrib.muon(
        lambda step: ratio * schedule(step),
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=functools.partial(matrix_dimensions, adam=config.adam),
      )
    )
  else:
    parts.append(
      optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
      )
    )
  return optax.chain(*parts)


def global_norm(tree: Any) -> jax.Array:
  """The Euclidean norm of all leaves together, fp32 []: that of optax, in half of the operations,
  which are for real numbers only."""
  return jnp.sqrt(sum(sums.sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)))


def clip_by_norm(limit: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, as one factor for all: a third of its work on each gradient."""

  def update(gradients, state, params=None):
    del params
    factor = limit / jnp.maximum(global_norm(gradients), limit)
    return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizers(
  config: OptimizerConfig,
  of_parts: Mapping[str, OptimizerConfig],
  untrained: Collection[str],
  steps: int,
  frozen: Collection[str] = (),
) -> optax.GradientTransformation:
  """One transformation for parameters whose parts (top-level names) are optimized each their own
  way: clipping, moments and schedule apart.

  Args:
    config: of all parts that are not named.
    of_parts: of those that are.
    untrained: parts that never change.
    steps: of the stage.
    frozen: names of parameters that do not change either (`parameters.matching`).
  """
  if not of_parts and not untrained and not frozen:
    return make_optimizer(config, steps)
  still = "/still"  # no name of a part: parts have no slash
  made = {name: make_optimizer(part, steps) for name, part in of_parts.items()}
  made |= dict.fromkeys((*untrained, still), optax.set_to_zero())
  rest = make_optimizer(config, steps)

  def labels(params: Any) -> Any:
    # By the first name on the way to a leaf; optax also asks about trees without any.
    def label(path: tuple, _: Any) -> str:
      if _name(path) in frozen:
        return still
      return path[0].key if path[0].key in made else ""

    return jax.tree_util.tree_map_with_path(label, params)

  return optax.partition({**made, "": rest}, labels)


def matrix_dimensions(params: Any, adam: Sequence[str] = ()) -> Any:
  """Which parameters are matrices, and along which axes, for Muon.

  Every leaf called "kernel": its last axis is the output, the others together are the input, and
  in a stack of layers ("layers", "spatial_layers") the first axis counts layers. Norms, biases and
  tables are none, nor what a pattern of `adam` fits (see `parameters.is_of`; optax also asks about
  trees of which parts are masked, so a pattern that fits none is refused in `program`).
  """

  def one(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    names = [getattr(entry, "key", None) for entry in path]
    if names[-1] != "kernel" or any(parameters.is_of(_name(path), each) for each in adam):
      return None
    first = 1 if any(str(name).endswith("layers") for name in names) else 0
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(one, params)


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
