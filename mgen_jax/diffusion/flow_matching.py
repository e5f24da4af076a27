"""Flow matching with the optimal-transport path (Movie Gen, section 3.1.2).

Legend: X_1 data, X_0 ~ N(0, I) noise, t in [0, 1] with 0 = noise and 1 = data,
  X_t = t X_1 + (1 - (1 - sigma_min) t) X_0          the point on the path,
  V_t = dX_t/dt = X_1 - (1 - sigma_min) X_0          the velocity, which the model predicts.

Randomness comes from one key for each example, so a batch gives the same values however it is
split into microbatches or over devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.parallel import sums

Array = jax.Array

SIGMA_MIN = 1e-5


def draw_time(keys: Array, *, mean: float = 0.0, std: float = 1.0) -> Array:
  """Logit-normal times: t = sigmoid(z), z ~ N(mean, std^2). Keys [B] -> [B] fp32."""
  z = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
  return jax.nn.sigmoid(mean + std * z)


def share_below(t: np.ndarray, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
  """How many of the times that `draw_time` draws lie below t, 0 to 1; t in [0, 1]."""
  t = np.asarray(t, np.float64)
  with np.errstate(divide="ignore"):
    z = (np.log(t) - np.log1p(-t) - mean) / std  # -inf at 0 and inf at 1
  return np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)))(z)


def draw_noise(keys: Array, shape: tuple[int, ...]) -> Array:
  """Standard normal noise [B, *shape] in fp32, one key [B] for each example."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _expand(t: Array, like: Array) -> Array:
  return t.astype(jnp.float32).reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x1: Array, x0: Array, t: Array) -> Array:
  """X_t of data x1 [B, ...], noise x0 [B, ...] and times t [B]."""
  t = _expand(t, x1)
  return t * x1 + (1.0 - (1.0 - SIGMA_MIN) * t) * x0


def velocity(x1: Array, x0: Array) -> Array:
  """V_t of data and noise; it does not depend on t."""
  return x1 - (1.0 - SIGMA_MIN) * x0


def data_from_velocity(xt: Array, v: Array, t: Array) -> Array:
  """The X_1 that a predicted velocity points to: the estimate of the clean data at time t."""
  t = _expand(t, xt)
  # From the two definitions: X_t = t X_1 + s X_0 with s = 1 - (1 - sigma_min) t.
  s = 1.0 - (1.0 - SIGMA_MIN) * t
  return (1.0 - SIGMA_MIN) * xt + s * v


def training_pair(
  keys: Array, x1: Array, *, mean: float = 0.0, std: float = 1.0
) -> tuple[Array, Array, Array]:
  """Draws noise and time for a batch.

  Args:
    keys: [B] typed keys, one for each example.
    x1: data [B, ...].
    mean: mean of the logit of t.
    std: standard deviation of the logit of t.

  Returns:
    X_t [B, ...], t [B] and the target V_t [B, ...], all fp32.
  """
  keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)  # [B, 2]
  x1 = x1.astype(jnp.float32)
  t = draw_time(keys[:, 0], mean=mean, std=std)
  x0 = draw_noise(keys[:, 1], x1.shape[1:])
  return interpolate(x1, x0, t), t, velocity(x1, x0)


def loss(prediction: Array, target: Array) -> Array:
  """Mean squared error of each example, in fp32: [B, ...] -> [B]."""
  error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
  return sums.mean_of_each(error)
