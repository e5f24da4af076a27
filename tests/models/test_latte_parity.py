"""Latte agrees with PyTorch in values, loss and all gradients: variant 1, images, text, guidance.

The reference of variant 1 is `torch_latte`, built from the published architecture with the names
of the released code; that of text to video is diffusers' LatteTransformer3DModel. Parameters travel
through `mgen_jax.weights.latte`, which is thereby tested too.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.models import latte
from mgen_jax.models.latte import Latte, LatteConfig
from mgen_jax.weights import latte as weights

torch = pytest.importorskip("torch", reason="the parity tests need torch, of the extra test")

TINY = LatteConfig(layers=4, width=48, heads=4, max_frames=6)
TOLERANCE = 1e-5  # relative, in the Euclidean norm of the array


def _close(made, expected, name=""):
  made, expected = np.asarray(made, np.float64), np.asarray(expected, np.float64)
  error = np.linalg.norm(made - expected) / max(np.linalg.norm(expected), 1e-30)
  assert error <= TOLERANCE, f"{name}: relative error {error:.2g}"


def _to_torch(video):  # [B, F, H, W, C] -> [B, F, C, H, W]
  return torch.tensor(np.moveaxis(np.asarray(video), -1, 2))


def _from_torch(video):
  return np.moveaxis(video.detach().numpy(), 2, -1)


def _numpy(tensors):
  return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _twin(config, frames, side=8, seed=0):
  from benchmarks import torch_latte

  twin = torch_latte.Latte(config, side, frames)
  torch_latte.redraw(twin, seed)
  return twin, weights.from_latte(_numpy(twin.state_dict()), config)


CASES = {
  "unconditional": (TINY, 0),
  "classes, patch 4": (dataclasses.replace(TINY, classes=5, patch=4), 0),
  "joint": (TINY, 3),
  "joint with classes, remat": (dataclasses.replace(TINY, classes=5, remat="full"), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_values_loss_and_gradients_are_those_of_the_released_architecture(case):
  config, images = CASES[case]
  frames, rng = 6, np.random.default_rng(3)
  twin, params = _twin(config, frames)
  latents = rng.standard_normal((2, frames + images, 8, 8, 4)).astype(np.float32)
  target = rng.standard_normal((2, frames + images, 8, 8, 8)).astype(np.float32)
  time = np.array([0, 931])
  labels = None
  if config.classes:
    labels = rng.integers(0, 6, (2, 1 + images) if images else 2)

  def loss(params):
    made = Latte(config).apply({"params": params}, latents, time, labels, images=images)
    return jnp.square(made - target).mean(), made

  (value, made), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  named = None if labels is None else torch.tensor(labels)
  made_twin = twin(_to_torch(latents), torch.tensor(time), named, images)
  value_twin = (made_twin - _to_torch(target)).square().mean()
  value_twin.backward()

  _close(made, _from_torch(made_twin))
  _close(value, value_twin.item())
  gradients = weights.to_latte(gradients, config, rows=8 // config.patch, frames=frames)
  expected = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
  assert set(gradients) - {"pos_embed", "temp_embed"} == set(expected)
  for name, gradient in expected.items():
    ours, theirs = gradients[name], gradient.numpy()
    if name.endswith("attn.qkv.bias"):  # a bias of all keys moves no softmax: its gradient is 0
      third = len(ours) // 3
      assert np.abs(ours[third : 2 * third]).max() <= 1e-5 * np.abs(theirs).max()
    _close(ours, theirs, name)


def test_guidance_is_that_of_the_released_code():
  """On the noise channels of the conditional half; the variance stays the conditional one's."""
  from mgen_jax.diffusion import guidance

  config = dataclasses.replace(TINY, classes=5)
  twin, params = _twin(config, 6)
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((2, 6, 8, 8, 4)).astype(np.float32)
  labels, time = np.array([3, 1]), np.array([500, 20])

  def model(x, t, labels):
    return Latte(config).apply({"params": params}, x, t, labels)

  guided = guidance.guided(model, labels, np.full(2, config.classes), 7.0, channels=4)
  made = jax.jit(guided)(latents, time)
  both = torch.cat([_to_torch(latents)] * 2)
  doubled = torch.tensor(np.concatenate([labels, np.full(2, config.classes)]))
  expected = twin.guided(both, torch.tensor(np.tile(time, 2)), doubled, 7.0)
  _close(made, _from_torch(expected)[:2])


def test_weights_go_out_as_they_came_in():
  config = dataclasses.replace(TINY, classes=5)
  twin, params = _twin(config, 6)
  again = weights.to_latte(params, config, rows=4, frames=6)
  state = _numpy(twin.state_dict())
  assert set(again) == set(state)
  for name, array in state.items():
    np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_positions_with_a_scale_go_out_in_the_table_or_not_at_all():
  config = dataclasses.replace(TINY, time_scale=0.25)
  table = weights.to_latte(_twin(config, 6)[1], config, rows=4, frames=6)["temp_embed"][0]
  np.testing.assert_array_equal(table[1], latte.sincos(config.width, (0, 4))[1])
  single = dataclasses.replace(config, conditioning="adaln_single", context_widths=(20,))
  with pytest.raises(weights.WeightsError, match=r"time_scale=0\.25 cannot be exported"):
    weights.to_text_latte({}, single)


