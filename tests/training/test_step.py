"""What a step descends: one loss or those of several players, batches completed on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.training import step as step_lib


class Plain:
  """Its batch is completed by a frozen factor."""

  def embed(self, frozen, batch):
    return {**batch, "x": batch["x"] * frozen}

  def loss(self, params, batch, keys):
    del keys
    return jnp.square(params["a"] * batch["x"]).mean(), {}


class Game(Plain):
  """Two players; the second enters at step 5."""

  def loss_at(self, params, batch, keys, step):
    loss, metrics = self.loss(params, batch, keys)
    other = jnp.where(step >= 5, (params["b"] * batch["x"]).mean(), 0.0)
    return {"one": loss, "two": other}, metrics


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("frozen", [None, 3.0])
@pytest.mark.parametrize("step", [4, 5])
def test_every_player_sees_the_completed_batch(passes, frozen, step):
  x = np.arange(1.0, 5.0, dtype=np.float32)
  params = {"a": jnp.float32(2.0), "b": jnp.float32(1.0)}
  factor = 1.0 if frozen is None else frozen
  keys = jax.random.split(jax.random.key(0), 4)
  wanted = (2.0 * 2.0 * np.square(factor * x).mean(), (step >= 5) * factor * x.mean())
  for task in (Plain(), Game()):
    loss = step_lib.objective(task, jnp.int32(step), frozen)
    value, metrics, gradients = step_lib.loss_and_gradients(loss, params, {"x": x}, keys, passes)
    assert float(gradients["a"]) == pytest.approx(wanted[0])
    if isinstance(task, Game):
      assert float(gradients["b"]) == pytest.approx(wanted[1])
      assert float(metrics["one_loss"] + metrics["two_loss"]) == pytest.approx(float(value))
