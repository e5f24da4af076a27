"""Every second of a run is charged to one kind, and over restarts nothing is counted twice."""

import json
import os
import threading
import time

import jax
import pytest

from mgen_jax.training import goodput, metrics
from tests.training import toy


class Slow:
  """Outputs of a step that are there when the test says so."""

  def __init__(self):
    self.ready = threading.Event()

  def block_until_ready(self):
    assert self.ready.wait(60)
    return self


def test_idle_time_is_charged_to_what_the_host_did_meanwhile():
  account = goodput.Account()
  with account.spend("compile"):
    time.sleep(0.05)
  with account.spend("data"):
    time.sleep(0.02)
  slow = Slow()
  number = account.queued("a", slow)
  with account.spend("data"):  # while the devices work: costs nothing
    time.sleep(0.05)
  slow.ready.set()
  first = account.totals(number)
  assert first.seconds["compile"] >= 0.05
  assert 0.02 <= first.seconds["data"] < first.seconds["step"]  # not the second wait
  assert first.seconds["step"] >= 0.05
  assert first.buckets["a"] == (1, first.seconds["step"])
  done = Slow()
  done.ready.set()
  with account.spend("data"):  # the devices idle now
    time.sleep(0.05)
  second = account.totals(account.queued("b", done))
  assert second.seconds["data"] - first.seconds["data"] >= 0.05
  assert second.steps == 2


def test_nested_kinds_are_charged_to_the_inner_one_and_the_sum_is_the_wall_time():
  began = time.perf_counter()
  account = goodput.Account()
  with account.spend("validation"):
    time.sleep(0.02)
    with account.spend("data"):
      time.sleep(0.03)
    time.sleep(0.02)
  totals = account.close()
  wall = time.perf_counter() - began
  assert totals.seconds["data"] >= 0.03 and totals.seconds["validation"] >= 0.04
  assert totals.seconds["validation"] < wall - 0.03
  assert totals.wall == pytest.approx(wall, abs=0.02)


def test_a_fault_of_the_devices_does_not_block_the_account():
  class Broken:
    def block_until_ready(self):
      raise jax.errors.JaxRuntimeError("out of memory")

  account = goodput.Account()
  number = account.queued("a", Broken())
  assert account.totals(number).steps == 0
  account.close()


def test_devices_that_never_answer_do_not_keep_the_process(monkeypatch):
  monkeypatch.setattr(goodput, "_PATIENCE", 0.1)
  account = goodput.Account()
  stuck = Slow()
  number = account.queued("a", stuck)
  assert account.totals(number).steps == 0
  assert account.close().steps == 0
  stuck.ready.set()


def lines_of(run, began, *points):
  """Ledger lines of a run: (step, step seconds, other seconds)."""
  return [
    {"run": run, "time": began, "step": step, "seconds": {"step": spent, "compile": rest}}
    for step, spent, rest in points
  ]


def test_steps_after_the_checkpoint_of_a_restart_are_lost_and_gaps_are_down():
  lines = [
    *lines_of(1, 1000.0, (0, 0.0, 0.0), (10, 20.0, 5.0), (20, 40.0, 5.0)),  # ends at 1045
    *lines_of(2, 1060.0, (15, 0.0, 2.0), (18, 6.0, 2.0)),  # from step 15: 5 x 2 s are lost
    *lines_of(3, 1068.0, (15, 0.0, 0.0), (30, 30.0, 1.0)),  # again from 15: all of run 2 is
  ]
  seconds = goodput.summarise(lines)
  assert seconds["lost"] == pytest.approx(10 + 6)
  assert seconds["step"] == pytest.approx(76 - 16)
  assert seconds["compile"] == pytest.approx(8)
  assert seconds["down"] == pytest.approx(15)
  assert sum(seconds.values()) == pytest.approx(1068 + 31 - 1000)
  assert goodput.goodput(seconds) == pytest.approx(60 / 99)
  assert "lost 16.2%" in goodput.describe(seconds) and "down 15.2%" in goodput.describe(seconds)


def test_a_clock_that_is_put_back_makes_no_negative_time():
  lines = [*lines_of(1, 5000.0, (0, 0.0, 0.0), (4, 8.0, 0.0)), *lines_of(2, 10.0, (4, 0.0, 1.0))]
  seconds = goodput.summarise(lines)
  assert seconds["down"] == 0 and min(seconds.values()) >= 0


def test_a_crashed_run_and_its_successor_are_one_account(tmp_path):
  def crash_at(step):
    if step == 13:
      raise RuntimeError("a crash")

  with pytest.raises(RuntimeError, match="a crash"):
    toy.train(tmp_path, data=toy.stream(on_step=crash_at))
  with open(tmp_path / goodput.FILE_NAME, "a") as file:
    file.write('{"run": 1, "time": 1')  # killed while it wrote
  toy.train(tmp_path, validate_every=8)
  lines = goodput.read(str(tmp_path))
  assert [line["run"] for line in lines if line["step"] is None] == [1, 2]
  assert [line["step"] for line in lines if line["run"] == 2][1] == 8
  assert lines[-1]["step"] == 24
  seconds = goodput.summarise(lines)
  assert all(spent >= 0 for spent in seconds.values())
  for kind in ("step", "lost", "compile", "restore", "validation", "save", "initialise"):
    assert seconds[kind] > 0, kind
  last = [line for line in metrics.read(str(tmp_path)) if "goodput" in line][-1]
  # The last log line does not know the last save yet.
  assert 0 < goodput.goodput(seconds) <= last["goodput"] * 1.01 < 1


def test_each_bucket_has_its_own_step_time(tmp_path):
  toy.train(tmp_path, log_every=4)
  line = metrics.read(str(tmp_path))[-1]
  times = [line[f"step_seconds/{bucket.name}"] for bucket in toy.BUCKETS]
  assert min(times) > 0
  assert min(times) <= line["step_seconds"] <= max(times)


def test_a_state_that_goes_back_within_a_run_loses_its_steps(tmp_path):
  account = goodput.Account()
  done = Slow()
  done.ready.set()
  with goodput.Ledger(str(tmp_path), account) as ledger:
    ledger.resumed(0)
    for _ in range(4):
      with account.spend("data"):
        time.sleep(0.002)
      number = account.queued("a", done)
    ledger.write(account.totals(number))
    ledger.resumed(2)
    number = account.queued("a", done)
    ledger.write(account.totals(number))
  lines = goodput.read(str(tmp_path))
  assert [json.dumps(line["step"]) for line in lines] == ["null", "0", "4", "2", "3", "3"]
  seconds = goodput.summarise(lines)
  assert seconds["lost"] > 0 and seconds["down"] < 0.1
  assert os.path.getsize(tmp_path / goodput.FILE_NAME)
