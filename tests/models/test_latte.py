"""Latte: sizes, costs, and what each variant lets see what. Parity is in test_latte_parity."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.errors import ConfigError
from mgen_jax.models import latte
from mgen_jax.models.latte import Latte, LatteConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules

TINY = LatteConfig(layers=2, width=32, heads=2, max_frames=6)

# spec: measured on the released code. Trainable parameters, unconditional.
PARAMETERS = {
  "S/2": 32_480_672, "B/2": 129_547_040, "L/2": 456_815_648, "XL/2": 673_681_568,
  "S/4": 32_536_064, "B/4": 129_657_728, "L/4": 456_963_200, "XL/4": 673_847_552,
  "S/8": 32_757_632, "B/8": 130_100_480, "L/8": 457_553_408, "XL/8": 674_511_488,
}  # fmt: skip


def _inputs(config, frames=4, images=0, batch=2, size=4):
  rng = np.random.default_rng(0)
  shape = (batch, frames + images, size, size, config.in_channels)
  inputs = {
    "latents": jnp.asarray(rng.standard_normal(shape), jnp.float32),
    "time": jnp.arange(batch) * 500 + 3,
  }
  if config.classes:
    shape = (batch, 1 + images) if images else (batch,)
    inputs["labels"] = jnp.asarray(rng.integers(0, config.classes, shape))
  if config.context_widths:
    inputs["context"] = jnp.asarray(rng.standard_normal((batch, 3, config.context_widths[0])))
  return inputs


def _shapes(config, **inputs):
  inputs = {**_inputs(config, frames=config.frame_stride, batch=1, size=config.patch), **inputs}
  return nn.unbox(jax.eval_shape(Latte(config).init, jax.random.key(0), **inputs))["params"]


def _params(config, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
  return jax.tree.map(draw, _shapes(config))


@functools.partial(jax.jit, static_argnames=("config", "images"))
def _run(config, params, inputs, images=0):
  return Latte(config).apply({"params": params}, **inputs, images=images)


def _count(config):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(config)))


def test_every_size_has_exactly_the_parameters_of_the_released_one():
  assert set(PARAMETERS) == set(latte.SIZES)
  assert {name: _count(latte.size(name)) for name in latte.SIZES} == PARAMETERS
  classes = {"S/2": 32_519_840, "B/2": 129_625_376, "L/2": 456_920_096, "XL/2": 673_799_072}
  assert {name: _count(latte.size(name, classes=101)) for name in classes} == classes


def test_the_variants_have_about_as_many_parameters():
  counts = {v: _count(latte.size("XL/2", variant=v)) for v in (1, 2, 3, 4)}
  assert latte.size("XL/2", variant=3).layers == 23
  assert counts == {1: 673_681_568, 2: 673_681_568, 3: 676_355_360, 4: 673_713_824}


def test_text_to_video_has_the_parameters_of_the_released_one():
  config = latte.size("XL/2", layers=56, conditioning="adaln_single", context_widths=(4096,))
  assert _count(config) == 1_057_246_880


@pytest.mark.parametrize(
  ("name", "expected"),
  [("S/2", 187.26), ("B/2", 728.21), ("L/2", 2570.21), ("XL/2", 3785.93)],
)
def test_flops_are_those_measured_on_the_released_code(name, expected):
  """Which computes the modulation once for each token; ours does once for each clip."""
  config, shape = latte.size(name), (16, 32, 32)
  theirs = latte.flops(config, shape, per_token_modulation=True)
  assert round(sum(theirs.values()) / 1e9, 2) == expected
  ours = sum(latte.flops(config, shape).values()) / 1e9
  assert 0.98 < ours / expected < 1


ABLATIONS = [
  dict(zip(("variant", "embedding", "conditioning", "time_encoding"), values, strict=True))
  for values in itertools.product(
    (1, 2, 3, 4), ("uniform", "compression"), ("s_adaln", "all_tokens"), ("sincos", "rotary")
  )
]


def _dots(jaxpr, times=1):
  """FLOPs of all matrix products of a jaxpr, those in scans as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (left, _), _ = equation.params["dimension_numbers"]
      contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
      total += 2 * times * math.prod(equation.outvars[0].aval.shape) * contracted
    inner = times * equation.params.get("length", 1)
    for value in equation.params.values():
      for part in value if isinstance(value, tuple | list) else (value,):
        part = getattr(part, "jaxpr", part)
        if hasattr(part, "eqns"):
          total += _dots(part, inner)
  return total


