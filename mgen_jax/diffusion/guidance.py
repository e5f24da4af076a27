"""Classifier-free guidance of a velocity: u = u_0 + w (u_1 - u_0)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def combine(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
  """u_0 + w (u_1 - u_0); a scale of 1 is the conditional velocity, 0 the unconditional one."""
  return unconditional + scale * (conditional - unconditional)


def guided(
  velocity: Callable[[Array, Array, Any], Array],
  condition: Any,
  no_condition: Any,
  scale: Array | float,
  *,
  channels: int | None = None,
  gather: Callable[[Any], Any] = lambda tree: tree,
  spread: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[[Array, Array], Array]:
  """A velocity with guidance, its two branches evaluated as one batch of twice the size.

  Args:
    velocity: (x [B, ...], t [B], condition) -> u [B, ...].
    condition: tree of arrays with a leading B.
    no_condition: the same tree for the empty condition.
    scale: w. A Python 1.0 (or 1) drops the unconditional branch.
    channels: only so many of the first channels (the last axis) are guided, the others are those of
      the conditional branch: Latte guides the noise and not the variance. None: all.
    gather: where on the mesh the arrays of B examples lie, as a constraint on a tree of them.
    spread: likewise for the 2B of both branches, of which the first B are conditional.

  Returns:
    (x [B, ...], t [B]) -> u [B, ...].
  """
  if isinstance(scale, (int, float)) and scale == 1:
    return lambda x, t: velocity(x, t, condition)

  def join(a, b):
    return spread(jnp.concatenate([gather(a), gather(b)]))

  both = jax.tree.map(join, condition, no_condition)

  def u(x, t):
    out = velocity(join(x, x), join(t, t), both)
    conditional, unconditional = jnp.split(out, 2)
    made = combine(conditional[..., :channels], unconditional[..., :channels], scale)
    if channels is not None:
      made = jnp.concatenate([made, conditional[..., channels:]], -1)
    return gather(made)

  return u
