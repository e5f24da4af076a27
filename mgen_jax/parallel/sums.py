"""Sums over whole arrays: losses, norms of gradients.

XLA's CPU backend makes the sum of an array, unless one of its dimensions is long, as one chain of
additions on one core: a mean of 65,536 squares is then off by 1e-5, by more on one device than on
eight, and each addition waits for the one before. Elsewhere all of these are plain sums.
"""

import jax
import jax.numpy as jnp

from mgen_jax.parallel import mesh as mesh_lib

Array = jax.Array


def mean(x: Array) -> Array:
  """The mean of all values: [...] -> []."""
  return _mean(x, 0)


def mean_of_each(x: Array) -> Array:
  """The mean of all values of each example: [B, ...] -> [B]."""
  return _mean(x, 1)


def _mean(x: Array, first: int) -> Array:
  """Over all axes from the first, on a CPU in two chains that XLA is kept from making one again."""
  axes = tuple(range(first, x.ndim))
  if mesh_lib.platform() != "cpu" or len(axes) < 2:
    return x.mean(axes)
  inner = axes[len(axes) // 2 :]
  return jax.lax.optimization_barrier(x.mean(inner)).mean(axes[: len(axes) // 2])


def sum_of_squares(x: Array) -> Array:
  """The sum of the squares of all values, in fp32 at least: [...] -> []."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if mesh_lib.platform() != "cpu":
    return jnp.sum(jnp.square(x.astype(wide)))
  axes = tuple(range(x.ndim))
  return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), preferred_element_type=wide)
