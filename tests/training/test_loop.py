"""The promises of the training loop, kept on a task of milliseconds."""

import os
import signal
import threading
import time
import types

import chex
import jax
import numpy as np
import pytest

from mgen_jax.data.records import RecordError
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import ahead, loop, meter, patience
from mgen_jax.training import checkpoint as checkpoint_lib
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.guard import BadStepError
from mgen_jax.training.interrupt import Interrupted
from tests.training import toy


def losses(folder):
  return list(toy.losses(folder).values())


def test_it_learns(tmp_path):
  toy.train(tmp_path, steps=60)
  first, *_, last = losses(tmp_path)
  assert last < 0.3 * first


def test_a_stopped_run_continues_bit_for_bit(tmp_path):
  toy.train(tmp_path / "whole")

  def stop_at(step):
    if step == 13:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Interrupted) as stopped:
    toy.train(tmp_path / "parts", data=toy.stream(on_step=stop_at))
  assert stopped.value.signum == signal.SIGTERM
  assert len(losses(tmp_path / "parts")) == 14  # the step under way was finished and saved
  toy.train(tmp_path / "parts")
  assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
  chex.assert_trees_all_equal(
    toy.final_state(tmp_path / "parts"), toy.final_state(tmp_path / "whole")
  )


def test_a_finished_run_does_nothing_again(tmp_path):
  toy.train(tmp_path)
  before = losses(tmp_path)
  toy.train(tmp_path, data=toy.stream(on_step=lambda step: pytest.fail("a batch was drawn")))
  assert losses(tmp_path) == before


def test_more_steps_continue_a_finished_run(tmp_path):
  toy.train(tmp_path / "long", steps=30)
  toy.train(tmp_path / "short", steps=24)
  toy.train(tmp_path / "short", steps=30)
  assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_accumulation_equals_a_big_batch(tmp_path):
  toy.train(tmp_path / "one")
  toy.train(tmp_path / "four", accumulate=4)
  np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.parametrize(
  "mesh",
  [
    {"fsdp": 8},
    {"replica": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 2, "context": 2, "tensor": 2},
  ],
)
def test_every_mesh_gives_the_same_losses(tmp_path, mesh):
  toy.train(tmp_path / "one")
  toy.train(tmp_path / "eight", devices=8, mesh=mesh_lib.MeshConfig(**mesh))
  np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)


def test_parameters_moments_and_average_are_sharded_alike():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=4, tensor=2))
  optimizer = optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig(), 10)
  layout = state_lib.shardings(toy.ToyTask(), optimizer, mesh)
  state = state_lib.initialise(toy.ToyTask(), optimizer, layout, seed=0)
  adam = next(
    s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
    if hasattr(s, "mu")
  )  # fmt: skip
  for tree in (state.params, state.ema, adam.mu, adam.nu):
    assert tree["w"].addressable_shards[0].data.shape == (2, 8)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path):
  with pytest.raises(BadStepError) as error:
    toy.train(tmp_path, data=toy.stream(poison={19}), log_every=5)
  message = str(error.value)
  assert "stage toy" in message and "step 20" in message and "checkpoint is step 16" in message
  state = toy.final_state(tmp_path)
  assert int(state.step) == 16
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_state_that_went_wrong_is_not_saved(tmp_path):
  # Step 16 is both the poisoned one and one that is due to be saved, before any line is logged.
  with pytest.raises(BadStepError, match="step 16 is not finite"):
    toy.train(tmp_path, data=toy.stream(poison={15}), log_every=100)
  assert int(toy.final_state(tmp_path).step) == 8


def test_other_data_is_refused(tmp_path):
  toy.train(tmp_path, steps=8)
  with pytest.raises(checkpoint_lib.CheckpointError, match="other data"):
    toy.train(tmp_path, data=toy.stream(fingerprint="else"))


def test_a_start_from_another_stage_takes_its_parameters(tmp_path):
  toy.train(tmp_path / "first", steps=60)
  start = toy.final_state(tmp_path / "first", steps=60).ema
  toy.train(
    tmp_path / "second",
    steps=1,
    load_initial=lambda shapes, layout: jax.device_put(start, layout),
  )
  assert losses(tmp_path / "second")[0] < 0.5 * losses(tmp_path / "first")[0]


def test_validation_is_measured_on_the_same_batches_and_noise(tmp_path):
  toy.train(tmp_path / "one", validate_every=8)
  toy.train(tmp_path / "two", validate_every=4)

  def validation(folder):
    lines = metrics_lib.read(str(folder))
    return {m["step"]: m["validation_loss"] for m in lines if "validation_loss" in m}

  one, two = validation(tmp_path / "one"), validation(tmp_path / "two")
  assert sorted(one) == [8, 16, 24] and sorted(two) == [4, 8, 12, 16, 20, 24]
  assert all(one[step] == two[step] for step in one)


def test_a_log_line_answers_its_questions(tmp_path):
  toy.train(tmp_path, log_every=4)
  line = metrics_lib.read(str(tmp_path))[-1]
  assert line["step"] == 24
  assert line["mfu"] is None  # no peak is known for a CPU
  assert 0 <= line["data_wait"] <= 1
  for name in ("loss", "grad_norm", "lr", "examples_per_second", "tokens_per_second", "bias"):
    assert np.isfinite(line[name])
  assert line["peak_memory_gib"] > 0
  assert any(name.startswith("events") for name in os.listdir(tmp_path / "tensorboard"))


