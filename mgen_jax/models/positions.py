"""Positions of the backbone's patches: learnable tables that may grow, and rotary angles.

Not here: where they enter a layer (see `backbone`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mgen_jax.errors import ConfigError

Array = jax.Array

AXES = ("frames", "height", "width")
GROWTH = ("interpolate", "extend")


def grid_sum(tables: Sequence[Array]) -> Array:
  """The factorised positions of a grid: tables [t, D], [h, D], [w, D] -> [1, t*h*w, D]."""
  shape = *(table.shape[0] for table in tables), tables[0].shape[-1]
  # In one operation each way, unlike what broadcasting does on its own.
  time, height, width = (
    jax.lax.broadcast_in_dim(table, shape, (axis, 3)) for axis, table in enumerate(tables)
  )
  return (time + height + width).reshape(1, -1, shape[-1])


def rotary_angles(grid: Sequence[int], head_dim: int, theta: float) -> Array:
  """Rotary angles in three dimensions: [t*h*w, head_dim / 2] fp32.

  The pairs of a head are divided into three parts, for time, height and width; what thirds leave
  over goes to time. Pair i of the P pairs of an axis turns by `index * theta^(-i / P)`.
  """
  half = head_dim // 2
  parts = (half - 2 * (half // 3), half // 3, half // 3)
  angles = []
  for axis, (n, pairs) in enumerate(zip(grid, parts, strict=True)):
    frequencies = theta ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
    turned = jnp.arange(n, dtype=jnp.float32)[:, None] * frequencies  # [n, pairs]
    shape = [1, 1, 1, pairs]
    shape[axis] = n
    angles.append(jnp.broadcast_to(turned.reshape(shape), (*grid, pairs)))
  return jnp.concatenate(angles, -1).reshape(-1, half)


def line_angles(n: int, head_dim: int, theta: float) -> Array:
  """Rotary angles along one axis: [n, head_dim / 2] fp32."""
  pairs = head_dim // 2
  frequencies = theta ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
  return jnp.arange(n, dtype=jnp.float32)[:, None] * frequencies


def rotate(x: Array, angles: Array) -> Array:
  """Turns the pairs (i, i + head_dim / 2) of x [B, N, H, head_dim] by angles [N, head_dim / 2].

  In fp32; the result has the dtype of `x`. The product of two rotated vectors depends on the
  difference of their positions only.
  """
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # [N, 1, head_dim / 2]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return out.astype(x.dtype)


def grow(table: Array, fresh: Array, method: str) -> Array:
  """A trained position table for a model with more positions (Movie Gen 3.1.3 grows twice).

  The paper does not say how its tables are expanded.

  Args:
    table: trained, [n, D].
    fresh: a table of the larger model at its start, [m, D] with m >= n.
    method: "interpolate" stretches the trained table over all m positions (finer patches of the
      same picture); "extend" keeps position i where it was and takes the others from `fresh`
      (more patches of the same size). A table of one position has nothing to interpolate between
      and is extended.

  Returns:
    [m, D].

  Raises:
    ConfigError: the table would shrink, or the method is unknown.
  """
  if method not in GROWTH:
    raise ConfigError(f"unknown position_growth {method!r}: use one of {', '.join(GROWTH)}")
  if fresh.shape[0] < table.shape[0]:
    raise ConfigError(
      f"a position table of {table.shape[0]} cannot shrink to {fresh.shape[0]}: raise max_positions"
    )
  if fresh.shape[0] == table.shape[0]:
    return table
  if method == "interpolate" and table.shape[0] > 1:
    return jax.image.resize(table, fresh.shape, "linear")
  return fresh.at[: table.shape[0]].set(table)
