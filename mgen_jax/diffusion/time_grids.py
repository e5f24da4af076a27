"""Time grids of the samplers: increasing numbers from 0 (noise) to 1 (data), computed in numpy.

`steps` is the number of solver steps, so a grid has steps + 1 points.
"""

import numpy as np

from mgen_jax.errors import ConfigError


def linear(steps: int) -> np.ndarray:
  """Evenly spaced: [steps + 1]."""
  return np.linspace(0.0, 1.0, steps + 1)


def quadratic(steps: int) -> np.ndarray:
  """(i / steps)^2: fine near the noise, where the scene is decided. [steps + 1]."""
  return linear(steps) ** 2


def linear_quadratic(steps: int, linear_steps: int = 250) -> np.ndarray:
  """The first half of the steps as if there were `linear_steps`, the rest quadratic: [steps + 1].

  Movie Gen, section 3.4.2: 50 steps emulate 250 or 1000 linear ones. The paper prints no formula
  for the second half; this is the one whose slope is continuous at the joint (as in Mochi and
  LTX-Video). With L = steps // 2, Q = steps - L and tau = L / N:
    f(i) = i / N                                                    for i <= L,
    f(i) = tau + (i - L) / N + (1 - tau - Q / N) ((i - L) / Q)^2    for i > L.
  """
  if linear_steps < steps:
    raise ConfigError(
      f"linear_steps {linear_steps} is smaller than num_steps {steps}: the linear-quadratic grid "
      f"emulates a finer grid, so use linear_steps >= {steps}"
    )
  half = steps // 2
  rest = steps - half
  index = np.arange(steps + 1, dtype=np.float64)
  line = index / linear_steps
  over = np.maximum(index - half, 0.0) / rest
  grid = line + (1.0 - steps / linear_steps) * over**2
  grid[-1] = 1.0
  return grid


def time_grid(name: str, steps: int, linear_steps: int = 250) -> np.ndarray:
  """The grid called "linear", "quadratic" or "linear_quadratic", as float64 [steps + 1].

  Raises:
    ConfigError: an unknown name, or fewer than one step.
  """
  if steps < 1:
    raise ConfigError(f"num_steps {steps} is not positive: use at least 1")
  if name == "linear":
    return linear(steps)
  if name == "quadratic":
    return quadratic(steps)
  if name == "linear_quadratic":
    return linear_quadratic(steps, linear_steps)
  raise ConfigError(f"unknown time grid {name!r}: use 'linear', 'quadratic' or 'linear_quadratic'")
