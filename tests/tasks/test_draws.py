"""Random decisions of single examples."""

import jax
import numpy as np
import pytest

from mgen_jax.tasks import draws


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_decisions_are_those_of_jax(probability):
  keys = jax.random.split(jax.random.key(3), 512)
  wanted = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
  np.testing.assert_array_equal(draws.bernoulli(keys, probability), wanted)
