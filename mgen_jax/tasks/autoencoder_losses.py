"""The losses of the autoencoder as functions of arrays (Movie Gen, section 3.1.1; Rombach et al.).

All are means: over pixels, latents or patches, and over the batch. The perceptual ones are in
`models/perceptual.py`. Not here: their weights and when they apply (`autoencoder.py`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgen_jax.parallel import sums

Array = jax.Array

_EPS = 1e-6


def kl(mean: Array, logvar: Array) -> Array:
  """KL(N(mean, var) || N(0, 1)) in nats, averaged over all latent values.

  The latent-diffusion code sums it over an example instead and averages over the batch: its weight
  w is w times the number of latent values here.
  """
  return 0.5 * sums.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def outlier_penalty(latents: Array, r: float = 3.0) -> Array:
  """The outlier penalty loss: how far latents lie outside r standard deviations of their frame.

  For the latent X of one frame, with the mean and the standard deviation of each channel over its
  H x W positions, and norms over channels,

    L = 1 / (H W) * sum over i, j of max(||X_ij - Mean(X)|| - r ||Std(X)||, 0),

  averaged over frames and examples. The paper's weight of 1e5 belongs to a loss whose other terms
  are sums over the pixels of an example; `mean_reduced_weight` gives that for means.

  Args:
    latents: [..., H, W, C].
    r: 3 in the paper.
  """
  distance, spread = _norms(latents)
  return sums.mean(jnp.maximum(distance - r * spread, 0.0))


def mean_reduced_weight(weight: float, frames: int, height: int, width: int) -> float:
  """The weight of a term beside mean-reduced losses that acts like `weight` beside summed ones.

  A reconstruction loss summed over an example's N = 3 * frames * height * width values is N times
  its mean, so dividing the whole loss by N leaves weight / N: the paper's 1e5 becomes 0.51 for an
  image of 256 px, and 0.016 for 32 frames of it. (The gradient is N times smaller as well, which
  Adam does not see.)
  """
  return weight / (3 * frames * height * width)


def spot_norm(latents: Array) -> Array:
  """The spot statistic: the largest ||X_ij - Mean(X)|| / ||Std(X)|| of all positions and frames.

  Args:
    latents: [..., H, W, C]. 1 is the average position; spots are latents of very high norm.
  """
  distance, spread = _norms(latents)
  return (distance / jnp.maximum(spread, _EPS)).max()


def _norms(latents: Array) -> tuple[Array, Array]:
  """||X_ij - Mean(X)|| [..., H, W] and ||Std(X)|| [..., 1, 1]."""
  centred = latents - latents.mean((-3, -2), keepdims=True)
  square = jnp.square(centred)
  # Inside the roots: the root of zero has no gradient.
  distance = jnp.sqrt(square.sum(-1) + _EPS**2)
  spread = jnp.sqrt(square.mean((-3, -2)).sum(-1) + _EPS**2)
  return distance, spread[..., None, None]


def hinge_discriminator(real: Array, fake: Array) -> Array:
  """Hinge loss of the discriminator's logits: real above 1, fake below -1."""
  return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def hinge_generator(fake: Array) -> Array:
  """The autoencoder's side: its logits should be high."""
  return -fake.mean()


def r1_penalty(logits: Callable[[Array], Array], real: Array) -> Array:
  """1/2 E ||grad of D(x)||^2 at real videos [B, ...], D(x) the mean of its patches' logits."""

  def total(x):
    values = logits(x)
    return values.reshape(values.shape[0], -1).mean(1).sum()

  gradient = jax.grad(total)(real)
  return 0.5 * jnp.square(gradient).sum() / real.shape[0]


def adaptive_weight(
  reconstruction: Callable[[Array], Array], adversarial: Callable[[Array], Array], kernel: Array
) -> Array:
  """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, at most 1e4.

  Args:
    reconstruction, adversarial: the losses as functions of the decoder's last kernel.
    kernel: that kernel.
  """
  norms = [
    jnp.sqrt(jnp.square(jax.grad(loss)(kernel)).sum()) for loss in (reconstruction, adversarial)
  ]
  return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4))


def psnr(mean_square: Array) -> Array:
  """Decibel of a mean squared error of pixels in [-1, 1]."""
  return 10.0 * (math.log10(4.0) - jnp.log10(jnp.maximum(mean_square, 1e-10)))