@pytest.mark.parametrize("changes", ABLATIONS, ids=lambda c: "-".join(map(str, c.values())))
def test_the_formula_counts_what_every_ablation_computes(changes):
  config = dataclasses.replace(TINY, layers=4, classes=3, **changes)
  inputs = _inputs(config, batch=1)
  run = lambda p, x: Latte(config).apply({"params": p}, **x)  # noqa: E731
  made = jax.eval_shape(run, _shapes(config), inputs)
  assert made.shape == (1, 4, 4, 4, 8)
  counted = _dots(jax.make_jaxpr(run)(_shapes(config), inputs).jaxpr)
  assert counted == sum(latte.flops(config, (4, 4, 4)).values())


@pytest.mark.parametrize("images", [0, 2])
def test_the_formula_counts_text_and_images(images):
  config = dataclasses.replace(TINY, conditioning="adaln_single", context_widths=(8,))
  inputs = _inputs(config, images=images, batch=1)
  if images:
    inputs["context"] = jnp.zeros((1, 1 + images, 3, 8))
  run = lambda p, x: Latte(config).apply({"params": p}, **x, images=images)  # noqa: E731
  counted = _dots(jax.make_jaxpr(run)(_shapes(config), inputs).jaxpr)
  assert counted == sum(latte.flops(config, (4, 4, 4), [3], images=images).values())


def test_a_fresh_model_gives_zero():
  config = dataclasses.replace(TINY, classes=3)
  inputs = _inputs(config)
  made = jax.jit(lambda key: Latte(config).init_with_output(key, **inputs)[0])(jax.random.key(0))
  assert made.shape == (2, 4, 4, 4, 8) and not np.asarray(made).any()


def _changed_frames(config, frame, images=0):
  """Which outputs change with one frame of the input."""
  params, inputs = _params(config), _inputs(config, images=images)
  other = {**inputs, "latents": inputs["latents"].at[:, frame].add(1.0)}
  made, plain = (np.asarray(_run(config, params, x, images)) for x in (other, inputs))
  change = np.abs(made - plain).max((0, 2, 3, 4))
  return [int(i) for i in np.flatnonzero(change > 1e-6)]


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_every_frame_sees_every_other_and_images_only_themselves(variant):
  config = dataclasses.replace(TINY, variant=variant, classes=3)
  assert _changed_frames(config, 1, images=2) == [0, 1, 2, 3]
  assert _changed_frames(config, 5, images=2) == [5]


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_images_beside_a_clip_do_not_change_it(variant):
  config = dataclasses.replace(TINY, variant=variant)
  params, inputs = _params(config), _inputs(config, images=2)
  joint = _run(config, params, inputs, 2)
  inputs["latents"] = inputs["latents"][:, :4]
  alone = _run(config, params, inputs)
  np.testing.assert_allclose(joint[:, :4], alone, atol=2e-6)


