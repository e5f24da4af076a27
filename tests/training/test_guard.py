"""A bad step never changes the state; what follows is what the config says, the same every time."""

import json

import chex
import jax
import numpy as np
import pytest

from mgen_jax.config import GuardConfig
from mgen_jax.training import guard as guard_lib
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training.guard import BadStepError
from tests.training import toy


def bad_steps(folder):
  return [json.loads(line) for line in (folder / guard_lib.FILE_NAME).read_text().splitlines()]


def verdicts(values, spike):
  """The verdict on each (loss, norm) in turn."""
  judge = jax.jit(lambda history, loss, norm: guard_lib.judge(history, loss, norm, spike))
  history, found = guard_lib.no_history(), []
  for loss, norm in values:
    verdict, history = judge(history, np.float32(loss), np.float32(norm))
    found.append(int(verdict))
  return found


def test_a_spike_is_told_by_the_median_and_what_is_bad_never_enters_it():
  rng = np.random.default_rng(0)
  usual = [(x, 5 + x) for x in rng.normal(-1.0, 0.1, 40)]  # a loss may be negative
  bad = [(np.nan, 5), (9.0, 5), (0.0, 900.0), (0.0, np.inf), (9.0, 5)] * 20
  found = verdicts([*usual, *bad, *usual], spike=15.0)
  nan, spike = guard_lib.NOT_FINITE, guard_lib.SPIKE
  assert found == [0] * 40 + [nan, spike, spike, nan, spike] * 20 + [0] * 40
  assert verdicts([*usual, (9.0, 5)], spike=0.0)[-1] == guard_lib.GOOD


def test_steps_that_are_all_alike_make_no_spike_of_a_small_change():
  assert verdicts([(2.0, 1.0)] * 40 + [(2.1, 1.0), (8.0, 1.0)], spike=10.0)[-2:] == [0, 2]


def test_the_first_steps_are_no_spikes():
  assert verdicts([(1.0, 1.0)] * 5 + [(100.0, 1.0)], spike=10.0)[-1] == guard_lib.GOOD


def test_a_skipped_step_leaves_the_state_alone_and_its_examples_are_noted(tmp_path):
  guard = GuardConfig(action="skip")
  toy.train(tmp_path / "a", data=toy.stream(poison={4, 13}), guard=guard)
  first, second = bad_steps(tmp_path / "a")
  assert (first["step"], second["step"]) == (5, 14) and first["verdict"] == "not finite"
  assert first["bucket"] == "1x8x8" and first["examples"][3] == "example 4-3"
  assert toy.losses(tmp_path / "a")[5] is None and np.isfinite(toy.losses(tmp_path / "a")[6])
  # What stands in the poisoned batches otherwise is of no matter.
  toy.train(tmp_path / "b", data=toy.stream(poison={4, 13}, rows=7), guard=guard)
  chex.assert_trees_all_equal(toy.final_state(tmp_path / "a"), toy.final_state(tmp_path / "b"))


def test_skipping_continues_bit_for_bit_after_a_crash(tmp_path):
  values = {"guard": GuardConfig(action="skip", spike=12.0), "steps": 40}
  fault = {"poison": {18}, "leap": {30}}
  toy.train(tmp_path / "whole", data=toy.stream(**fault), **values)
  assert [(b["step"], b["verdict"]) for b in bad_steps(tmp_path / "whole")] == [
    (19, "not finite"),
    (31, "a spike"),
  ]
  with pytest.raises(toy.Crash):
    toy.train(tmp_path / "parts", data=toy.stream(**fault, on_step=toy.crash_at(27)), **values)
  toy.train(tmp_path / "parts", data=toy.stream(**fault), **values)
  assert toy.losses(tmp_path / "parts") == toy.losses(tmp_path / "whole")
  chex.assert_trees_all_equal(
    toy.final_state(tmp_path / "parts", **values), toy.final_state(tmp_path / "whole", **values)
  )


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
  with pytest.raises(BadStepError, match="step 12 is not finite"):
    toy.train(
      tmp_path,
      data=toy.stream(poison=set(range(9, 24))),
      guard=GuardConfig(action="skip", most=3),
    )


@pytest.mark.parametrize(
  ("poison", "back", "target"),
  [(19, 0, 16), (19, 5, 8), (5, 0, 0)],
  ids=["to the newest checkpoint", "to an older one", "to the start"],
)
def test_a_roll_back_goes_on_with_the_data_after_the_bad_batch(tmp_path, poison, back, target):
  guard = GuardConfig(action="roll_back", back=back)
  toy.train(tmp_path / "run", data=toy.stream(poison={poison}), guard=guard, log_every=3)
  toy.train(tmp_path / "expected", data=toy.stream(jump=(target, poison + 1 - target)))
  chex.assert_trees_all_equal(
    toy.final_state(tmp_path / "run"), toy.final_state(tmp_path / "expected")
  )
  assert [bad["step"] for bad in bad_steps(tmp_path / "run")] == [poison + 1]
  steps = [line["step"] for line in metrics_lib.read(str(tmp_path / "run"))]
  assert steps == list(range(3, 25, 3))  # one line for each step, of the run that counts


def test_a_roll_back_outlives_a_crash(tmp_path):
  values = {"guard": GuardConfig(action="roll_back"), "checkpoint_every": 4}
  toy.train(tmp_path / "whole", data=toy.stream(poison={13}), **values)
  # Batch 16 is drawn in step 15 after the roll-back, before anything of it is saved; batch 20 in
  # step 19, when it is.
  for batch in (16, 20):
    data = toy.stream(poison={13}, on_step=toy.crash_at(batch))
    with pytest.raises(toy.Crash):
      toy.train(tmp_path / "parts", data=data, **values)
  toy.train(tmp_path / "parts", data=toy.stream(poison={13}), **values)
  chex.assert_trees_all_equal(
    toy.final_state(tmp_path / "parts", **values), toy.final_state(tmp_path / "whole", **values)
  )


def test_too_many_roll_backs_stop_the_run(tmp_path):
  with pytest.raises(BadStepError, match="checkpoint is step 8"):
    toy.train(
      tmp_path,
      data=toy.stream(poison=set(range(10, 99))),
      guard=GuardConfig(action="roll_back", most=2),
    )
  assert len(bad_steps(tmp_path)) == 3
