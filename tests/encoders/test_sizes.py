"""The named encoders have the parameters of the public models; tables of positions stretch."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mgen_jax.encoders import families, sizes
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import clip, t5
from mgen_jax.models.llama import LlamaConfig
from tests.encoders import toys

# Parameters: whole numbers where the public model's are known to the last one, else millions.
COUNTS = {
  "ul2": 8_721_797_632,
  "t5-base": 110e6,
  "byt5-small": 218e6,
  "byt5-base": 415e6,
  "byt5-large": 864e6,
  "byt5-xl": 2_614e6,
  "byt5-xxl": 8_990e6,
  "metaclip-l-text-256": 123e6,
  "metaclip-h-text-256": 353e6,
  "metaclip-bigg-text-256": 693e6,
  "metaclip-l-vision": 303e6,
  "metaclip-h-vision": 631e6,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_named_encoder_has_the_parameters_of_the_public_model(name):
  size, wanted = sizes.named(name), COUNTS[name]
  count = families.count_parameters(size.family, size.config)
  if size.family.startswith("clip") and size.config.projection:  # counted without the projection
    count -= size.config.width * size.config.projection
  if isinstance(wanted, int):
    assert count == wanted
  else:
    assert abs(count - wanted) < 0.5e6 + 1e-3 * wanted


def test_every_named_encoder_has_a_rule_for_every_parameter():
  for name, size in sizes.SIZES.items():
    boxed = nn.unbox(families.boxed_shapes(size.family, size.config))
    paths = {
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, _ in jax.tree_util.tree_leaves_with_path(boxed)
    }
    rules = families.FAMILIES[size.family].rules(size.config)
    assert {rule.target for rule in rules} == paths, name
    assert len({rule.source for rule in rules}) == len(rules), name


def test_a_config_survives_the_public_form():
  for name in ("ul2", "t5-base", "umt5-xxl", "metaclip-h-text", "metaclip-h-vision", "llama3-8b",
               "llama3.1-8b"):  # fmt: skip
    size = sizes.named(name)
    family = families.FAMILIES[size.family]
    names = {rule.source for rule in family.rules(size.config)}
    assert family.from_hf(family.to_hf(size.config), names) == size.config


def test_rotary_positions_of_other_kinds_are_refused():
  family = families.FAMILIES["llama"]
  hf = family.to_hf(sizes.named("llama3.1-8b").config)
  hf["rope_scaling"]["rope_type"] = "yarn"
  with pytest.raises(UserError, match="rotary positions of type 'yarn'"):
    family.from_hf(hf, ())
  hf["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}
  with pytest.raises(UserError, match="without low_freq_factor, high_freq_factor, original_max"):
    family.from_hf(hf, ())
  with pytest.raises(ConfigError, match="rope_low is less than rope_high"):
    LlamaConfig(rope_factor=8.0, rope_low=4.0)


def test_an_unknown_name_is_refused():
  with pytest.raises(ConfigError, match="metaclip-h-text"):
    sizes.named("metaclip-h-txt")


def test_buckets_of_distances_are_exact_then_logarithmic_and_signed():
  buckets = t5.distance_buckets(400, 32, 128)
  at = lambda d: int(buckets[d + 399])  # noqa: E731
  assert [at(-d) for d in range(8)] == list(range(8))
  assert [at(d) for d in range(1, 8)] == [16 + d for d in range(1, 8)]
  assert (at(-128), at(128), at(-399), at(399)) == (15, 31, 15, 31)
  # Where a bf16 logarithm goes wrong.
  assert (at(-45), at(-46), at(-90), at(-91)) == (12, 13, 14, 15)
  assert np.all(np.diff(buckets[:400]) <= 0) and np.all(np.diff(buckets[400:]) >= 0)


def test_positions_stretch_as_long_clip_does():
  table = np.random.default_rng(0).normal(size=(77, 5)).astype(np.float32)
  made = np.asarray(clip.stretch_positions(jnp.asarray(table), 248))
  np.testing.assert_array_equal(made[:20], table[:20])
  slow = []  # row 20 + 4 k + j is a quarter of the way from 20 + k to 21 + k
  for k in range(57):
    low = table[20 + k]
    step = table[21 + k] - low if k < 56 else table[76] - table[75]
    slow += [low + step * j / 4 for j in range(4)]
  np.testing.assert_allclose(made[20:], slow, atol=1e-5)
  assert clip.stretch_positions(jnp.asarray(table), 256).shape == (256, 5)
  with pytest.raises(ConfigError, match="tables only grow"):
    clip.stretch_positions(jnp.asarray(table), 60)


def test_only_positions_and_biases_train_under_the_mask():
  params = nn.unbox(families.FAMILIES["clip_text"].init(toys.CLIP))
  mask = clip.positions_and_biases(params)
  optimizer = optax.chain(
    optax.masked(optax.sgd(1.0), mask),
    optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)),
  )
  gradients = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(gradients, optimizer.init(params))
  changed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(leaf)
  }
  assert "positions" in changed and "layers/query/bias" in changed and "norm/bias" in changed
  assert all(name == "positions" or name.endswith("/bias") for name in changed)
