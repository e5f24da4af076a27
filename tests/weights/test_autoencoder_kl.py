"""Stable Diffusion's image autoencoder: parity with diffusers, inflation, bad files."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mgen_jax.models.autoencoder import Autoencoder
from mgen_jax.weights import autoencoder_kl, files
from mgen_jax.weights.files import WeightsError

# All the parts of the public files, small: with 1x1 convolutions around the latents as in Stable
# Diffusion 1 and 2, and without as in 3 and FLUX.
KINDS = {
  "sd1": {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
  "sd3": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}


def _values(kind):
  return {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    **KINDS[kind],
  }


@functools.cache
def _theirs(kind):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.manual_seed(0)
  torch.set_num_threads(2)
  values = {k: v for k, v in _values(kind).items() if not k.startswith("_")}
  model = diffusers.AutoencoderKL(**values)
  with torch.no_grad():
    for leaf in model.parameters():  # biases and norms that are not zeros and ones
      leaf.add_(0.05 * torch.randn_like(leaf))
  return model, {k: v.detach().numpy() for k, v in model.state_dict().items()}


def _init(config, seed=1):
  model = Autoencoder(config)
  video = jnp.zeros((1, 1, *config.space_strides, 3))
  tree = nn.unbox(jax.jit(model.init)(jax.random.key(seed), video))["params"]
  return model, traverse_util.flatten_dict(tree, sep="/")


def _random(config, seed=0):
  """Tensors in diffusers' names without diffusers."""
  shapes = autoencoder_kl.tensor_shapes(config)
  rng = np.random.default_rng(seed)
  return {n: (0.2 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def _tree(flat):
  return traverse_util.unflatten_dict(flat, sep="/")


def _relative(a, b):
  return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


@pytest.mark.parametrize("kind", list(KINDS))
def test_values_and_gradients_equal_diffusers(kind):
  torch = pytest.importorskip("torch")
  theirs, tensors = _theirs(kind)
  config = autoencoder_kl.model_config(_values(kind))
  params = autoencoder_kl.import_image(tensors, config)
  model = Autoencoder(config)
  assert set(params) == set(_init(config)[1])
  image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)

  pixels = torch.tensor(image.transpose(0, 3, 1, 2))
  moments = theirs.encode(pixels).latent_dist
  made = theirs.decode(moments.mean).sample
  theirs.zero_grad()
  (made.square().mean() + moments.logvar.mean()).backward()

  def loss(tree):
    made, mean, logvar = model.apply({"params": tree}, image[:, None])
    return jnp.square(made).mean() + logvar.mean(), (made, mean, logvar)

  gradient, (ours, mean, logvar) = jax.jit(jax.grad(loss, has_aux=True))(_tree(params))
  for a, b in ((ours, made), (mean, moments.mean), (logvar, moments.logvar)):
    assert _relative(a[:, 0], b.detach().numpy().transpose(0, 2, 3, 1)) <= 1e-5
  expected = autoencoder_kl.import_image(
    {n: p.grad.numpy() for n, p in theirs.named_parameters()}, config
  )
  gradient = traverse_util.flatten_dict(gradient, sep="/")
  largest = max(np.abs(value).max() for value in expected.values())
  for name, value in expected.items():
    # Some gradients are zero but for rounding (a key's bias): their error is measured by the rest.
    error = np.abs(np.asarray(gradient[name]) - value).max()
    assert error <= 1e-5 * max(np.abs(value).max(), 0.01 * largest), name


@pytest.mark.parametrize("inflation", ["2.5d", "3d"])
def test_an_inflated_model_equals_the_image_model_on_every_frame(inflation):
  image = autoencoder_kl.model_config(_values("sd1"))
  tensors = _random(image)
  frame_params = autoencoder_kl.import_image(tensors, image)
  config = dataclasses.replace(
    image, temporal=True, inflation=inflation, temporal_attention=inflation == "2.5d"
  )
  model, initial = _init(config)
  params = _tree({**initial, **autoencoder_kl.import_image(tensors, config)})
  video = np.random.default_rng(1).uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
  made, mean, logvar = jax.jit(model.apply)({"params": params}, video)
  frames = jax.jit(Autoencoder(image).apply)({"params": _tree(frame_params)}, video[0][:, None])
  for a, b in zip((made, mean, logvar), frames, strict=True):
    np.testing.assert_allclose(a[0], b[:, 0], rtol=1e-4, atol=1e-5)


def test_an_inflated_model_with_strides_in_time_equals_the_image_model_on_images():
  image = autoencoder_kl.model_config(_values("sd3"))
  tensors = _random(image)
  config = dataclasses.replace(image, temporal=True, time_down=(0, 1))
  model, initial = _init(config)
  params = {"params": _tree({**initial, **autoencoder_kl.import_image(tensors, config)})}
  picture = np.random.default_rng(1).uniform(-1, 1, (1, 1, 16, 16, 3)).astype(np.float32)
  mean, _ = jax.jit(functools.partial(model.apply, method="encode"))(params, picture)
  made = jax.jit(functools.partial(model.apply, method="decode"))(params, mean)
  frame_params = {"params": _tree(autoencoder_kl.import_image(tensors, image))}
  expected, frame_mean, _ = jax.jit(Autoencoder(image).apply)(frame_params, picture)
  assert made.shape[1] == 4
  np.testing.assert_allclose(mean, frame_mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made, np.repeat(expected, 4, axis=1), rtol=1e-4, atol=1e-5)


def test_export_undoes_import_and_names_the_same_model():
  config = autoencoder_kl.model_config(_values("sd1"))
  tensors = _random(config)
  back = autoencoder_kl.export_image(autoencoder_kl.import_image(tensors, config), config)
  assert set(back) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value)
  described = autoencoder_kl.diffusers_config(config)
  assert autoencoder_kl.model_config(json.loads(json.dumps(described))) == config
  with pytest.raises(WeightsError, match="norm rms"):
    autoencoder_kl.export_image({}, dataclasses.replace(config, norm="rms"))


