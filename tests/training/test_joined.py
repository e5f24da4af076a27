"""Rows that are joined are treated as they would be alone, and only what lies alike is joined."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mgen_jax.config import OptimizerConfig
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training.outline import outline

SHAPES = {"table": (5, 8), "text": (3, 8), "steps": (2, 3, 8), "kernel": (8, 4), "large": (99, 900)}
CONFIG = OptimizerConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()[:2]), ("fsdp",))


def _update(specs, mesh):
  """An update of `SHAPES`, its arguments, and where these lie."""
  keys = jax.random.split(jax.random.key(0), len(SHAPES))
  params = {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
  }
  optimizer = optimizer_lib.make_optimizer(CONFIG, 10)

  def update(params, state, gradients):
    updates, new = optimizer.update(gradients, state, params)
    return jax.tree.map(lambda p, u: p + u, params, updates), new

  lies = {name: NamedSharding(mesh, specs.get(name, PartitionSpec())) for name in SHAPES}
  state = optimizer.init(params)
  whole = NamedSharding(mesh, PartitionSpec())
  of_state = optax.tree.map_params(
    optimizer, lambda _, s: s, state, lies, transform_non_params=lambda _: whole
  )
  arguments, shardings = (params, state, jax.tree.map(jnp.sin, params)), (lies, of_state, lies)
  return update, jax.device_put(arguments, shardings), shardings


def _joined(text):
  return text.count("call @_join(")


def test_rows_give_the_numbers_that_each_array_gives(mesh):
  split = PartitionSpec(None, "fsdp")
  specs = {"table": split, "text": split, "steps": PartitionSpec(None, None, "fsdp")}
  update, arguments, shardings = _update(specs, mesh)
  alone = jax.jit(outline(update))
  rows = jax.jit(outline(update, shardings), out_shardings=shardings[:2])
  for a, b in zip(
    jax.tree.leaves(alone(*arguments)), jax.tree.leaves(rows(*arguments)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  lowered = rows.lower(*arguments)
  text = lowered.as_text()
  assert _joined(text) == 4  # gradients, two moments, parameters; the kernel has another width
  assert text.count("\n") < alone.lower(*arguments).as_text().count("\n")
  assert "all-gather" not in lowered.compile().as_text()  # rows lie whole: nothing is sent


@pytest.mark.parametrize(
  "specs",
  [
    {"table": PartitionSpec("fsdp"), "text": PartitionSpec("fsdp"), "steps": PartitionSpec("fsdp")},
    {"text": PartitionSpec(None, "fsdp"), "steps": PartitionSpec(None, "fsdp")},
  ],
  ids=["rows over devices", "each its own way"],
)
def test_what_lies_otherwise_stays_alone(specs, mesh):
  update, arguments, shardings = _update({}, mesh)
  lies = {name: NamedSharding(mesh, specs.get(name, PartitionSpec())) for name in SHAPES}
  assert _joined(jax.jit(outline(update, shardings)).lower(*arguments).as_text()) == 4
  shardings = (lies, shardings[1], lies)  # where the moments lie does not matter: one suffices
  assert _joined(jax.jit(outline(update, shardings)).lower(*arguments).as_text()) == 0
