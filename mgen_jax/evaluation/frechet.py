"""Frechet distances between sets of videos, on features that can be plugged in.

FID and FVD are this distance on the features of an Inception and an I3D network; reconstructions
against originals give rFID and rFVD. A `Features` is any function of clips, so those networks can
be used where their weights are. Without weights there are fixed random convolutions: no download,
the same everywhere, and they tell textures, colours and motion apart well enough to order damage
and models on Marbles. Their distances compare only with distances on the same features, and are
neither a published FID nor FVD.
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

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); it is biased upwards where M or M' is not much larger
  than D, by the same amount for models compared on the same numbers.

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
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  # tr (C1 C2)^(1/2) = sum of the singular values of S1 S2, S the symmetric square roots.
  roots = [_symmetric_root(c) for c in covariances]
  cross = linalg.svdvals(roots[0] @ roots[1]).sum()
  return float(max(0.0, gap @ gap + sum(np.trace(c) for c in covariances) - 2.0 * cross))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def random_frame_features(clips: np.ndarray) -> np.ndarray:
  """Of each frame, mean and deviation over space of fixed random convolutions: [N * T, 64]."""
  return _in_batches(_frame_features, clips.reshape(-1, *clips.shape[2:]))


def random_clip_features(clips: np.ndarray) -> np.ndarray:
  """Of each clip, fixed random convolutions over space and time: [N, 160]."""
  return _in_batches(_clip_features, clips)


def _in_batches(features: Callable[[np.ndarray], jax.Array], rows: np.ndarray) -> np.ndarray:
  return np.concatenate(
    [np.asarray(features(rows[i : i + _BATCH])) for i in range(0, len(rows), _BATCH)]
  )


@jax.jit
def _frame_features(frames: jax.Array) -> jax.Array:
  x = _layers(frames[:, None])[-1]
  return jnp.concatenate([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1)


@jax.jit
def _clip_features(clips: jax.Array) -> jax.Array:
  found = []
  for x in _layers(clips):
    pooled = x.mean((2, 3))  # [B, T, C]
    # The mean says what is there; the spread over frames, what changes.
    found += [pooled.mean(1), pooled.std(1)]
  return jnp.concatenate(found, -1)


def _layers(clips: jax.Array) -> list[jax.Array]:
  """uint8 [B, T, H, W, 3] -> [B, T, H', W', C] of each layer, under unit gain."""
  x, found = clips.astype(jnp.float32) / 127.5 - 1.0, []
  for layer, width in enumerate(_WIDTHS):
    if clips.shape[1] > 1:  # each frame beside its neighbours: a 3D convolution, but fast on CPUs
      near = layers.replicate_pad(x, 1, 1, axis=1)
      x = jnp.concatenate([near[:, i : i + x.shape[1]] for i in range(3)], -1)
    scale = np.sqrt(2.0 / (9 * x.shape[-1]))
    kernel = scale * jax.random.normal(jax.random.key(layer), (3, 3, x.shape[-1], width))
    x = jax.nn.relu(layers.convolve(x, kernel, (2, 2)))
    found.append(x)
  return found