@pytest.mark.parametrize("encoding", ["sincos", "rotary"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_the_order_of_frames_matters(variant, encoding):
  """Without an encoding of time, turning the clip round would turn the output round."""
  config = dataclasses.replace(TINY, variant=variant, time_encoding=encoding)
  params, inputs = _params(config), _inputs(config)
  forward = _run(config, params, inputs)
  inputs["latents"] = inputs["latents"][:, ::-1]
  backward = _run(config, params, inputs)[:, ::-1]
  assert np.abs(forward - backward).max() > 1e-3


@pytest.mark.parametrize(("scale", "directions"), [(1.0, (2, 2)), (0.25, (7, 3))])
def test_a_scale_sets_few_frames_and_places_apart(scale, directions):
  """How many directions a linear map can tell 8 frames, and 4 columns, apart by."""
  config = dataclasses.replace(TINY, width=192, heads=6, position_scale=scale, time_scale=scale)
  frames, row = latte.frame_positions(config, 8), latte.patch_positions(config, 1, 4)
  for table, count in zip((frames, row), directions, strict=True):
    sizes = np.linalg.svd(table - table.mean(0), compute_uv=False)
    assert (sizes > sizes[0] / 3).sum() == count
  inputs = _inputs(TINY)
  scaled = dataclasses.replace(TINY, time_scale=scale)
  params = _params(TINY)
  assert (np.abs(_run(scaled, params, inputs) - _run(TINY, params, inputs)).max() > 1e-3) == (
    scale != 1.0
  )


def test_rotary_time_depends_on_distances_only():
  """One layer of attention over time: a still clip gives the same for all frames."""
  config = dataclasses.replace(TINY, time_encoding="rotary")
  params, inputs = _params(config), _inputs(config)
  still = jnp.broadcast_to(inputs["latents"][:, :1], inputs["latents"].shape)
  made = _run(config, params, {**inputs, "latents": still})
  np.testing.assert_allclose(made, np.broadcast_to(made[:, :1], made.shape), atol=1e-5)


def test_the_condition_reaches_the_output():
  for conditioning in ("s_adaln", "all_tokens"):
    config = dataclasses.replace(TINY, classes=3, conditioning=conditioning)
    params, inputs = _params(config), _inputs(config)
    made = _run(config, params, inputs)
    for change in ({"labels": (inputs["labels"] + 1) % 3}, {"time": inputs["time"] + 100}):
      other = _run(config, params, {**inputs, **change})
      assert np.abs(made - other).max() > 1e-4, (conditioning, change)


def test_images_follow_their_own_text():
  config = dataclasses.replace(TINY, conditioning="adaln_single", context_widths=(8,))
  params, inputs = _params(config), _inputs(config, images=2)
  text = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 3, 8)), jnp.float32)
  texts = (text.at[:, 2].add(1.0), text)
  made, plain = (np.asarray(_run(config, params, {**inputs, "context": t}, 2)) for t in texts)
  change = np.abs(made - plain).max((0, 2, 3, 4))
  assert [int(i) for i in np.flatnonzero(change > 1e-6)] == [5]  # the second image


def test_unrolling_and_remat_change_nothing():
  config = dataclasses.replace(TINY, layers=4)
  params, inputs = _params(config), _inputs(config)

  def gradient(config):
    def loss(params):
      return jnp.square(_run(config, params, inputs)).mean()

    return jax.jit(jax.grad(loss))(params)

  plain = gradient(config)
  other = gradient(dataclasses.replace(config, scan_unroll=2, remat="save_attention"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)


@pytest.mark.parametrize("changes", [{"fsdp": 2, "tensor": 2, "context": 2}])
def test_a_mesh_changes_nothing(changes):
  config = dataclasses.replace(TINY, classes=3)
  params, inputs = _params(config), _inputs(config, images=2, batch=4)
  alone = np.asarray(_run(config, params, inputs, 2))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**changes))
  with mesh_lib.use(mesh):
    boxed = jax.eval_shape(Latte(config).init, jax.random.key(0), **_inputs(config))["params"]
    placed = jax.device_put(params, rules.tree_shardings(mesh, boxed))
    made = jax.jit(lambda p, x: Latte(config).apply({"params": p}, **x, images=2))(placed, inputs)
    np.testing.assert_allclose(made, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
  ("config", "inputs", "message"),
  [
    (TINY, {"frames": 7}, "7 frames exceed the time table's 6: raise max_frames"),
    (dataclasses.replace(TINY, embedding="compression"), {"frames": 5}, "tubes of time_stride 2"),
    (
      dataclasses.replace(TINY, embedding="compression"),
      {"images": 2},
      "needs embedding 'uniform'",
    ),
    (TINY, {"size": 5}, "not divisible by the patch size 2"),
  ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(config, inputs, message):
  run = functools.partial(_run, config, images=inputs.get("images", 0))
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(run, _shapes(config), _inputs(config, **inputs))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": 3}, "use 4"),
    ({"variant": 4, "heads": 1}, "variant 4 halves them"),
    ({"classes": 2, "context_widths": (3,)}, "condition on one"),
  ],
)
def test_configs_that_contradict_themselves_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(TINY, **changes)


def test_an_unknown_size_is_refused():
  with pytest.raises(ConfigError, match="XL/2"):
    latte.size("XXL/2")
