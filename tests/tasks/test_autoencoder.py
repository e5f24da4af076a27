"""The autoencoder's task: two players in one step, inflation between stages, weights from files."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mgen_jax.config import OptimizerConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.models.discriminator import DiscriminatorConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib
from mgen_jax.weights import autoencoder_kl, files

MODEL = AutoencoderConfig(
  channels=8,
  multipliers=(1, 2),
  res_blocks=0,
  decoder_res_blocks=0,
  latent_channels=4,
  space_down=(0,),
  time_down=(0,),
  mid_attention=False,
  groups=4,
  conv_method="matmul",
)
DISCRIMINATOR = DiscriminatorConfig(
  weight=0.5, channels=8, groups=4, layers=1, conv_method="matmul"
)
CONFIG = AutoencoderTaskConfig(model=MODEL, outlier_weight=0.1, discriminator=DISCRIMINATOR)


def _task(perceptual_weight=0.0, **changes):
  player = dataclasses.replace(DISCRIMINATOR, **changes)
  return AutoencoderTask(
    dataclasses.replace(CONFIG, discriminator=player, perceptual_weight=perceptual_weight)
  )


def _batch(examples=2, frames=3, seed=0):
  video = np.random.default_rng(seed).integers(0, 256, (examples, frames, 16, 16, 3), np.uint8)
  return {"video": jnp.asarray(video)}


def _params(task, seed=0):
  return nn.unbox(jax.jit(task.init)(jax.random.key(seed)))


def _keys(examples=2):
  return jax.random.split(jax.random.key(1), examples)


@pytest.mark.parametrize(
  "changes", [{"perceptual_weight": 0.1}, {"kind": "3d", "r1_weight": 1.0, "adaptive": False}]
)
def test_each_player_has_a_gradient_for_its_own_part_only(changes):
  task = _task(**changes)
  params = _params(task)

  # Everything is an argument: XLA would work out constants while it compiles.
  @jax.jit
  def gradients(params, batch, step):
    def one(player):
      return jax.grad(lambda p: task.loss_at(p, batch, _keys(), step)[0][player])(params)

    return one("autoencoder"), one("discriminator")

  autoencoder, discriminator = gradients(params, _batch(), jnp.int32(5))
  largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
  assert largest(autoencoder["discriminator"]) == 0
  assert largest({k: discriminator[k] for k in ("encoder", "decoder")}) == 0
  assert largest(autoencoder["encoder"]) > 0 and largest(autoencoder["decoder"]) > 0
  assert largest(discriminator["discriminator"]) > 0


def test_neither_player_moves_the_other_before_the_start_step():
  task = _task(start_step=10)
  params = _params(task)
  at = jax.jit(task.loss_at)
  alone = jax.jit(task.loss)(params, _batch(), _keys())[0]
  before, after = (at(params, _batch(), _keys(), jnp.int32(step))[0] for step in (9, 10))
  np.testing.assert_allclose(before["autoencoder"], alone, rtol=1e-6)
  assert before["discriminator"] == 0 and after["discriminator"] > 0
  assert abs(float(after["autoencoder"] - alone)) > 1e-4


def _train(task, optimizers, batches, steps, accumulate=1):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  slow = OptimizerConfig(lr=2e-3)
  with mesh_lib.use(mesh):
    untrained = state_lib.untrained_parts(task)
    made = optimizer_lib.make_optimizers(slow, optimizers, untrained, steps)
    layout = state_lib.shardings(task, made, mesh)
    step = step_lib.make_train_step(
      task,
      made,
      optimizer_lib.make_schedule(slow, steps),
      layout,
      seed=0,
      passes=lambda examples: accumulate,
      ema_decay=lambda step: 0.9,
    )
    state = state_lib.initialise(task, made, layout, seed=0)
    first, lines = jax.device_get(state.params), []
    for number in range(steps):
      state, metrics = step(state, batches(number))
      lines.append({name: float(value) for name, value in metrics.items()})
    return first, jax.device_get(state.params), lines


def test_two_optimizers_in_one_loop():
  """The discriminator learns to tell the two apart, and the autoencoder to rebuild, each at its own
  rate."""
  task = _task(adaptive=False, weight=0.01)
  quick = {"discriminator": OptimizerConfig(lr=1e-3, b1=0.5)}
  first, last, lines = _train(task, quick, lambda n: _batch(), 40)
  # It goes up and down as the other player answers.
  told = [line["discriminator_loss"] for line in lines]
  assert np.mean(told[-20:]) < 0.9 * np.mean(told[:5])
  assert lines[-1]["l1"] < 0.9 * lines[0]["l1"]
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, last)
  assert min(jax.tree.leaves(moved)) > 0


def test_each_part_has_its_own_optimizer():
  params = {"discriminator": {"a": jnp.ones(3)}, "encoder": {"a": jnp.ones(3)}}
  still = {"discriminator": OptimizerConfig(lr=0.0)}
  made = optimizer_lib.make_optimizers(OptimizerConfig(lr=0.1, clip_norm=0.0), still, (), 10)
  updates, _ = made.update(params, made.init(params), params)
  assert float(jnp.abs(updates["discriminator"]["a"]).max()) == 0
  alone = optimizer_lib.make_optimizer(OptimizerConfig(lr=0.1, clip_norm=0.0), 10)
  expected, _ = alone.update(params["encoder"], alone.init(params["encoder"]), params["encoder"])
  np.testing.assert_array_equal(updates["encoder"]["a"], expected["a"])


def test_untrained_parts_never_change():
  shapes = {"perceptual": {"a": jnp.ones(3)}, "encoder": {"a": jnp.ones(3)}}
  made = optimizer_lib.make_optimizers(OptimizerConfig(lr=0.1), {}, ("perceptual",), 10)
  updates, _ = made.update(shapes, made.init(shapes), shapes)
  assert float(jnp.abs(updates["perceptual"]["a"]).max()) == 0
  assert float(jnp.abs(updates["encoder"]["a"]).max()) > 0


@pytest.mark.parametrize("inflation", ["2.5d", "3d"])
def test_a_stage_inflates_the_image_model_of_the_one_before(inflation):
  image = AutoencoderTaskConfig(model=dataclasses.replace(MODEL, temporal=False, time_down=()))
  video = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, inflation=inflation))
  video.check_origin(image, "config.stages.tae")
  origin, task = AutoencoderTask(image), AutoencoderTask(video)
  before, fresh = _params(origin, 3), _params(task, 4)
  params = jax.jit(task.adapt)(before, fresh)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  picture = _batch(1, 1)["video"]
  a, b = jax.jit(task.encode)(params, picture)[0], jax.jit(origin.encode)(before, picture)[0]
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  other = AutoencoderTaskConfig(model=dataclasses.replace(image.model, latent_channels=8))
  with pytest.raises(ConfigError, match="is not that model inflated"):
    video.check_origin(other, "config.stages.tae")


def test_an_image_autoencoder_is_where_training_starts(tmp_path):
  shapes = autoencoder_kl.tensor_shapes(MODEL)
  rng = np.random.default_rng(0)
  tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
  files.write_tensors(tmp_path / "image.safetensors", tensors)
  config = dataclasses.replace(CONFIG, image_weights=str(tmp_path / "image.safetensors"))
  task = AutoencoderTask(config)
  found = task.pretrained(())
  flat = traverse_util.flatten_dict(_params(task), sep="/")
  assert set(found) < set(flat)
  assert all(flat[name].shape == value.shape for name, value in found.items())
  assert {n.split("/")[-2] for n in set(flat) - set(found) if n.startswith("encoder")} == {
    "temporal"
  }
  assert task.pretrained(("encoder", "decoder")) == {}  # an earlier stage gives them


def test_image_weights_need_a_model_of_their_layout():
  """Before anything is read: that of the toys has patches in place of its first convolution."""
  model = AutoencoderConfig(patch=(1, 4, 4), norm="rms")
  with pytest.raises(UserError, match=r"which has no patch \(1, 4, 4\), norm rms: leave them"):
    AutoencoderTaskConfig(model=model, image_weights="vae.safetensors")


def test_losses_that_cannot_be_are_refused():
  with pytest.raises(ConfigError, match="lpips_weights is empty"):
    AutoencoderTaskConfig(perceptual="lpips")
  with pytest.raises(ConfigError, match="unknown perceptual"):
    AutoencoderTaskConfig(perceptual="vgg")
  with pytest.raises(ConfigError, match="unknown kind"):
    DiscriminatorConfig(kind="4d")
