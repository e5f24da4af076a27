"""The Frechet distance between two sets of videos on fixed features.

The features are those of a small network of random weights that never change: no download, the same
on every machine. Random convolutions tell textures, shapes and motion apart well enough to order
models on Marbles; the numbers compare with each other only, never with a published FVD, whose
features are those of a trained I3D.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

_SEED = 20240105
_WIDTHS = (24, 48, 96)
_BATCH = 16


@functools.cache
def _weights() -> tuple[np.ndarray, ...]:
  """Kernels [3, 3, 3, c_in, c_out] with unit gain under ReLU."""
  rng = np.random.default_rng(_SEED)
  made, before = [], 3
  for width in _WIDTHS:
    scale = math.sqrt(2.0 / (27 * before))
    made.append((scale * rng.standard_normal((3, 3, 3, before, width))).astype(np.float32))
    before = width
  return tuple(made)


@jax.jit
def _features(video: jax.Array) -> jax.Array:
  """uint8 [B, T, H, W, 3] -> [B, sum of widths]: means over all positions, of each layer."""
  x = video.astype(jnp.float32) / 127.5 - 1.0
  found = []
  for kernel in _weights():
    x = jax.lax.conv_general_dilated(
      x, kernel, (1, 2, 2), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    x = jax.nn.relu(x)
    # The mean says what is there; the spread over frames, what changes.
    pooled = x.mean((2, 3))  # [B, T, C]
    found += [pooled.mean(1), pooled.std(1)]
  return jnp.concatenate(found, -1)


def features(videos: np.ndarray) -> np.ndarray:
  """uint8 [N, T, H, W, 3] -> float64 [N, D]."""
  parts = [_features(videos[i : i + _BATCH]) for i in range(0, len(videos), _BATCH)]
  return np.concatenate([np.asarray(part, np.float64) for part in parts])


def distance(first: np.ndarray, second: np.ndarray) -> float:
  """The Frechet distance of two Gaussians fitted to features [N, D] and [M, D].

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); it is biased upwards where N or M is not much larger
  than D, by the same amount for models compared on the same numbers.
  """
  means = [x.mean(0) for x in (first, second)]
  covariances = [np.cov(x, rowvar=False) for x in (first, second)]
  # tr (C1 C2)^(1/2) = sum of the singular values of S1 S2, S the symmetric square roots.
  roots = [_symmetric_root(c) for c in covariances]
  cross = linalg.svdvals(roots[0] @ roots[1]).sum()
  gap = np.square(means[0] - means[1]).sum()
  return float(gap + sum(np.trace(c) for c in covariances) - 2.0 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def of_videos(real: np.ndarray | Sequence[np.ndarray], made: np.ndarray) -> float:
  """The distance of uint8 videos [N, T, H, W, 3] and [M, T, H, W, 3], of the same length."""
  return distance(features(np.asarray(real)), features(made))