@pytest.fixture(scope="module")
def text_twin():
  """diffusers' text-to-video model, its parameters redrawn, and ours."""
  diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra test")
  from benchmarks import torch_latte

  twin = diffusers.LatteTransformer3DModel(
    num_attention_heads=4,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=48,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=20,
    video_length=5,
  ).eval()
  torch_latte.redraw(twin, 1)
  config = dataclasses.replace(TINY, conditioning="adaln_single", context_widths=(20,))
  return twin, config, weights.from_text_latte(_numpy(twin.state_dict()), config)


@pytest.mark.parametrize("masked", [False, True], ids=["all text", "masked text"])
def test_text_to_video_is_that_of_diffusers(text_twin, masked):
  twin, config, params = text_twin
  rng = np.random.default_rng(5)
  latents = rng.standard_normal((2, 5, 8, 8, 4)).astype(np.float32)
  text = rng.standard_normal((2, 7, 20)).astype(np.float32)
  target = rng.standard_normal((2, 5, 8, 8, 8)).astype(np.float32)
  time = np.array([11, 777])
  mask = np.arange(7)[None] < np.array([[4], [7]]) if masked else None

  def loss(params):
    made = Latte(config).apply(
      {"params": params}, latents, time, context=jnp.asarray(text), context_mask=mask
    )
    return jnp.square(made - target).mean(), made

  (value, made), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  twin.zero_grad()
  bias = None
  if masked:  # the model repeats it for no frame: it is given one row for each
    bias = torch.tensor(np.where(mask, 0.0, -10000.0).astype(np.float32))
    bias = bias[:, None].repeat_interleave(5, 0)
  made_twin = twin(
    torch.tensor(np.moveaxis(latents, -1, 1)),
    torch.tensor(time),
    torch.tensor(text),
    bias,
    return_dict=False,
  )[0]
  value_twin = (made_twin - torch.tensor(np.moveaxis(target, -1, 1))).square().mean()
  value_twin.backward()
  _close(made, np.moveaxis(made_twin.detach().numpy(), 1, -1))
  _close(value, value_twin.item())
  gradients = weights.to_text_latte(gradients, config)
  expected = {name: p.grad.numpy() for name, p in twin.named_parameters()}
  assert set(gradients) == set(expected)
  for name, gradient in expected.items():
    if name.endswith("to_k.bias"):  # 0 up to rounding: see above
      scale = np.abs(expected[name.replace("bias", "weight")]).max()
      assert max(np.abs(gradients[name]).max(), np.abs(gradient).max()) <= 1e-5 * scale
    else:
      _close(gradients[name], gradient, name)


def test_a_text_to_video_model_of_one_frame_is_an_image_model(text_twin):
  twin, config, params = text_twin
  rng = np.random.default_rng(6)
  latents = rng.standard_normal((1, 1, 8, 8, 4)).astype(np.float32)
  text = rng.standard_normal((1, 3, 20)).astype(np.float32)
  made = Latte(config).apply({"params": params}, latents, np.array([40]), context=jnp.asarray(text))
  inputs = torch.tensor(np.moveaxis(latents, -1, 1)), torch.tensor([40]), torch.tensor(text)
  _close(made, np.moveaxis(twin(*inputs, return_dict=False)[0].detach().numpy(), 1, -1))


def test_pixart_becomes_the_spatial_blocks(text_twin):
  """PixArt's model is the text-to-video model without its temporal blocks."""
  diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra test")
  from benchmarks import torch_latte

  _, config, _ = text_twin
  pixart = diffusers.PixArtTransformer2DModel(
    num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
    cross_attention_dim=48, sample_size=8, patch_size=2, caption_channels=20,
    use_additional_conditions=False,
  ).eval()  # fmt: skip
  torch_latte.redraw(pixart, 2)
  shapes = jax.eval_shape(
    Latte(config).init, jax.random.key(0), jnp.zeros((1, 2, 8, 8, 4)), jnp.zeros(1), None,
    jnp.zeros((1, 3, 20)),
  )  # fmt: skip
  quiet = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.unbox(shapes)["params"])
  params = weights.from_pixart(_numpy(pixart.state_dict()), config, quiet)
  # Zeroed temporal blocks add nothing: each frame is then PixArt's image.
  rng = np.random.default_rng(7)
  latents = rng.standard_normal((1, 1, 8, 8, 4)).astype(np.float32)
  text = rng.standard_normal((1, 3, 20)).astype(np.float32)
  made = Latte(config).apply({"params": params}, latents, np.array([40]), context=jnp.asarray(text))
  expected = pixart(
    torch.tensor(np.moveaxis(latents[:, 0], -1, 1)),
    timestep=torch.tensor([40]),
    encoder_hidden_states=torch.tensor(text),
    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    return_dict=False,
  )[0]
  _close(made[:, 0], np.moveaxis(expected.detach().numpy(), 1, -1))


def test_the_time_embedding_is_exact_at_late_steps():
  made = latte.timestep_features(jnp.array([999.0]))
  rates = np.exp(-np.log(10_000.0) * np.arange(128) / 128)
  expected = np.concatenate([np.cos(999 * rates), np.sin(999 * rates)])
  np.testing.assert_allclose(made[0], expected, atol=1e-4)