def test_a_record_shard_that_goes_bad_in_mid_run_is_named_and_nothing_is_lost(tmp_path):
  shard = toy.write_records(tmp_path / "records")
  toy.train(tmp_path / "whole", data=toy.record_stream(tmp_path / "records"))
  good = shard.read_bytes()

  def damage(step):
    if step == 13:
      shard.write_bytes(bytes(len(good)))

  with pytest.raises(RecordError, match=f"record .* of {shard} cannot be read"):
    toy.train(tmp_path / "run", data=toy.record_stream(tmp_path / "records", damage))
  reached = int(toy.final_state(tmp_path / "run").step)
  assert reached >= 13  # saved where the data ended, not at the last multiple of 8
  shard.unlink()
  with pytest.raises(RecordError, match=f"{shard} is missing"):
    toy.train(tmp_path / "run", data=toy.record_stream(tmp_path / "records"))
  shard.write_bytes(good)
  toy.train(tmp_path / "run", data=toy.record_stream(tmp_path / "records"))
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_held_out_records_that_are_gone_stop_the_run_after_saving(tmp_path):
  def validation():
    yield toy.batch_at(10_000)
    raise RecordError("the held-out shard is missing")

  data = toy.stream()._replace(validation=validation)
  with pytest.raises(RecordError, match="held-out"):
    toy.train(tmp_path, data=data, validate_every=5, checkpoint_every=100)
  assert int(toy.final_state(tmp_path).step) == 5


def test_batches_that_are_drawn_early_are_no_part_of_what_a_checkpoint_says(monkeypatch):
  """Several processes draw ahead; a phase that begins after the step of a checkpoint may change."""

  class Phases:
    drawn = 0
    fingerprint = property(lambda self: "one phase" if self.drawn < 4 else "two phases")

    def __next__(self):
      self.drawn += 1
      return self.drawn - 1

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(ahead.multihost_utils, "process_allgather", lambda own: np.array([own, 0]))
  batches = Phases()
  upcoming = ahead.Ahead(batches, 6)
  seen = [(upcoming.fingerprint, next(upcoming)) for _ in range(6)]
  assert [batch for _, batch in seen] == list(range(6)) and batches.drawn == 6
  assert [said for said, _ in seen] == ["one phase"] * 4 + ["two phases"] * 2


@pytest.mark.parametrize("readable", [0, 1, 2, 3, 4])
def test_all_processes_have_the_first_batches_or_none_takes_a_step(monkeypatch, readable):
  """A process acts on what another one tells two steps later: until then each must have data."""

  class Batches:
    drawn = 0
    fingerprint = "one"

    def __next__(self):
      if self.drawn == readable:
        raise UserError(f"record {readable} cannot be read")
      self.drawn += 1
      return self.drawn - 1

  told = []

  def gathered(own):
    told.append(int(own))
    return np.array([0, own])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(ahead.multihost_utils, "process_allgather", gathered)
  upcoming = ahead.Ahead(Batches(), 9)
  if readable < 3:
    with pytest.raises(UserError, match=f"record {readable} cannot be read"):
      next(upcoming)
  else:  # it has steps to go, and tells its fault in them
    assert [next(upcoming) for _ in range(readable)] == list(range(readable))
    assert upcoming.fault is not None
  assert told == [int(readable < 3)]  # once

  monkeypatch.setattr(ahead.multihost_utils, "process_allgather", lambda own: np.array([1, own]))
  readable = 100
  with pytest.raises(UserError, match="another process of this run cannot read its data"):
    next(ahead.Ahead(Batches(), 9))


def test_all_processes_stop_at_the_item_that_one_of_them_cannot_read(monkeypatch):
  others = iter([[0, 0], [0, 1], [0, 0]])  # what the processes tell of each item
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    ahead.multihost_utils, "process_allgather", lambda own: np.array(next(others))
  )
  items = ahead.together(iter("abc"))
  assert next(items) == "a"
  with pytest.raises(UserError, match="another process of this run cannot read its data"):
    next(items)


def test_slow_storage_is_said_and_nothing_dies(tmp_path, monkeypatch, caplog):
  """The clock, not the test, waits: ten minutes for batch 5, which end when it has been said."""
  late = threading.Event()
  now = time.perf_counter

  def wait(step):
    if step == 5:
      while "for the batch of step 6" not in caplog.text:
        time.sleep(0.01)
      late.set()

  monkeypatch.setattr(loop, "Patience", lambda: patience.Patience(seconds=0.05))
  monkeypatch.setattr(
    meter, "time", types.SimpleNamespace(perf_counter=lambda: now() + 600 * late.is_set())
  )
  toy.train(tmp_path, data=toy.stream(on_step=wait))
  assert "the storage is slow or hangs" in caplog.text
  waits = {line["step"]: line["data_wait"] for line in metrics_lib.read(str(tmp_path))}
  assert max(waits.values()) > 0.5 and len(waits) == 24
