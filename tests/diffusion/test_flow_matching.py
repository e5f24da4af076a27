"""Flow matching: the path, its velocity, and randomness that belongs to examples."""

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.diffusion import flow_matching


def _keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def test_path_starts_at_noise_and_ends_at_data():
  x1, x0 = jnp.full((2, 3), 4.0), jnp.full((2, 3), -1.0)
  start = flow_matching.interpolate(x1, x0, jnp.zeros(2))
  end = flow_matching.interpolate(x1, x0, jnp.ones(2))
  np.testing.assert_array_equal(start, x0)
  np.testing.assert_allclose(end, x1 + 1e-5 * x0, rtol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
  x1, x0 = jax.random.normal(jax.random.key(0), (2, 4, 5))
  t = jnp.array([0.1, 0.5, 0.7, 0.9])
  _, derivative = jax.jvp(lambda t: flow_matching.interpolate(x1, x0, t), (t,), (jnp.ones_like(t),))
  np.testing.assert_allclose(derivative, flow_matching.velocity(x1, x0), rtol=1e-5, atol=1e-6)


def test_data_is_recovered_from_the_velocity():
  x1, x0 = jax.random.normal(jax.random.key(0), (2, 4, 5))
  t = jnp.array([0.0, 0.3, 0.7, 1.0])
  xt = flow_matching.interpolate(x1, x0, t)
  back = flow_matching.data_from_velocity(xt, flow_matching.velocity(x1, x0), t)
  np.testing.assert_allclose(back, x1, rtol=1e-5, atol=1e-5)


def test_examples_do_not_depend_on_how_a_batch_is_split():
  keys, x1 = _keys(6), jax.random.normal(jax.random.key(1), (6, 2, 3))
  whole = flow_matching.training_pair(keys, x1)
  for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
    pieces = flow_matching.training_pair(keys[part], x1[part])
    jax.tree.map(lambda a, b, p=part: np.testing.assert_array_equal(a[p], b), whole, pieces)


def test_times_are_logit_normal_and_independent_of_the_noise():
  t = flow_matching.draw_time(_keys(4000), mean=-1.0, std=0.5)
  logit = jnp.log(t) - jnp.log1p(-t)
  assert abs(float(logit.mean()) + 1.0) < 0.05
  assert abs(float(logit.std()) - 0.5) < 0.05
  xt, t, target = flow_matching.training_pair(_keys(4000), jnp.zeros((4000, 1)))
  noise = -target[:, 0] / (1.0 - flow_matching.SIGMA_MIN)
  assert abs(np.corrcoef(noise, t)[0, 1]) < 0.05
  assert abs(float(noise.std()) - 1.0) < 0.05
  assert xt.dtype == t.dtype == target.dtype == jnp.float32


def test_loss_is_fp32_for_each_example():
  loss = flow_matching.loss(jnp.ones((3, 2, 2), jnp.bfloat16), jnp.zeros((3, 2, 2)))
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, np.ones(3))
