"""Layers against the reference formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.models import layers


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 1)])
def test_matmul_convolution_equals_lax_with_gradients(kernel, strides):
  x = _normal(0, (2, 3, 9, 8, 5))
  weights = _normal(1, (*kernel, 5, 4))

  def loss(method):
    return lambda x, w: jnp.sin(layers.convolve(x, w, strides, method)).sum()

  direct = jax.value_and_grad(loss("direct"), (0, 1))(x, weights)
  matmul = jax.value_and_grad(loss("matmul"), (0, 1))(x, weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), direct, matmul)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="unknown convolution method"):
    layers.convolve(jnp.zeros((1, 3, 3, 1)), jnp.zeros((3, 3, 1, 1)), method="fft")
  with pytest.raises(ValueError, match="unknown norm"):
    layers.Norm("batch").init(jax.random.key(0), jnp.zeros((1, 4)))
  with pytest.raises(ValueError, match="unknown activation"):
    layers.MLP(8, "relu").init(jax.random.key(0), jnp.zeros((1, 2, 4)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_temporal_convolution_starts_as_the_identity(frames, stride):
  module = layers.TemporalConv(stride=stride)
  x = _normal(0, (2, frames, 3, 4, 6))
  y = module.apply(module.init(jax.random.key(1), x), x)
  np.testing.assert_allclose(y, x[:, ::stride])
  assert y.shape[1] == -(-frames // stride)


def test_temporal_convolution_replicates_the_ends():
  module = layers.TemporalConv()
  x = _normal(0, (1, 4, 2, 2, 3))
  params = nn.meta.unbox(module.init(jax.random.key(1), x))
  kernel = _normal(2, (3, 3, 3))
  y = module.apply({"params": {**params["params"], "kernel": kernel}}, x)
  padded = jnp.concatenate([x[:, :1], x, x[:, -1:]], 1)
  expected = sum(padded[:, i : i + 4] @ kernel[i] for i in range(3))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_spatial_convolution_equals_flax():
  x = _normal(0, (2, 3, 8, 6, 4))
  ours = layers.SpatialConv(5)
  params = nn.meta.unbox(ours.init(jax.random.key(1), x))
  theirs = nn.Conv(5, (3, 3)).apply(params, x.reshape(6, 8, 6, 4)).reshape(2, 3, 8, 6, 5)
  np.testing.assert_allclose(ours.apply(params, x), theirs, rtol=1e-4, atol=1e-5)


def test_group_norm_equals_flax_on_every_frame():
  x = 3.0 + 2.0 * _normal(0, (2, 3, 4, 5, 8))
  ours = layers.GroupNorm(4)
  params = {"params": {"scale": _normal(1, (8,)), "bias": _normal(2, (8,))}}
  theirs = nn.GroupNorm(4, epsilon=1e-6).apply(params, x.reshape(6, 4, 5, 8)).reshape(x.shape)
  np.testing.assert_allclose(ours.apply(params, x), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "flax_norm"), [("rms", nn.RMSNorm), ("layer", nn.LayerNorm)])
def test_norms_equal_flax_and_compute_in_fp32(kind, flax_norm):
  x = 100.0 + _normal(0, (3, 64))
  ours = layers.Norm(kind, 1e-5)
  params = nn.meta.unbox(ours.init(jax.random.key(0), x))
  expected = flax_norm(epsilon=1e-5).apply(params, x)
  np.testing.assert_allclose(ours.apply(params, x), expected, rtol=2e-3, atol=2e-3)
  half = layers.Norm(kind, 1e-5, dtype="bfloat16").apply(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  reference = ours.apply(params, x.astype(jnp.bfloat16))
  np.testing.assert_allclose(half.astype(jnp.float32), reference, rtol=1e-2, atol=1e-2)
  assert not layers.Norm(kind, affine=False).init(jax.random.key(0), x)


def test_dense_keeps_fp32_parameters_with_names():
  module = layers.Dense(6, ("embed", "mlp"), use_bias=True, dtype="bfloat16")
  boxed = module.init(jax.random.key(0), jnp.zeros((2, 4)))["params"]
  assert boxed["kernel"].names == ("embed", "mlp")
  assert boxed["bias"].names == ("mlp",)
  assert boxed["kernel"].value.dtype == jnp.float32
  assert module.apply({"params": boxed}, jnp.zeros((2, 4))).dtype == jnp.bfloat16


def test_time_embedding_tells_times_apart():
  t = jnp.array([0.0, 0.001, 0.5, 1.0])
  e = layers.sinusoidal_embedding(t, 256)
  distances = jnp.linalg.norm(e[:, None] - e[None], axis=-1)
  assert (distances + 10.0 * jnp.eye(4)).min() > 0.1
  np.testing.assert_allclose(e[0, :128], 1.0)
  np.testing.assert_allclose(e[0, 128:], 0.0)


@pytest.mark.parametrize("method", ["direct", "matmul"])
def test_a_volume_convolution_is_the_3d_one(method):
  """On a video padded by repeating in time and by zeros in space; with strides."""
  model = layers.VolumeConv(5, (3, 4, 4), (2, 2, 2), (1, 1), method=method)
  video = jax.random.normal(jax.random.key(0), (2, 5, 8, 6, 3))
  params = nn.unbox(model.init(jax.random.key(1), video))["params"]
  padded = jnp.pad(layers.replicate_pad(video, 1, 1, 1), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
  expected = jax.lax.conv_general_dilated(
    padded, params["kernel"], (2, 2, 2), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
  )
  np.testing.assert_allclose(model.apply({"params": params}, video), expected, rtol=1e-4, atol=1e-5)
