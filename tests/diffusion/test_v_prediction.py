"""Diffusion with v-prediction: the schedule, the identities between x, e and v, DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.diffusion import v_prediction
from mgen_jax.errors import ConfigError


def _pair(shape=(5, 3)):
  return jax.random.normal(jax.random.key(0), (2, *shape))


def test_the_schedule_ends_in_pure_noise_and_starts_where_it_did():
  levels = v_prediction.signal_levels()
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  plain = np.sqrt(np.cumprod(1 - betas))
  assert levels.shape == (1000,)
  assert levels[-1] == 0.0  # zero terminal SNR; the plain schedule keeps some signal
  assert plain[-1] > 0.06
  assert levels[0] == pytest.approx(plain[0], rel=1e-12)
  assert (np.diff(levels) < 0).all()
  # Lin et al., algorithm 1: a shift and a scale of sqrt(alpha_bar).
  np.testing.assert_allclose(np.diff(levels) / np.diff(plain), levels[0] / (plain[0] - plain[-1]))


def test_data_and_noise_are_recovered_from_v():
  x, e = _pair()
  step = jnp.array([0, 1, 400, 998, 999])
  xs, v = v_prediction.add_noise(x, e, step), v_prediction.velocity(x, e, step)
  made = v_prediction.data_and_noise(xs, v, step)
  np.testing.assert_allclose(made[0], x, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made[1], e, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(xs[-1], e[-1])  # the last step shows nothing of the data
  np.testing.assert_array_equal(v[-1], -x[-1])  # and there v asks for the data alone


def test_v_is_the_derivative_along_the_angle():
  """Salimans and Ho, section 4: x_s = cos(p) x + sin(p) e, v = dx_s / dp."""
  x, e = _pair()
  step = jnp.array([3, 100, 500, 800, 990])
  a = v_prediction.signal_levels()[np.asarray(step)]
  angle = jnp.asarray(np.arccos(a), jnp.float32)
  path = lambda p: jnp.cos(p)[:, None] * x + jnp.sin(p)[:, None] * e  # noqa: E731
  at, derivative = jax.jvp(path, (angle,), (jnp.ones_like(angle),))
  np.testing.assert_allclose(v_prediction.add_noise(x, e, step), at, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(v_prediction.velocity(x, e, step), derivative, rtol=1e-4, atol=1e-5)


def test_examples_do_not_depend_on_how_a_batch_is_split():
  keys, x = jax.random.split(jax.random.key(0), 6), jnp.ones((6, 2, 3))
  whole = v_prediction.training_pair(keys, x)
  for part in (slice(0, 2), slice(2, 6)):
    pieces = v_prediction.training_pair(keys[part], x[part])
    jax.tree.map(lambda a, b, p=part: np.testing.assert_allclose(a[p], b, rtol=1e-6), whole, pieces)
  t = v_prediction.training_pair(jax.random.split(jax.random.key(1), 4000), jnp.ones((4000, 1)))[1]
  assert float(t.min()) >= 0.0 and float(t.max()) < 1.0
  assert abs(float(t.mean()) - 0.5) < 0.02  # uniform over the steps


def test_sampling_starts_at_the_last_step():
  np.testing.assert_array_equal(v_prediction.sampling_steps(5), [999, 799, 599, 399, 199])
  for count in (1, 3, 50, 1000):
    steps = v_prediction.sampling_steps(count)
    assert steps[0] == 999 and len(steps) == count and steps[-1] >= 0
    assert (np.diff(steps) < 0).all()
  with pytest.raises(ConfigError, match="num_steps 0"):
    v_prediction.sampling_steps(0)


@pytest.mark.parametrize("count", [1, 7, 50])
def test_ddim_finds_the_data_when_v_is_known(count):
  """With the true v of a single datum every number of steps gives that datum."""
  x, noise = _pair()
  seen = []

  def predict(xs, t):
    step = jnp.round((1.0 - t) * 1000).astype(jnp.int32) - 1
    jax.debug.callback(lambda t: seen.append(float(t[0])), t)
    a, b = v_prediction._levels(step, xs)
    e = (xs - a * x) / b
    return v_prediction.velocity(x, e, step)

  made = v_prediction.ddim(predict, noise, count)
  jax.effects_barrier()
  np.testing.assert_allclose(made, x, rtol=1e-3, atol=1e-4)
  assert min(seen) == pytest.approx(0.0, abs=1e-6) and len(seen) == count


def test_ddim_follows_its_formula():
  """x' = a' x + b' e (Song et al., equation 12 with sigma = 0), written out for three steps."""
  noise = _pair()[0]
  predict = lambda xs, t: 0.3 * xs + t[:, None]  # noqa: E731
  levels = v_prediction.signal_levels()
  xs = np.asarray(noise, np.float64)
  steps = [999, 666, 332]
  for step, after in zip(steps, [666, 332, None], strict=True):
    a, b = levels[step], np.sqrt(1 - levels[step] ** 2)
    v = 0.3 * xs + (1 - (step + 1) / 1000)
    data, e = a * xs - b * v, b * xs + a * v
    a, b = (1.0, 0.0) if after is None else (levels[after], np.sqrt(1 - levels[after] ** 2))
    xs = a * data + b * e
  np.testing.assert_array_equal(v_prediction.sampling_steps(3), steps)
  np.testing.assert_allclose(v_prediction.ddim(predict, noise, 3), xs, rtol=1e-4, atol=1e-5)
