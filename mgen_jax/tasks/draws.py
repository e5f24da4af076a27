"""Random decisions of single examples."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def bernoulli(keys: Array, probability: float) -> Array:
  """True with a probability, for each of the keys [B]: what `jax.random.bernoulli` gives.

  Its bounds have a type of their own, as those of normal numbers do, so that a program which draws
  both for each example has one function for it.
  """
  low, high = np.float32(0), np.float32(1)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, low, high))
  return uniform(keys) < probability
