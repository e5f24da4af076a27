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
from mgen_jax.models import backbone, positions
from mgen_jax.models import remat as remat_lib
from mgen_jax.models.backbone import Backbone, BackboneConfig
from mgen_jax.parallel.attention import kernels

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
  assert (config.head_dim, config.norm_eps, config.patch) == (128, 1e-5, (1, 2, 2))
  assert not config.use_bias
  assert 29.0e9 < _count(config) < 30.0e9


@pytest.mark.parametrize("size", ["1B", "5B", "7B", "9B", "17B"])
def test_named_sizes_have_their_parameters(size):
  assert _count(backbone.SIZES[size]) == pytest.approx(float(size[:-1]) * 1e9, rel=0.07)
  assert backbone.SIZES[size].heads % 4 == 0  # heads divide over the paper's tensor parallelism


def test_the_modulation_is_shared_by_the_layers():
  """One MLP of width x 6 width for all layers: 10.9B more would make it a 40B (movie_gen 2.1)."""
  deep, shallow = (dataclasses.replace(backbone.SIZES["30B"], layers=n) for n in (3, 2))
  width, hidden = deep.width, deep.mlp_width
  layer = 8 * width**2 + 3 * width * hidden + 6 * width + 2 * width
  assert _count(deep) - _count(shallow) == layer


def test_the_dit_arm_differs_as_in_the_papers_table():
  """movie_gen 2.6: LayerNorm, eps 1e-6, no affine, SiLU, biases; everything else identical."""
  base = backbone.SIZES["5B"]
  arm = backbone.dit_arm(base)
  changed = {
    f.name for f in dataclasses.fields(base) if getattr(base, f.name) != getattr(arm, f.name)
  }
  assert changed == {"norm", "norm_eps", "norm_affine", "activation", "use_bias"}
  tiny = backbone.dit_arm(TINY)
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      nn.meta.unbox(jax.eval_shape(Backbone(tiny).init, jax.random.key(0), *_inputs(tiny)))
    )
  ]
  assert not [name for name in names if "norm" in name and "context_norm" not in name]
  assert [name for name in names if "'mlp'" in name and "bias" in name]


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


def _tree(config):
  shapes = jax.eval_shape(Backbone(config).init, jax.random.key(0), *_inputs(config))["params"]
  leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(shapes))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def test_grouped_queries_equal_heads_that_share_their_keys():
  """GQA is multi-head attention in which groups of heads have equal keys and values."""
  grouped = dataclasses.replace(TINY, kv_heads=2, qk_norm=True)
  params = _random_params(grouped)
  shapes = _tree(grouped)
  assert shapes["layers/self_attention/key/kernel"] == (2, 32, 16)
  assert shapes["layers/cross_attention/value/kernel"] == (2, 32, 16)

  def repeat(path, leaf):
    names = [entry.key for entry in path]
    if names[-1] == "kernel" and names[-2] in ("key", "value"):
      heads = leaf.reshape(*leaf.shape[:2], 2, 8)
      return jnp.repeat(heads, 2, axis=2).reshape(*leaf.shape[:2], 32)
    return leaf

  full = jax.tree_util.tree_map_with_path(repeat, params)
  np.testing.assert_allclose(
    _run(grouped, params, *_inputs()),
    _run(dataclasses.replace(grouped, kv_heads=None), full, *_inputs()),
    rtol=1e-4,
    atol=1e-5,
  )
  shares = [backbone.flops(dataclasses.replace(TINY, kv_heads=n), (2, 4, 6), 5) for n in (1, 4)]
  assert shares[0]["self_attention"] * 8 == shares[1]["self_attention"] * 5


def test_rotary_positions_have_no_tables_and_no_limit():
  config = dataclasses.replace(TINY, positions="rotary")
  assert not [name for name in _tree(config) if "position" in name]
  params = _random_params(config)
  latents, time, context, mask = _inputs(config, grid=(2, 4, 16))  # 8 patches, the tables have 6
  base = _run(config, params, latents, time, context, mask)
  rolled = _run(config, params, jnp.roll(latents, 4, axis=3), time, context, mask)
  assert jnp.abs(jnp.roll(rolled, -4, axis=3) - base).max() > 1e-3  # order matters


