"""Tokens that fill up a length, for every kernel alike: [b, n, ...], zeros (False) behind."""

import jax
import numpy as np

Array = jax.Array


def rounded(length: int, multiple: int) -> int:
  """The length, rounded up to a multiple."""
  return -(-length // multiple) * multiple


def longer(x: Array, length: int) -> Array:
  """[b, n, ...] -> [b, length, ...]; shorter in a program than `jnp.pad` is."""
  if x.shape[1] == length:
    return x
  more = [(0, length - x.shape[1] if dim == 1 else 0, 0) for dim in range(x.ndim)]
  return jax.lax.pad(x, np.zeros((), x.dtype), more)
