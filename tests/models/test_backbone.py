"""The transformer: size, invariances, FLOPs."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.errors import ConfigError
from mgen_jax.models import backbone
from mgen_jax.models.backbone import Backbone, BackboneConfig

TINY = BackboneConfig(
  layers=2,
  width=32,
  heads=4,
  mlp_width=48,
  in_channels=4,
  out_channels=4,
  max_positions=(4, 6, 6),
  context_widths=(24,),
  dtype="float32",
  remat="none",
)


def _inputs(config=TINY, batch=2, grid=(2, 4, 6), texts=(5,)):
  keys = jax.random.split(jax.random.key(7), 2 + len(texts))
  latents = jax.random.normal(keys[0], (batch, *grid, config.in_channels))
  time = jax.random.uniform(keys[1], (batch,))
  context = [
    jax.random.normal(key, (batch, length, width))
    for key, length, width in zip(keys[2:], texts, config.context_widths, strict=True)
  ]
  mask = [jnp.arange(x.shape[1])[None] < jnp.array([[3], [x.shape[1]]]) for x in context]
  return latents, time, context, mask


@functools.cache
def _init(config, seed=0, texts=(5,)):
  inputs = _inputs(config, texts=texts)
  return jax.jit(Backbone(config).init)(jax.random.key(seed), *inputs)["params"]


def _random_params(config, seed=0):
  """Parameters all random: at the start the head is zero and hides everything."""
  params = nn.meta.unbox(_init(config, seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def _run(config, params, *inputs, **options):
  return jax.jit(lambda p, *a: Backbone(config).apply({"params": p}, *a, **options))(
    params, *inputs
  )


def _count(config):
  inputs = jax.eval_shape(
    lambda: (
      jnp.zeros((1, 2, 4, 4, config.in_channels)),
      jnp.zeros((1,)),
      [jnp.zeros((1, 3, width)) for width in config.context_widths],
    )
  )
  params = jax.eval_shape(Backbone(config).init, jax.random.key(0), *inputs)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_the_30b_model_has_29_to_30_billion_parameters():
  config = backbone.SIZES["30B"]
  assert (config.layers, config.width, config.heads, config.mlp_width) == (48, 6144, 48, 16384)
  assert 29.0e9 < _count(config) < 30.0e9


@pytest.mark.parametrize(("size", "low", "high"), [("5B", 4.8e9, 5.1e9), ("1B", 0.9e9, 1.1e9)])
def test_named_sizes_have_their_parameters(size, low, high):
  assert low < _count(backbone.SIZES[size]) < high


def test_tokens_of_the_longest_paper_bucket():
  """256 frames at 768 px: 73,728 tokens (movie_gen 2.2), within the position tables."""
  config = backbone.SIZES["30B"]
  video = jax.eval_shape(
    Backbone(dataclasses.replace(config, layers=1)).init_with_output,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 32, 96, 96, 16), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
    [jax.ShapeDtypeStruct((1, 4, width), jnp.float32) for width in config.context_widths],
  )[0]
  assert video.shape == (1, 32, 96, 96, 16)
  patches = jax.eval_shape(
    lambda x: backbone.patchify(x, config.patch), jax.ShapeDtypeStruct((1, 32, 96, 96, 16), "f4")
  )
  assert math.prod(patches.shape[1:4]) == 73_728
  assert patches.shape[-1] == 64


def test_parameters_are_fp32_stacked_over_layers_and_named():
  boxed = Backbone(dataclasses.replace(TINY, dtype="bfloat16")).init(jax.random.key(0), *_inputs())[
    "params"
  ]
  for path, box in jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  ):
    name = jax.tree_util.keystr(path)
    assert isinstance(box, nn.LogicallyPartitioned), name
    assert len(box.names) == box.value.ndim, name
    assert box.value.dtype == jnp.float32, name
    if "['layers']" in name:
      assert box.names[0] == "layers" and box.value.shape[0] == TINY.layers, name


@pytest.mark.parametrize("remat", sorted(set(backbone.REMAT_POLICIES) - {"offload"}))
def test_remat_and_unroll_change_no_value_and_no_gradient(remat):
  params, inputs = _random_params(TINY), _inputs()

  def gradient(config):
    return jax.jit(
      jax.value_and_grad(lambda p: jnp.square(Backbone(config).apply({"params": p}, *inputs)).sum())
    )(params)

  expected = gradient(TINY)
  actual = gradient(dataclasses.replace(TINY, remat=remat, scan_unroll=2))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected, actual
  )


def test_padded_text_changes_nothing():
  params = _random_params(TINY)
  latents, time, context, mask = _inputs()
  expected = _run(TINY, params, latents, time, context, mask)
  noisy = [jnp.where(m[..., None], x, 100.0) for x, m in zip(context, mask, strict=True)]
  np.testing.assert_allclose(
    _run(TINY, params, latents, time, noisy, mask), expected, rtol=1e-4, atol=1e-5
  )
  seen = _run(TINY, params, latents, time, [2 * context[0][:, ::-1]], mask)
  assert jnp.abs(seen - expected).max() > 1e-3


def test_several_text_encoders_are_concatenated():
  config = dataclasses.replace(TINY, context_widths=(24, 16, 8))
  params = _random_params_several(config)
  latents, time, context, mask = _inputs(config, texts=(5, 4, 6))
  made = _run(config, params, latents, time, context, mask)
  assert made.shape == latents.shape
  for index in range(3):
    changed = [x if i != index else -x for i, x in enumerate(context)]
    other = _run(config, params, latents, time, changed, mask)
    assert jnp.abs(other - made).max() > 1e-4


def _random_params_several(config):
  params = nn.meta.unbox(_init(config, texts=(5, 4, 6)))
  return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), params)


def test_time_modulation_and_position_all_matter():
  params = _random_params(TINY)
  latents, time, context, mask = _inputs()
  base = _run(TINY, params, latents, time, context, mask)
  later = _run(TINY, params, latents, 1.0 - time, context, mask)
  assert jnp.abs(later - base).max() > 1e-3
  vector = jnp.ones((2, TINY.width))
  moved = jax.jit(
    lambda p: Backbone(TINY).apply({"params": p}, latents, time, context, mask, modulation=vector)
  )(params)
  assert jnp.abs(moved - base).max() > 1e-3
  rolled = _run(TINY, params, jnp.roll(latents, 2, axis=3), time, context, mask)
  assert jnp.abs(jnp.roll(rolled, -2, axis=3) - base).max() > 1e-3


def test_patches_return_to_their_places():
  x = jnp.arange(2 * 4 * 4 * 6 * 3.0).reshape(2, 4, 4, 6, 3)
  for patch in ((1, 2, 2), (2, 2, 3), (1, 1, 1)):
    patches = backbone.patchify(x, patch)
    assert patches.shape[1:4] == (4 // patch[0], 4 // patch[1], 6 // patch[2])
    np.testing.assert_array_equal(backbone.unpatchify(patches, patch), x)


def test_half_precision_stays_close_and_returns_fp32():
  params, inputs = _random_params(TINY), _inputs()
  full = _run(TINY, params, *inputs)
  half = _run(dataclasses.replace(TINY, dtype="bfloat16"), params, *inputs)
  assert half.dtype == jnp.float32
  assert jnp.abs(half - full).mean() < 0.05 * jnp.abs(full).mean()


@pytest.mark.parametrize(
  "config",
  [
    TINY,
    dataclasses.replace(backbone.dit_arm(TINY), qk_norm=True, cross_norm=True, patch=(1, 1, 1)),
  ],
  ids=["llama", "dit"],
)
def test_flops_equal_the_lowered_program(config):
  config = dataclasses.replace(
    config, layers=1, width=256, mlp_width=512, in_channels=16, out_channels=16
  )
  config = dataclasses.replace(config, context_widths=(192,))
  grid, length = (2, 4, 6), 40
  inputs = _inputs(config, batch=1, grid=grid, texts=(length,))[:3]
  params = jax.eval_shape(Backbone(config).init, jax.random.key(0), *inputs)
  flops = jax.jit(Backbone(config).apply).lower(params, *inputs).cost_analysis()["flops"]
  formula = sum(backbone.flops(config, grid, length).values())
  assert formula == pytest.approx(flops, rel=0.02)


def test_flops_grow_with_layers_and_count_every_text_encoder():
  one = backbone.flops(
    dataclasses.replace(backbone.SIZES["30B"], layers=1), (32, 96, 96), (1, 2, 3)
  )
  all_layers = backbone.flops(backbone.SIZES["30B"], (32, 96, 96), (1, 2, 3))
  for part in ("self_attention", "self_scores", "cross_attention", "cross_scores", "mlp"):
    assert all_layers[part] == 48 * one[part]
  # The paper's largest stage: 12.8 + 19.2 = 32 PFLOP for a training step of one clip, forward and
  # backward (movie_gen 4.3, derived there from 6 N D and the attention term).
  training = 3 * sum(backbone.flops(backbone.SIZES["30B"], (32, 96, 96), (300, 256, 100)).values())
  assert 28e15 < training < 36e15


def test_impossible_inputs_name_the_fix():
  params, (latents, time, context, mask) = _random_params(TINY), _inputs()

  def run(config, *inputs):
    jax.eval_shape(Backbone(config).apply, {"params": params}, *inputs)

  with pytest.raises(ConfigError, match=r"max_positions\[1\] to 8"):
    run(TINY, jnp.zeros((2, 1, 16, 4, 4)), time, context, mask)
  with pytest.raises(ConfigError, match="latent width 5 is not divisible"):
    run(TINY, jnp.zeros((2, 1, 4, 5, 4)), time, context, mask)
  with pytest.raises(ConfigError, match="context_widths"):
    run(TINY, latents, time, [context[0][..., :5]], mask)
  with pytest.raises(ConfigError, match="unknown remat policy"):
    run(dataclasses.replace(TINY, remat="some"), latents, time, context, mask)