def test_old_names_of_the_attention_are_understood():
  config = autoencoder_kl.model_config(_values("sd1"))
  tensors = _random(config)
  new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  old = {}
  for name, value in tensors.items():
    for a, b in new.items():
      if f".{a}." in name:
        name = name.replace(f".{a}.", f".{b}.")
        value = value[..., None, None] if value.ndim == 2 else value  # stored as a convolution
    old[name] = value
  assert set(old) != set(tensors)
  a, b = (autoencoder_kl.import_image(t, config) for t in (old, tensors))
  for name in b:
    np.testing.assert_array_equal(a[name], b[name])


def test_every_tensor_at_fault_is_listed():
  config = autoencoder_kl.model_config(_values("sd1"))
  tensors = _random(config)
  del tensors["encoder.conv_in.weight"], tensors["quant_conv.bias"]
  tensors["loss.weight"] = np.zeros(3, np.float32)
  tensors["decoder.conv_in.bias"] = np.zeros(5, np.float32)
  with pytest.raises(WeightsError, match="in 4 tensors") as caught:
    autoencoder_kl.import_image(tensors, config)
  for words in (
    "missing: encoder.conv_in.weight",
    "missing: quant_conv.bias",
    "extra: loss.weight (3,)",
    "shape: decoder.conv_in.bias is (5,) instead of (16,)",
  ):
    assert words in str(caught.value)
  other = dataclasses.replace(config, latent_channels=16)
  with pytest.raises(WeightsError, match=r"encoder.conv_out.weight is \(8, 16, 3, 3\)"):
    autoencoder_kl.import_image(_random(config), other)


def test_full_size_files_have_the_known_number_of_parameters():
  """83,653,863 of Stable Diffusion 1 and 83,819,683 of 3, as their files hold."""
  for latents, quant, count in ((4, True, 83_653_863), (16, False, 83_819_683)):
    values = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    values |= {"latent_channels": latents, "use_quant_conv": quant, "use_post_quant_conv": quant}
    shapes = autoencoder_kl.tensor_shapes(autoencoder_kl.model_config(values))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_files_are_read_in_any_float_type_and_never_unpickled(tmp_path):
  import ml_dtypes

  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
    files.write_tensors(tmp_path / "a.safetensors", {"x": values.astype(dtype)})
    read = files.read_tensors(tmp_path / "a.safetensors")["x"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values)
  with pytest.raises(WeightsError, match="is a pickle"):
    files.read_tensors(tmp_path / "model.ckpt")
  (tmp_path / "b.safetensors").write_bytes(b"\x00" * 20)
  with pytest.raises(WeightsError, match="cannot be read as safetensors"):
    files.read_tensors(tmp_path / "b.safetensors")
  with pytest.raises(WeightsError, match="cannot be read"):
    files.read_json(tmp_path / "missing.json")
