"""Sums over whole arrays: exact enough to be compared between meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.parallel import cpu, sums
from mgen_jax.parallel import mesh as mesh_lib


def compiled(function, *arguments):
  """As a training step is: by XLA's own sums, where that is what steps take."""
  lowered = jax.jit(function).lower(*arguments)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  return lowered.compile(compiler_options=cpu.chosen_for(lowered, mesh))(*arguments)


@pytest.fixture(scope="module")
def positive():
  """No dimension is long, and every rounding error goes the same way or another by chance."""
  shape = (4, 8, 16, 32, 16)
  return np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)


def test_a_mean_is_exact_to_fp32_however_many_values(positive):
  exact = positive.astype(np.float64).mean()
  assert compiled(sums.mean, positive) == pytest.approx(exact, rel=3e-7)
  each = compiled(sums.mean_of_each, positive)
  np.testing.assert_allclose(each, positive.astype(np.float64).mean((1, 2, 3, 4)), rtol=3e-7)
  overall = compiled(lambda x: sums.mean_of_each(x).mean(), positive)
  assert overall == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3, 2)])
def test_means_have_the_gradients_of_means(shape):
  x = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))
  for ours, plain in ((sums.mean, jnp.mean), (sums.sum_of_squares, lambda x: (x * x).sum())):
    np.testing.assert_allclose(ours(x), plain(x), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-6)
  if shape:
    weight = jnp.arange(1.0, shape[0] + 1)
    ours = jax.grad(lambda x: weight @ sums.mean_of_each(x))(x)
    plain = jax.grad(lambda x: weight @ x.reshape(shape[0], -1).mean(1))(x)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_squares_are_summed_over_devices_without_gathering(positive):
  devices = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
  split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, "x"))
  x = jax.device_put(positive, split)
  made = jax.jit(sums.sum_of_squares).lower(x).compile()
  assert "all-gather" not in made.as_text() and "all-reduce" in made.as_text()
  assert made(x) == pytest.approx(np.square(positive.astype(np.float64)).sum(), rel=3e-7)
  half = jnp.ones((4096,), jnp.bfloat16)
  assert sums.sum_of_squares(half) == 4096  # summed in bf16 it would stop at 256
