"""Keys of our own give the numbers that JAX's give, on every path, in shorter programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.training import state, threefry

DRAWS = {
  "none": lambda key: jax.random.normal(key, (0, 3)),
  "one": lambda key: jax.random.normal(key),
  "row": lambda key: jax.random.normal(key, (7,)),
  "video": lambda key: jax.random.normal(key, (2, 3, 5, 4)),
  "half": lambda key: jax.random.normal(key, (3, 5), jnp.bfloat16),
  "bytes": lambda key: jax.random.bits(key, (9,), jnp.uint8),
  "coins": lambda key: jax.random.bernoulli(key, 0.1, (50,)),
  "whole": lambda key: jax.random.randint(key, (50,), 0, 100),
  "order": lambda key: jax.random.permutation(key, 50),
  "cut": lambda key: jax.random.truncated_normal(key, -2, 2, (4, 6)),
  "folded": lambda key: jax.random.key_data(jax.random.fold_in(key, 1_550_247_075)),
  "two": lambda key: jax.random.key_data(jax.random.split(key)),
  "many": lambda key: jax.random.key_data(jax.random.split(key, (3, 4))),
  "each": lambda key: jax.vmap(jax.random.normal)(jax.random.split(key, 6)),
  "nested": lambda key: jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (3, 2))))(
    jax.vmap(jax.random.split)(jax.random.split(key, 3))
  ),
  "steps": lambda key: jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(
    jnp.arange(5)
  ),
}


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
@pytest.mark.parametrize("name", sorted(DRAWS))
def test_the_numbers_are_those_of_jax(name, seed):
  draw = DRAWS[name]
  expected = draw(jax.random.key(seed, impl="threefry2x32"))
  np.testing.assert_array_equal(draw(jax.random.key(seed, impl=threefry.KEYS)), expected)


def test_seeds_that_are_traced_give_the_same_keys():
  make = jax.vmap(lambda seed: jax.random.key_data(state.stream_key(seed, "sample", 0)))
  expected = [jax.random.key_data(state.stream_key(seed, "sample", 0)) for seed in range(3)]
  np.testing.assert_array_equal(make(jnp.arange(3)), jnp.stack(expected))


def test_a_program_has_the_rounds_once_for_each_shape():
  def lines(count):
    def draw(step):
      keys = state.example_keys(0, "train", step, 8)
      for _ in range(count):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
      return jax.random.key_data(keys)

    return jax.jit(draw).lower(jnp.zeros((), jnp.int32)).as_text().count("\n")

  assert (lines(12) - lines(4)) / 8 < 20


def test_more_numbers_than_a_key_has_are_refused():
  with pytest.raises(ValueError, match="split it"):
    threefry._draw(jnp.zeros(2, jnp.uint32), (1 << 16, 1 << 16))