def test_rotary_attention_depends_on_distances_only():
  """In each of the three dimensions: two patches moved together see each other as before."""
  grid, dim = (3, 4, 5), 16
  angles = positions.rotary_angles(grid, dim, 10_000.0)
  assert angles.shape == (60, 8)
  q, k = (jax.random.normal(jax.random.key(i), (dim,)) for i in range(2))
  everywhere = lambda x: jnp.broadcast_to(x, (1, 60, 1, dim))  # noqa: E731
  turned_q, turned_k = (positions.rotate(everywhere(x), angles).reshape(*grid, dim) for x in (q, k))

  def product(a, b):
    return float(turned_q[a] @ turned_k[b])

  for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 1)):
    moved = tuple(1 + s for s in step)
    assert product((0, 0, 0), step) == pytest.approx(product((1, 1, 1), moved), rel=1e-4)
    assert product((0, 0, 0), step) != pytest.approx(product((0, 0, 0), (0, 0, 0)), rel=1e-3)
  np.testing.assert_allclose(
    jnp.linalg.norm(turned_q, axis=-1), jnp.full(grid, jnp.linalg.norm(q)), rtol=1e-5
  )


def test_a_silent_cross_attention_starts_without_the_text():
  latents, time, context, mask = _inputs()
  shift = lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape)  # noqa: E731
  for silent in (True, False):
    config = dataclasses.replace(TINY, cross_zero_init=silent)
    params = nn.meta.unbox(_init(config))
    params = {**params, "head": jax.tree.map(shift, params["head"])}  # the head starts at zero
    made = [_run(config, params, latents, time, [sign * context[0]], mask) for sign in (1, -1)]
    assert bool(jnp.abs(made[0] - made[1]).max() < 1e-6) == silent


@pytest.mark.parametrize("method", ["interpolate", "extend"])
def test_position_tables_grow(method):
  small, large = _tree(TINY), dataclasses.replace(TINY, max_positions=(4, 6, 18))
  trained, fresh = _random_params(TINY), _random_params(large, seed=3)
  grown = backbone.grow_positions(trained, fresh, method)
  assert {name for name in small if name.startswith("position")} <= set(grown)
  for name in grown:
    if name != "position_width":
      jax.tree.map(np.testing.assert_array_equal, grown[name], trained[name])
  old, new = trained["position_width"], grown["position_width"]
  assert new.shape == (18, 32)
  if method == "interpolate":  # three patches where there was one: the middle one is the old one
    np.testing.assert_allclose(new[1::3], old, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new[2], (2 * old[0] + old[1]) / 3, rtol=1e-4, atol=1e-5)
  else:
    np.testing.assert_array_equal(new[:6], old)
    np.testing.assert_array_equal(new[6:], fresh["position_width"][6:])
    # What the smaller model could see, the larger one sees alike.
    np.testing.assert_allclose(
      _run(large, grown, *_inputs()), _run(TINY, trained, *_inputs()), rtol=1e-4, atol=1e-5
    )


def test_position_tables_grow_from_one_frame_and_never_shrink():
  one, many = jnp.ones((1, 3)), jnp.arange(12.0).reshape(4, 3)
  for method in positions.GROWTH:  # between one position there is nothing to interpolate
    grown = positions.grow(one, many, method)
    np.testing.assert_array_equal(grown, many.at[0].set(1.0))
    np.testing.assert_array_equal(positions.grow(many, -many, method), many)
    with pytest.raises(ConfigError, match="cannot shrink"):
      positions.grow(many, one, method)
  with pytest.raises(ConfigError, match="position_growth"):
    positions.grow(one, many, "tile")


