"""What the optimizer does with a config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgen_jax import config as config_lib
from mgen_jax import tasks
from mgen_jax.config import OptimizerConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import optimizer, program, state
from tests import tiny


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_rate_warms_up_then_follows_its_schedule(schedule):
  config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=10, end_factor=0.1)
  rate = optimizer.make_schedule(config, 110)
  np.testing.assert_allclose([rate(0), rate(9), rate(10)], [0.2, 2.0, 2.0], rtol=1e-6)
  end = 2.0 if schedule == "constant" else 0.2
  np.testing.assert_allclose(rate(110), end, rtol=1e-6)
  middle = {"constant": 2.0, "cosine": 1.1, "linear": 1.1}[schedule]
  np.testing.assert_allclose(rate(60), middle, rtol=1e-6)


def test_weight_decay_leaves_vectors_alone():
  config = OptimizerConfig(lr=0.1, weight_decay=0.5)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
  made = optimizer.make_optimizer(config, 10)
  updates, _ = made.update(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
  assert (updates["kernel"] < 0).all() and (updates["bias"] == 0).all()


def test_a_large_gradient_is_clipped_by_its_global_norm():
  config = OptimizerConfig(clip_norm=1.0)
  made = optimizer.make_optimizer(config, 10)
  params = {"kernel": jnp.ones((2, 2))}
  state_a, state_b = made.init(params), made.init(params)
  large = {"kernel": jnp.full((2, 2), 1e6)}
  unit = {"kernel": jnp.full((2, 2), 0.5)}
  a, _ = made.update(large, state_a, params)
  b, _ = made.update(unit, state_b, params)
  np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-5)


@pytest.fixture(scope="module")
def task():
  return tasks.make(config_lib.resolve(tiny.get_config()).stages["t2v"].task)


def test_muon_takes_the_kernels_and_adam_the_rest(task):
  shapes = state.param_shapes(task)
  dims = optimizer.matrix_dimensions(shapes)
  flat = jax.tree_util.tree_leaves_with_path(
    dims, is_leaf=lambda d: d is None or hasattr(d, "ndim")
  )
  assert flat
  stacked = dims["backbone"]["layers"]["mlp"]["up"]["kernel"]
  assert stacked.reduction_axis == (1,) and stacked.output_axis == 2  # axis 0 counts layers
  assert dims["backbone"]["layers"]["modulation"] is None
  assert dims["text"]["embedding"] is None


def test_muon_leaves_the_matrices_that_are_named_to_adam(task):
  config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=1.0, adam=("backbone/patch_in",))
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), state.param_shapes(task))
  gradient = jax.tree.map(jnp.ones_like, params)
  made = optimizer.make_optimizer(config, 10)
  updates = made.update(gradient, made.init(params), params)[0]["backbone"]
  first, hidden = (updates[name]["kernel"] for name in ("patch_in", "head"))
  assert np.abs(first).max() < 2e-3 < np.abs(hidden).max()  # the rate of each
  stage = config_lib.resolve(tiny.get_config()).stages["t2v"]
  wrong = OptimizerConfig(name="muon", adam=("backbone/patch_inn",))
  with pytest.raises(UserError, match='adam has "backbone/patch_inn", which fits no'):
    program.make_program(
      task,
      dataclasses.replace(stage, optimizer=wrong),
      mesh_lib.make_mesh(mesh_lib.MeshConfig()),
      seed=0,
    )
  with pytest.raises(ConfigError, match=r'adam is .* it is of name "muon"'):
    OptimizerConfig(adam=("backbone/patch_in",))


def test_muon_updates_of_a_matrix_are_nearly_orthogonal():
  config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=1.0, clip_norm=0.0)
  made = optimizer.make_optimizer(config, 10)
  params = {"kernel": jnp.zeros((16, 16)), "bias": jnp.zeros((16,))}
  gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
  updates, _ = made.update(gradient, made.init(params), params)
  singular = np.linalg.svd(updates["kernel"], compute_uv=False)
  assert singular.min() > 0.5 and singular.max() < 1.5
  # Adam with Nesterov's momentum: the first step is a little longer than the rate, in each value.
  first = np.abs(updates["bias"])
  np.testing.assert_allclose(first, first[0], rtol=1e-3)
  assert 1e-3 < first[0] < 2e-3


def test_muon_state_is_sharded_like_its_parameters(task):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=4, tensor=2))
  made = optimizer.make_optimizer(OptimizerConfig(name="muon"), 10)
  layout = state.shardings(task, made, mesh)
  kernel = layout.params["backbone"]["layers"]["mlp"]["up"]["kernel"]
  assert "fsdp" in str(kernel.spec)
  found = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.opt_state)
    if "'backbone']['layers']['mlp']['up']" in jax.tree_util.keystr(path)
  ]
  assert found and all(leaf == kernel for leaf in found)


def test_impossible_values_are_refused():
  with pytest.raises(ConfigError, match=r"lr is -1\.0"):
    OptimizerConfig(lr=-1.0)
  assert isinstance(optimizer.make_optimizer(OptimizerConfig(), 5), optax.GradientTransformation)


def test_clipping_can_begin_later():
  made = optimizer.make_optimizer(OptimizerConfig(clip_norm=0.1, clip_from=2, b1=0.0), 10)
  params = {"kernel": jnp.zeros((2, 2))}
  held, norms = made.init(params), []
  for _ in range(4):
    _, held = made.update({"kernel": jnp.ones((2, 2))}, held, params)
    # Without momentum, the first moment of Adam is the gradient as it was clipped.
    norms.append(float(optax.tree.norm(optax.tree.get(held, "mu"))))
  np.testing.assert_allclose(norms, [2.0, 2.0, 0.1, 0.1], rtol=1e-5)


def test_every_stack_of_layers_is_one_for_muon():
  leaf = jnp.zeros((3, 4, 5))
  dims = optimizer.matrix_dimensions({"spatial_layers": {"block": {"kernel": leaf}}})
  assert dims["spatial_layers"]["block"]["kernel"].reduction_axis == (1,)
