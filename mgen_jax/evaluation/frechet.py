"""Frechet distances between sets of videos, on features that can be plugged in.

FID and FVD are this distance on the features of an Inception and an I3D network; reconstructions
against originals give rFID and rFVD. A `Features` is any function of clips, so those networks can
be used where their weights are. Without weights there are fixed random convolutions: their
distances order damage, but compare only with distances on the same features, and are no FID.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from mgen_jax.errors import UserError
from mgen_jax.models import layers

# uint8 [N, T, H, W, 3] -> features [M, D]; M is N, or N * T where each frame counts.
Features = Callable[[np.ndarray], np.ndarray]

_WIDTHS = (16, 32, 32)
_BATCH = 16


def distance(a: np.ndarray, b: np.ndarray) -> float:
  """Squared Frechet distance of two normals fitted to features [M, D] and [M', D].

  Raises:
    UserError: fewer than two rows in either, or widths that differ.
  """
  if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
    raise UserError(
      f"features of shapes {a.shape} and {b.shape} have no Frechet distance: give two clips or "
      "more of one kind."
    )
  a, b = a.astype(np.float64), b.astype(np.float64)
  gap = a.mean(0) - b.mean(0)
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  # tr sqrt(A B) by the symmetric sqrt(sqrt(A) B sqrt(A)), which needs no complex numbers.
  values, vectors = linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
  cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
  return float(max(0.0, gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross))


def random_frame_features(clips: np.ndarray) -> np.ndarray:
  """Of each frame, mean and deviation of fixed random convolutions: [N * T, 64]."""
  return _random_features(clips.reshape(-1, 1, *clips.shape[2:]))


def random_clip_features(clips: np.ndarray) -> np.ndarray:
  """Of each clip, the same over space and time: [N, 64]."""
  return _random_features(clips)


def _random_features(clips: np.ndarray) -> np.ndarray:
  return np.concatenate(
    [np.asarray(_pyramid(clips[i : i + _BATCH])) for i in range(0, len(clips), _BATCH)]
  )


@jax.jit
def _pyramid(clips: jax.Array) -> jax.Array:
  x = clips.astype(jnp.float32) / 127.5 - 1.0
  for layer, width in enumerate(_WIDTHS):
    if clips.shape[1] > 1:  # every other frame, beside its neighbours
      near = layers.replicate_pad(x, 1, 1, axis=1)
      x = jnp.concatenate([near[:, i : i + x.shape[1] : 2] for i in range(3)], -1)
    scale = np.sqrt(2.0 / (9 * x.shape[-1]))
    kernel = scale * jax.random.normal(jax.random.key(layer), (3, 3, x.shape[-1], width))
    x = jax.nn.relu(layers.convolve(x, kernel, (2, 2)))
  return jnp.concatenate([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1)
