"""Sharing the equal parts of an update changes its program's length, never its result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgen_jax.config import OptimizerConfig
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training.outline import outline


def _update(name):
  config = OptimizerConfig(name=name, lr=1e-2, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)
  optimizer = optimizer_lib.make_optimizer(config, 10)

  def update(params, state, gradients):
    norm = optax.tree.norm(gradients)
    updates, new = optimizer.update(gradients, state, params)
    keep = jnp.isfinite(norm)
    made = optax.apply_updates(params, updates), new
    return norm, jax.tree.map(lambda a, b: jax.lax.select(keep, a, b), made, (params, state))

  return optimizer, update


def _params(count):
  keys = jax.random.split(jax.random.key(0), count + 1)
  kernels = {f"dense_{i}": {"kernel": jax.random.normal(keys[i], (8, 12))} for i in range(count)}
  return {**kernels, "bias": jax.random.normal(keys[-1], (12,))}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_optimizer_gives_the_same_numbers(name):
  optimizer, update = _update(name)
  params = _params(3)
  gradients = jax.tree.map(jnp.sin, params)
  plain = shared = (params, optimizer.init(params))
  for _ in range(2):
    (norm, plain), (same, shared) = (
      jax.jit(function)(*state, gradients)
      for function, state in ((update, plain), (outline(update), shared))
    )
    np.testing.assert_array_equal(norm, same)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(shared), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_parameter_more_of_a_known_shape_adds_a_few_lines(name):
  def lines(function, count):
    optimizer, update = _update(name)
    params = jax.eval_shape(lambda: _params(count))
    state = jax.eval_shape(optimizer.init, params)
    text = jax.jit(function(update)).lower(params, state, params).as_text()
    return text.count("\n")

  each = (lines(outline, 12) - lines(outline, 4)) / 8
  assert each <= 12
  assert (lines(lambda f: f, 12) - lines(lambda f: f, 4)) / 8 > 4 * each


def test_results_that_are_inputs_or_constants_and_sums_come_through():
  def function(x, y):
    total = x.sum() + y.sum()
    return {"input": x, "constant": 3.0, "scaled": y / total, "number": total, "twice": (y, y)}

  x, y = jnp.arange(4.0), jnp.ones((2, 3))
  made, expected = jax.jit(outline(function))(x, y), function(x, y)
  assert jax.tree.structure(made) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, made, expected)
