"""Solvers of dX/dt = u(X, t) from noise at t = 0 to data at t = 1, as scans over a time grid."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgen_jax.errors import ConfigError

Array = jax.Array
Velocity = Callable[[Array, Array], Array]  # (x [B, ...], t [B]) -> u [B, ...]


def _euler(u: Velocity, x: Array, t: Array, step: Array) -> Array:
  return x + step * u(x, t)


def _midpoint(u: Velocity, x: Array, t: Array, step: Array) -> Array:
  middle = x + 0.5 * step * u(x, t)
  return x + step * u(middle, t + 0.5 * step)


def _heun(u: Velocity, x: Array, t: Array, step: Array) -> Array:
  first = u(x, t)
  second = u(x + step * first, t + step)
  return x + 0.5 * step * (first + second)


SOLVERS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2}  # of the model, for each step


def sample(velocity: Velocity, noise: Array, grid: Array, method: str = "euler") -> Array:
  """Integrates from `noise` along `grid`.

  Args:
    velocity: (x [B, ...], t [B]) -> u [B, ...]; guidance included.
    noise: X_0 [B, ...].
    grid: [steps + 1] increasing times, usually from 0 to 1.
    method: "euler" (the paper's choice), "midpoint" or "heun"; the latter two evaluate the model
      twice in a step.

  Returns:
    X_1 [B, ...] in fp32.

  Raises:
    ConfigError: an unknown method.
  """
  if method not in SOLVERS:
    raise ConfigError(f"unknown sampler {method!r}: use one of {', '.join(sorted(SOLVERS))}")
  grid = jnp.asarray(grid, jnp.float32)
  solver = SOLVERS[method]

  def u(x, t):
    return velocity(x, jnp.full(x.shape[:1], t, jnp.float32)).astype(jnp.float32)

  def one_step(x, times):
    return solver(u, x, times[0], times[1] - times[0]), None

  pairs = jnp.stack([grid[:-1], grid[1:]], -1)  # [steps, 2]
  return jax.lax.scan(one_step, noise.astype(jnp.float32), pairs)[0]