def test_only_the_self_attention_is_told_how_to_cross_the_context_axis(monkeypatch):
  seen = []

  def attention(q, k, v, **options):
    seen.append((q.shape[1] == k.shape[1], options.get("context_parallel")))
    return q

  monkeypatch.setattr(backbone, "attention", attention)
  config = dataclasses.replace(TINY, context_parallel="ring")
  jax.eval_shape(Backbone(config).init, jax.random.key(0), *_inputs(config))
  assert set(seen) == {(True, "ring"), (False, None)}


@pytest.mark.parametrize(
  "remat",
  [*sorted(remat_lib.POLICIES), "save:projection,mlp_projection", "offload:attention", "mine"],
)
def test_remat_and_unroll_change_no_value_and_no_gradient(remat, monkeypatch):
  monkeypatch.setattr(remat_lib, "POLICIES", dict(remat_lib.POLICIES))
  remat_lib.add_policy("mine", jax.checkpoint_policies.dots_saveable)
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


def test_remat_policies_keep_what_they_name():
  """Saved names are not computed again: the backward pass has fewer matrix products."""
  params, inputs = _random_params(TINY), _inputs()

  def products(policy):
    config = dataclasses.replace(TINY, remat=policy, scan_unroll=2)
    loss = lambda p: jnp.square(Backbone(config).apply({"params": p}, *inputs)).sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

  counts = {name: products(name) for name in ("none", "save_dots", "save_projections", "full")}
  assert counts["none"] < counts["save_projections"] < counts["full"]
  assert counts["save_dots"] < counts["full"]
  assert products("save:projection,attention,mlp_projection") < counts["save_projections"]


def _loops(jaxpr):
  """The scans over layers of a program, in their order."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan" and equation.params["length"] == TINY.layers:
      yield equation
    else:
      for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        yield from _loops(inner) if hasattr(inner, "eqns") else ()


def _kept(config):
  """What the layers keep for their backward pass: the results of the forward scan."""
  params, inputs = _random_params(config), _inputs(config)
  loss = lambda p: jnp.square(Backbone(config).apply({"params": p}, *inputs)).sum()  # noqa: E731
  forward = next(_loops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
  return [variable.aval for variable in forward.outvars]


@pytest.mark.parametrize("kernel", ["plain", "blockwise"])
def test_the_result_of_an_attention_is_kept_once(kernel, monkeypatch):
  monkeypatch.setattr(kernels, "choose", lambda q, k: kernel)
  kept = _kept(dataclasses.replace(TINY, remat="save_attention"))
  sizes = [aval.size for aval in kept]
  # Of both layers, for all tokens: the layer's input, and of each of its two attentions the result.
  assert sizes.count(2 * 2 * 12 * TINY.width) == 3, kept


def test_an_offloaded_input_waits_in_the_hosts_memory():
  kept = _kept(dataclasses.replace(TINY, remat="offload"))
  places = {aval.shape: str(aval.memory_space) for aval in kept}
  assert "host" in places[2, 2, 12, 32].lower(), places


def test_unknown_remat_policies_are_refused():
  for name in ("some", "save:everything", "save:"):
    with pytest.raises(ConfigError, match="remat"):
      remat_lib.policy(name)
  with pytest.raises(ConfigError, match="exists already"):
    remat_lib.add_policy("full", None)


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
    dataclasses.replace(TINY, kv_heads=1, positions="rotary"),
  ],
  ids=["llama", "dit", "grouped"],
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
  with pytest.raises(ConfigError, match="does not divide into 5 heads"):
    dataclasses.replace(TINY, heads=5)
  with pytest.raises(ConfigError, match="kv_heads 3"):
    dataclasses.replace(TINY, kv_heads=3)
  with pytest.raises(ConfigError, match="at least 6"):
    dataclasses.replace(TINY, heads=8, positions="rotary")
  with pytest.raises(ConfigError, match="unknown remat policy"):
    run(dataclasses.replace(TINY, remat="some"), latents, time, context, mask)
