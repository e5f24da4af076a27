"""The optimizer of a stage: an optax chain from a config. Nothing in it is ours but the order."""

import dataclasses
from typing import Literal

import jax
import optax

from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a clipped gradient and a schedule.

  The papers state learning rates (movie_gen 4.4) and neither betas, weight decay nor clipping:
  the defaults are what the field uses for transformers of this kind.
  """

  lr: float = 1e-4  # peak learning rate
  schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
  warmup_steps: int = 0  # linear, from 0
  end_factor: float = 0.0  # the schedule ends at lr * end_factor (cosine and linear)
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0  # decoupled; for matrices only (not norms, biases, tables of vectors)
  clip_norm: float = 1.0  # global norm of the gradient; 0 switches clipping off

  def __post_init__(self):
    for name in ("lr", "warmup_steps", "end_factor", "eps", "weight_decay", "clip_norm"):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name} is {getattr(self, name)}: it cannot be negative.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}: it must lie in [0, 1).")


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
