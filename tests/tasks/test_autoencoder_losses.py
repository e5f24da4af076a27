"""The losses of the autoencoder: definitions, directions, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.models import perceptual
from mgen_jax.tasks import autoencoder_losses as losses
from mgen_jax.weights import lpips
from mgen_jax.weights.files import WeightsError


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_outlier_penalty_is_the_papers_formula():
  latents = _normal(2, 3, 4, 5, 6)
  latents[0, 1, 2, 3] *= 30.0
  expected = []
  for frame in latents.reshape(-1, 4, 5, 6):
    vectors = frame.reshape(-1, 6)
    spread = np.linalg.norm(vectors.std(0))
    distance = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    expected.append(np.maximum(distance - 3.0 * spread, 0.0).sum() / 20)
  assert np.mean(expected) > 0
  np.testing.assert_allclose(losses.outlier_penalty(latents), np.mean(expected), rtol=1e-5)
  assert losses.outlier_penalty(_normal(1, 8, 8, 16)) == 0.0


def test_outlier_penalty_pulls_the_outlier_in_and_nothing_else_out():
  latents = jnp.asarray(_normal(1, 8, 8, 4)).at[0, 3, 3].mul(40.0)
  gradient = jax.grad(losses.outlier_penalty)(latents)
  assert (gradient[0, 3, 3] * latents[0, 3, 3]).sum() > 0  # a step against it shrinks the latent
  before = losses.outlier_penalty(latents)
  assert losses.outlier_penalty(latents - 1000.0 * gradient) < 0.9 * before
  assert bool(jnp.isfinite(jax.grad(losses.outlier_penalty)(jnp.zeros((1, 4, 4, 2)))).all())


def test_the_papers_weight_beside_sums_is_the_mean_reduced_one_beside_means():
  frames, height, width = 2, 16, 24
  video, made = _normal(1, frames, height, width, 3), _normal(1, frames, height, width, 3, seed=1)
  latents = jnp.asarray(_normal(1, 1, 4, 4, 8)).at[0, 0, 1, 1].mul(50.0)
  weight = 1e5
  summed = np.abs(made - video).sum() + weight * losses.outlier_penalty(latents)
  small = losses.mean_reduced_weight(weight, frames, height, width)
  mean = np.abs(made - video).mean() + small * losses.outlier_penalty(latents)
  np.testing.assert_allclose(summed, mean * video.size, rtol=1e-5)
  assert losses.mean_reduced_weight(1e5, 1, 256, 256) == pytest.approx(0.509, abs=1e-3)


def test_kl_is_that_of_two_normals():
  mean, std = 0.7, 1.3
  draws = mean + std * np.random.default_rng(0).standard_normal(400_000)
  log_q = -0.5 * ((draws - mean) / std) ** 2 - np.log(std)
  log_p = -0.5 * draws**2
  logvar = jnp.full((2, 3), 2 * np.log(std))
  np.testing.assert_allclose(
    losses.kl(jnp.full((2, 3), mean), logvar), np.mean(log_q - log_p), rtol=0.02
  )
  assert losses.kl(jnp.zeros(3), jnp.zeros(3)) == 0


def test_hinge_losses_and_r1():
  assert losses.hinge_discriminator(jnp.full(4, 2.0), jnp.full(4, -2.0)) == 0
  assert losses.hinge_discriminator(jnp.zeros(4), jnp.zeros(4)) == 1.0
  assert losses.hinge_generator(jnp.full(4, 2.0)) == -2.0
  weight = jnp.asarray(_normal(5))
  real = jnp.asarray(_normal(3, 5))
  # D is linear: its gradient is the weight everywhere.
  found = losses.r1_penalty(lambda x: (x @ weight)[:, None], real)
  np.testing.assert_allclose(found, 0.5 * jnp.square(weight).sum(), rtol=1e-6)


def test_adaptive_weight_is_the_ratio_of_gradients_and_has_none_itself():
  kernel = jnp.asarray([3.0, 4.0])
  strong, weak = lambda k: 10.0 * k.sum(), lambda k: k.sum()
  np.testing.assert_allclose(losses.adaptive_weight(strong, weak, kernel), 10.0, rtol=1e-3)
  square = lambda k: jnp.square(k).sum()  # noqa: E731
  assert jnp.abs(jax.grad(lambda k: losses.adaptive_weight(square, weak, k))(kernel)).max() == 0


def test_ms_ssim_distance_orders_damage_and_has_a_gradient():
  frames = np.clip(0.5 * _normal(2, 32, 40, 3), -1, 1)
  near, far = frames + 0.05 * _normal(2, 32, 40, 3, seed=1), frames[:, ::-1]
  distance = perceptual.ms_ssim_distance
  assert jnp.abs(distance(frames, frames)).max() < 1e-5
  assert (distance(frames, near) < distance(frames, far)).all() and distance(frames, near).min() > 0
  gradient = jax.grad(lambda x: distance(jnp.asarray(frames), x).sum())(jnp.asarray(near))
  assert bool(jnp.isfinite(gradient).all()) and jnp.abs(gradient).max() > 0


def _vgg_tensors():
  tensors, layer, before = {}, 0, 3
  for group, widths in enumerate(perceptual.VGG16):
    for width in widths:
      scale = (2.0 / (9 * before)) ** 0.5
      tensors[f"features.{layer}.weight"] = scale * _normal(width, before, 3, 3, seed=layer)
      tensors[f"features.{layer}.bias"] = 0.1 * _normal(width, seed=layer + 100)
      layer, before = layer + 2, width
    layer += 1
    tensors[f"lin{group}.model.1.weight"] = np.abs(_normal(1, widths[-1], 1, 1, seed=group))
  return tensors


def test_lpips_equals_its_definition_in_torch():
  """VGG16's layers as torchvision numbers them, random weights."""
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  tensors = _vgg_tensors()
  a, b = (np.tanh(_normal(2, 40, 33, 3, seed=seed)) for seed in (5, 6))

  def features(x):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.tensor(x.transpose(0, 3, 1, 2)) - shift[:, None, None]) / scale[:, None, None]
    found, layer = [], 0
    for group, widths in enumerate(perceptual.VGG16):
      x = functional.max_pool2d(x, 2) if group else x
      for _ in widths:
        weight, bias = (torch.tensor(tensors[f"features.{layer}.{n}"]) for n in ("weight", "bias"))
        x, layer = functional.relu(functional.conv2d(x, weight, bias, padding=1)), layer + 2
      layer += 1
      found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found

  expected = 0.0
  for group, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
    linear = torch.tensor(tensors[f"lin{group}.model.1.weight"])
    expected = expected + functional.conv2d((x - y).square(), linear).mean((1, 2, 3))
  from flax import traverse_util

  # The lpips package's own names, with what it stores besides, are the same.
  renamed = {n.replace("features.", "net.slice1."): v for n, v in tensors.items()}
  renamed |= {"scaling_layer.shift": np.zeros(3), "lins.0.model.1.weight": np.zeros(3)}
  params = traverse_util.unflatten_dict(lpips.import_lpips(renamed), sep="/")
  found = jax.jit(perceptual.Lpips().apply)({"params": params}, a, b)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
  same = jax.grad(lambda x: perceptual.Lpips().apply({"params": params}, x, b[:1]).sum())(b[:1])
  assert bool(jnp.isfinite(same).all())


def test_incomplete_lpips_weights_are_listed():
  tensors = _vgg_tensors()
  del tensors["lin3.model.1.weight"]
  with pytest.raises(WeightsError, match=r"missing: lin3\.model\.1\.weight"):
    lpips.import_lpips(tensors)
