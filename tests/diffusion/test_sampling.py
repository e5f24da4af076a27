"""Time grids, solvers and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.diffusion import guidance, samplers, time_grids
from mgen_jax.errors import ConfigError

# movie_gen 3.3: 50 steps that stand for 250, from step 25 on.
REFERENCE = """0.1 0.10528 0.11312 0.12352 0.13648 0.152 0.17008 0.19072 0.21392 0.23968 0.268
0.29888 0.33232 0.36832 0.40688 0.448 0.49168 0.53792 0.58672 0.63808 0.692 0.74848 0.80752
0.86912 0.93328 1"""


def test_linear_quadratic_grid_has_the_reference_values():
  grid = time_grids.linear_quadratic(50, 250)
  np.testing.assert_allclose(grid[:25], np.arange(25) / 250, atol=1e-12)
  np.testing.assert_allclose(grid[25:], [float(x) for x in REFERENCE.split()], atol=1e-9)


@pytest.mark.parametrize("linear_steps", [250, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 25, 250])
def test_linear_quadratic_grid_follows_form_a(steps, linear_steps):
  """The closed form with a, b, c of the specification, for even and odd numbers of steps."""
  grid = time_grids.linear_quadratic(steps, linear_steps)
  assert grid.shape == (steps + 1,)
  assert grid[0] == 0.0 and grid[-1] == 1.0
  assert (np.diff(grid) > 0).all()
  half = steps // 2
  if half:
    rest, tau = steps - half, half / linear_steps
    d = half - tau * steps
    a, b, c = d / (half * rest**2), tau / half - 2 * d / rest**2, d * half / rest**2
    i = np.arange(half, steps + 1)
    np.testing.assert_allclose(grid[half:], a * i**2 + b * i + c, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "quadratic", "linear_quadratic"])
def test_every_grid_runs_from_noise_to_data(name):
  for steps in (1, 2, 9):
    grid = time_grids.time_grid(name, steps)
    assert grid[0] == 0.0 and grid[-1] == 1.0 and len(grid) == steps + 1
    assert (np.diff(grid) > 0).all()


def test_impossible_grids_name_the_fix():
  with pytest.raises(ConfigError, match="unknown time grid"):
    time_grids.time_grid("cosine", 4)
  with pytest.raises(ConfigError, match="num_steps 0"):
    time_grids.time_grid("linear", 0)
  with pytest.raises(ConfigError, match="use linear_steps >= 50"):
    time_grids.time_grid("linear_quadratic", 50, 25)


def _error(method, steps):
  """Of dx/dt = x + t from x(0) = 1, whose solution at 1 is 2e - 2."""
  velocity = lambda x, t: x + t[:, None]  # noqa: E731
  x = samplers.sample(velocity, jnp.ones((3, 2)), np.linspace(0, 1, steps + 1), method)
  return float(jnp.abs(x - (2 * np.e - 2)).max())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_at_their_order(method, order):
  ratio = _error(method, 8) / _error(method, 16)
  assert 2**order * 0.8 < ratio < 2**order * 1.25


@pytest.mark.parametrize("method", sorted(samplers.SOLVERS))
def test_straight_paths_need_one_step_of_any_grid(method):
  data, noise = jax.random.normal(jax.random.key(0), (2, 4, 3))
  for steps in (1, 5):
    made = samplers.sample(
      lambda x, t: data - noise, noise, time_grids.linear_quadratic(steps), method
    )
    np.testing.assert_allclose(made, data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(samplers.SOLVERS))
def test_the_model_is_evaluated_as_often_as_said(method):
  calls = []

  def velocity(x, t):
    jax.debug.callback(lambda t: calls.append(float(t[0])), t)
    return jnp.zeros_like(x)

  samplers.sample(velocity, jnp.ones((1, 2)), np.linspace(0, 1, 4), method).block_until_ready()
  jax.effects_barrier()
  assert len(calls) == 3 * samplers.EVALUATIONS[method]
  assert min(calls) >= 0.0 and max(calls) <= 1.0


def test_unknown_sampler_is_refused():
  with pytest.raises(ConfigError, match="unknown sampler"):
    samplers.sample(lambda x, t: x, jnp.ones((1, 2)), np.linspace(0, 1, 3), "dopri5")


def test_guidance_is_one_batch_of_both_branches():
  shapes = []

  def velocity(x, t, condition):
    shapes.append(x.shape)
    return condition["text"] * x + t[:, None]

  condition, empty = {"text": jnp.full((2, 1), 3.0)}, {"text": jnp.ones((2, 1))}
  x, t = jnp.ones((2, 5)), jnp.full((2,), 0.5)
  for scale in (0.0, 2.0, 7.5):
    u = guidance.guided(velocity, condition, empty, scale)(x, t)
    np.testing.assert_allclose(u, 1.5 + scale * 2.0, rtol=1e-6)
  assert set(shapes) == {(4, 5)}
  shapes.clear()
  np.testing.assert_allclose(guidance.guided(velocity, condition, empty, 1.0)(x, t), 3.5)
  assert shapes == [(2, 5)]
