"""The temporal autoencoder: any length, images, inflation, FLOPs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.errors import ConfigError
from mgen_jax.models import autoencoder_flops
from mgen_jax.models.autoencoder import Autoencoder, AutoencoderConfig

# All the parts of the full-size model, with as few blocks as possible: each costs compile time.
SMALL = AutoencoderConfig(
  channels=8, multipliers=(1, 2, 2, 2), res_blocks=0, decoder_res_blocks=0, groups=4
)
PATCHED = dataclasses.replace(
  SMALL,
  multipliers=(1, 2),
  space_down=(0,),
  time_down=(0,),
  patch=(4, 4, 4),
  res_blocks=1,
  decoder_res_blocks=1,
  mid_attention=False,
)


def _video(frames, height=16, width=24, seed=0):
  return jax.random.uniform(jax.random.key(seed), (1, frames, height, width, 3), minval=-1.0)


@functools.cache
def _init(config):
  model = Autoencoder(config)
  return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), _video(1)))["params"]


def _apply(model, params, video):
  return jax.jit(lambda p, v: model.apply({"params": p}, v))(params, video)


@pytest.mark.parametrize("config", [SMALL, PATCHED], ids=["convolutions", "patches"])
def test_any_length_goes_through(config):
  model, params = _init(config)
  for frames, latents in ((1, 1), (13, 2)):
    made, mean, logvar = _apply(model, params, _video(frames))
    assert made.shape == (1, frames, 16, 24, 3)
    assert mean.shape == logvar.shape == (1, latents, 2, 3, 16)
    assert mean.shape[1:] == config.latent_shape(frames, 16, 24)
    assert made.dtype == mean.dtype == jnp.float32


def test_an_image_equals_a_still_video():
  """Replicate padding makes an image a video that stands still, frame for frame."""
  model, params = _init(SMALL)
  params = _perturb(params)
  image = _video(1)
  mean = _apply(model, params, image)[1]
  still = _apply(model, params, jnp.repeat(image, 8, axis=1))[1]
  np.testing.assert_allclose(mean, still, rtol=1e-3, atol=1e-3)


def test_inflated_model_starts_as_the_image_model_on_every_frame():
  inflated = dataclasses.replace(SMALL, time_down=())
  image = dataclasses.replace(inflated, temporal=False)
  model, params = _init(inflated)
  frame_model, frame_params = _init(image)
  leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
  frame_params = jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[jax.tree_util.keystr(path)], frame_params
  )
  assert len(leaves) > len(jax.tree.leaves(frame_params))
  video = _video(5)
  made, mean, _ = _apply(model, params, video)
  frames, frame_mean, _ = _apply(frame_model, frame_params, video.swapaxes(0, 1))
  np.testing.assert_allclose(made, frames.swapaxes(0, 1), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(mean, frame_mean.swapaxes(0, 1), rtol=1e-4, atol=1e-5)


def test_temporal_layers_learn_from_the_first_step():
  model, params = _init(dataclasses.replace(SMALL, time_down=()))
  video = _video(3)
  gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, video)[0]).sum()))
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
    name = jax.tree_util.keystr(path)
    if "temporal']['kernel" in name or "temporal']['out']['kernel" in name:
      assert jnp.abs(leaf).max() > 0, name


def test_latent_is_sampled_only_with_noise():
  model, params = _init(PATCHED)
  video = _video(4)
  apply = jax.jit(lambda n: model.apply({"params": params}, video, n)[0])
  zero, one = apply(jnp.zeros((1, 1, 2, 3, 16))), apply(jnp.ones((1, 1, 2, 3, 16)))
  np.testing.assert_allclose(_apply(model, params, video)[0], zero, rtol=1e-3, atol=1e-4)
  assert jnp.abs(one - zero).max() > 0.01


@pytest.mark.parametrize("config", [SMALL, PATCHED], ids=["convolutions", "patches"])
def test_the_last_map_of_the_decoder_can_be_taken_apart(config):
  model, params = _init(config)
  latents = jax.random.normal(jax.random.key(2), (1, 2, 2, 3, 16))

  @jax.jit
  def both(params):
    run = functools.partial(model.apply, {"params": params})
    features = run(latents, method="decode_features")
    return run(latents, 13, method="decode"), run(features, 13, method="decode_output")

  whole, parts = both(params)
  assert whole.shape[1] == 13
  np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_convolution_methods_agree():
  matmul = dataclasses.replace(PATCHED, conv_method="matmul")
  model, params = _init(PATCHED)
  video = _video(9)
  for a, b in zip(
    _apply(model, params, video), _apply(Autoencoder(matmul), params, video), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, PATCHED], ids=["convolutions", "patches"])
def test_flops_equal_the_compiled_program(config):
  config = dataclasses.replace(config, channels=32, groups=8)
  model, params = _init(config)
  counted = {}
  video, latents = _video(16), jnp.zeros((1, 2, 2, 3, 16))
  for part, value in (("encode", video), ("decode", latents)):
    lowered = jax.jit(lambda p, v, part=part: model.apply({"params": p}, v, method=part))
    # Before XLA's own optimisation, which skips the multiplications with padding.
    counted[part] = lowered.lower(params, value).cost_analysis()["flops"]
  flops = autoencoder_flops.flops(config, (16, 16, 24))
  assert flops["encoder"] == pytest.approx(counted["encode"], rel=0.1)
  assert flops["decoder"] == pytest.approx(counted["decode"], rel=0.1)


def test_full_size_has_the_shapes_of_the_paper():
  model = Autoencoder(AutoencoderConfig())
  video = jax.ShapeDtypeStruct((1, 121, 768, 768, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), video)
  made, mean, _ = jax.eval_shape(model.apply, params, video)
  assert mean.shape == (1, 16, 96, 96, 16)
  assert made.shape == video.shape
  assert AutoencoderConfig().time_stride == 8
  assert AutoencoderConfig().space_strides == (8, 8)


def test_impossible_configurations_name_the_fix():
  with pytest.raises(ConfigError, match=r"height 20 is not divisible .* stride 8: use 16"):
    SMALL.latent_shape(8, 20, 16)
  with pytest.raises(ConfigError, match="0 frames"):
    SMALL.latent_shape(0, 16, 16)
  with pytest.raises(ConfigError, match="level that does not exist"):
    dataclasses.replace(SMALL, time_down=(7,)).check()
  with pytest.raises(ConfigError, match="do not divide into groups=5"):
    dataclasses.replace(SMALL, groups=5).check()
  with pytest.raises(ConfigError, match="temporal=False has no strides in time"):
    dataclasses.replace(SMALL, temporal=False).check()
  with pytest.raises(ConfigError, match="unknown norm"):
    dataclasses.replace(SMALL, norm="batch").check()


def _perturb(params):
  """Temporal weights that are no longer the identity."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)
