"""Gaussian diffusion in discrete steps, v-prediction, zero terminal SNR: the paper's ablation arm.

Movie Gen (section 3.6.2) compares flow matching with the diffusion of Emu Video: v-prediction
(Salimans and Ho, 2022) on a schedule that is rescaled to end in pure noise (Lin et al., 2024).

Legend: x data, e ~ N(0, I) noise, s in 0 .. STEPS - 1 the step, STEPS - 1 = pure noise,
  a_s = sqrt(alpha_bar_s), b_s = sqrt(1 - alpha_bar_s)     the levels of signal and noise,
  x_s = a_s x + b_s e                                      the noisy data,
  v_s = a_s e - b_s x                                      what the model predicts, so that
  x = a_s x_s - b_s v_s  and  e = b_s x_s + a_s v_s.
The model sees t = 1 - (s + 1) / STEPS: as in flow matching, t = 0 is noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.diffusion.flow_matching import draw_noise
from mgen_jax.errors import ConfigError

Array = jax.Array

STEPS = 1000
# Of latent diffusion (Rombach et al., 2022): the square roots of beta are evenly spaced.
BETA_START, BETA_END = 0.00085, 0.012


def signal_levels() -> np.ndarray:
  """a_s for all steps, float64 [STEPS], falling to exactly 0 (Lin et al., algorithm 1)."""
  betas = np.linspace(BETA_START**0.5, BETA_END**0.5, STEPS) ** 2
  levels = np.sqrt(np.cumprod(1.0 - betas))
  return (levels - levels[-1]) * levels[0] / (levels[0] - levels[-1])


def _levels(step: Array, like: Array) -> tuple[Array, Array]:
  """a_s and b_s of steps [B], with the rank of `like`."""
  a = signal_levels()
  pair = np.stack([a, np.sqrt(1.0 - a**2)]).astype(np.float32)
  a, b = jnp.asarray(pair)[:, step]
  shape = step.shape + (1,) * (like.ndim - step.ndim)
  return a.reshape(shape), b.reshape(shape)


def time_of(step: Array) -> Array:
  """t of steps: what the model is told."""
  return 1.0 - (step.astype(jnp.float32) + 1.0) / STEPS


def step_of(t: Array) -> Array:
  """The step whose t comes nearest, int32: the inverse of `time_of`."""
  return jnp.clip(jnp.round((1.0 - t) * STEPS - 1.0), 0, STEPS - 1).astype(jnp.int32)


def add_noise(x: Array, e: Array, step: Array) -> Array:
  """x_s of data x [B, ...], noise e [B, ...] and steps [B]."""
  a, b = _levels(step, x)
  return a * x + b * e


def velocity(x: Array, e: Array, step: Array) -> Array:
  """v_s of data, noise and steps."""
  a, b = _levels(step, x)
  return a * e - b * x


def data_and_noise(xs: Array, v: Array, step: Array) -> tuple[Array, Array]:
  """The data and the noise that a predicted v points to."""
  a, b = _levels(step, xs)
  return a * xs - b * v, b * xs + a * v


def training_pair(keys: Array, x: Array) -> tuple[Array, Array, Array]:
  """Draws noise and a step, uniformly, for each example.

  Args:
    keys: [B] typed keys.
    x: data [B, ...].

  Returns:
    x_s [B, ...], t [B] and the target v_s [B, ...], all fp32.
  """
  keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)  # [B, 2]
  x = x.astype(jnp.float32)
  step = jax.vmap(lambda key: jax.random.randint(key, (), 0, STEPS))(keys[:, 0])
  e = draw_noise(keys[:, 1], x.shape[1:])
  return add_noise(x, e, step), time_of(step), velocity(x, e, step)


def sampling_steps(count: int) -> np.ndarray:
  """Evenly spaced steps from STEPS - 1, pure noise, downwards: int [count].

  "Trailing" spacing: a sampler that did not start at the last step would be told that pure noise
  holds some signal (Lin et al., section 3.3).

  Raises:
    ConfigError: fewer than 1 or more than STEPS.
  """
  if not 1 <= count <= STEPS:
    raise ConfigError(f"num_steps {count} cannot be used: diffusion has 1 to {STEPS} steps")
  return np.round(STEPS - np.arange(count) * (STEPS / count)).astype(np.int32) - 1


def ddim(predict: Callable[[Array, Array], Array], noise: Array, count: int) -> Array:
  """Deterministic DDIM (Song et al., 2021, eta = 0) as a scan over `count` steps.

  Args:
    predict: (x_s [B, ...], t [B]) -> v [B, ...]; guidance included.
    noise: [B, ...].
    count: of steps.

  Returns:
    Data [B, ...] in fp32.
  """
  steps = sampling_steps(count)
  levels = signal_levels()[np.append(steps[1:], 0)]
  levels[-1] = 1.0  # the last step goes to the data itself
  after = np.stack([levels, np.sqrt(1.0 - levels**2)], -1).astype(np.float32)  # [count, 2]

  def one_step(xs, step_and_after):
    step, (a, b) = step_and_after
    step = jnp.full(xs.shape[:1], step)
    x, e = data_and_noise(xs, predict(xs, time_of(step)).astype(jnp.float32), step)
    return a * x + b * e, None

  return jax.lax.scan(one_step, noise.astype(jnp.float32), (steps, after))[0]
