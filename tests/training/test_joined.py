"""Arrays that are joined are treated as they would be alone, where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mgen_jax.config import OptimizerConfig
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training.outline import outline

SHAPES = {"table": (6, 8), "text": (3, 8), "steps": (2, 3, 8), "kernel": (8, 4), "large": (99, 900)}
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


LIES = {  # over rows, over the last dimension, and (the kernel) whole on each device
  "table": PartitionSpec("fsdp"),
  "text": PartitionSpec(None, "fsdp"),
  "steps": PartitionSpec(None, None, "fsdp"),
}


def test_parts_of_one_give_the_numbers_that_each_array_gives(mesh):
  update, arguments, shardings = _update(LIES, mesh)
  alone = jax.jit(outline(update))
  joined = jax.jit(outline(update, shardings), out_shardings=shardings[:2])
  for a, b in zip(
    jax.tree.leaves(alone(*arguments)), jax.tree.leaves(joined(*arguments)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  lowered = joined.lower(*arguments)
  text = lowered.as_text()
  assert _joined(text) == 4  # gradients, two moments, parameters; all but the large array
  assert text.count("\n") < alone.lower(*arguments).as_text().count("\n")
  compiled = lowered.compile().as_text()
  assert "all-gather" not in compiled  # each device joins what it holds: nothing is sent
  assert "all-to-all" not in compiled


def test_an_array_whose_moments_lie_elsewhere_stays_alone(mesh):
  update, arguments, shardings = _update(LIES, mesh)
  moved = {name: NamedSharding(mesh, PartitionSpec()) for name in SHAPES}
  shardings = (moved, shardings[1], moved)  # the kernel's lies as its moments do, but it is one
  assert "@_join" not in jax.jit(outline(update, shardings)).lower(*arguments).as_text()


def test_without_shardings_nothing_is_joined(mesh):
  update, arguments, _ = _update(LIES, mesh)
  assert "@_join" not in jax.jit(outline(update)).lower(*arguments).as_text()
