"""Perceptual distances between frames: LPIPS on VGG16 (Zhang et al., 2018), and without weights
multi-scale SSIM (Wang et al., 2003). Not here: the public weights of VGG16 (`weights/lpips.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgen_jax.models import layers

Array = jax.Array

# Of VGG16: widths of the convolutions between two poolings. LPIPS reads the last of each group.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# What LPIPS subtracts from and divides images in [-1, 1] by.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10

_WINDOW = 7  # of SSIM
_SCALES = 3
_C1, _C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # pixels range over 2


class Lpips(nn.Module):
  """The distance of two videos [..., H, W, 3] in [-1, 1]: [...], one for each frame.

  Its parameters are not for training: they come from files, or the distance means nothing.
  """

  dtype: str = "float32"

  @nn.compact
  def __call__(self, a: Array, b: Array) -> Array:
    both = (jnp.stack([a, b]) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
    total = jnp.zeros(a.shape[:-3], jnp.float32)
    for number, features in enumerate(self._features(both)):
      features = features.astype(jnp.float32)
      # Inside the root: the root of zero has no gradient.
      norm = jnp.sqrt(jnp.square(features).sum(-1, keepdims=True) + _EPS**2)
      x, y = features / (norm + _EPS)
      weight = self.param(f"weight{number}", nn.initializers.ones, (x.shape[-1],))
      total += (jnp.square(x - y) @ weight).mean((-2, -1))
    return total

  def _features(self, x: Array) -> list[Array]:
    found = []
    for group, widths in enumerate(VGG16):
      if group:  # 2x2 maximum; an odd last row or column is dropped
        h, w = x.shape[-3] // 2, x.shape[-2] // 2
        x = x[..., : 2 * h, : 2 * w, :]
        x = x.reshape(*x.shape[:-3], h, 2, w, 2, x.shape[-1]).max((-4, -2))
      for number, width in enumerate(widths):
        conv = layers.SpatialConv(width, dtype=self.dtype, name=f"conv{group}_{number}")
        x = nn.relu(conv(x))
      found.append(x)
    return found


def ms_ssim_distance(a: Array, b: Array) -> Array:
  """1 - SSIM, averaged over scales: [..., H, W, 3] twice, in [-1, 1] -> [...], in [0, 2].

  Each scale halves the last; up to three, as many as hold a 7x7 window. The plain mean over scales
  stands in place of the weighted geometric one, whose gradient is unbounded near zero.
  """
  distances = []
  for scale in range(_SCALES):
    if scale:
      if min(a.shape[-3:-1]) // 2 < _WINDOW:
        break
      a, b = _halve(a), _halve(b)
    distances.append(1.0 - _ssim(a, b))
  return sum(distances) / len(distances)


def _ssim(a: Array, b: Array) -> Array:
  mean_a, mean_b = _window_mean(a), _window_mean(b)
  var_a = _window_mean(a * a) - mean_a * mean_a
  var_b = _window_mean(b * b) - mean_b * mean_b
  covariance = _window_mean(a * b) - mean_a * mean_b
  above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
  below = (mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)
  return (above / below).mean((-3, -2, -1))


def _window_mean(x: Array) -> Array:
  """Mean over every window inside the frame (the whole frame where it is smaller)."""
  flat = x.reshape(-1, *x.shape[-3:])
  window = (1, min(_WINDOW, flat.shape[1]), min(_WINDOW, flat.shape[2]), 1)
  sums = jax.lax.reduce_window(flat, 0.0, jax.lax.add, window, (1, 1, 1, 1), "VALID")
  return (sums / (window[1] * window[2])).reshape(*x.shape[:-3], *sums.shape[1:])


def _halve(x: Array) -> Array:
  """Mean of 2x2 pixels."""
  h, w = x.shape[-3] // 2, x.shape[-2] // 2
  x = x[..., : 2 * h, : 2 * w, :]
  return x.reshape(*x.shape[:-3], h, 2, w, 2, x.shape[-1]).mean((-4, -2))
