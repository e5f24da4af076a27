"""The optimizer of a stage: an optax chain from a config. Nothing in it is ours but the order."""

import jax
import optax

from mgen_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step, for a stage of `steps` steps (warm-up included)."""
  after = max(1, steps - config.warmup_steps)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.lr, after, alpha=config.end_factor)
  elif config.schedule == "linear":
    main = optax.linear_schedule(config.lr, config.lr * config.end_factor, after)
  else:
    main = optax.constant_schedule(config.lr)
  if not config.warmup_steps:
    return main
  # The first step already moves: a warm-up that starts at 0 would waste it.
  first = config.lr / config.warmup_steps
  warmup = optax.linear_schedule(first, config.lr, config.warmup_steps - 1)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The gradient transformation of a stage of `steps` steps."""
  parts = []
  if config.clip_norm:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  parts.append(
    optax.adamw(
      make_schedule(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
  )
  return optax.chain(*parts)
