"""What is watched of a stage beside its metrics: time, compilations, a profile. One object for the
loop to carry, and what it adds to each log line."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from mgen_jax.config import ObserveConfig
from mgen_jax.training import compiles, goodput, profile

_WARM_UP = 2  # log lines after something was done for the first time


class Observation:
  """Of one run of a stage, in which the state may go back (`resumed`)."""

  def __init__(self, folder: str, stage: str, config: ObserveConfig):
    self._folder, self._stage, self._strict = folder, stage, config.strict_compiles
    self._account = goodput.Account()
    self._ledger = goodput.Ledger(folder, self._account)
    self._compilations = compiles.Compilations()
    self._window = profile.Window(folder, config.profile_from, config.profile_steps)
    self._before = self._account.totals()  # as of the last log line
    self._known: set[str] = set()  # kinds that the loop has spent time on
    self._warm_up = _WARM_UP  # lines to come that may have compilations
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Observation":
    for watched in (self._ledger, self._compilations, self._window):
      self._stack.enter_context(watched)
    return self

  def __exit__(self, *unused) -> None:
    self._stack.close()
    if jax.process_index() == 0:
      spent = goodput.summarise(goodput.read(self._folder))
      logging.info("stage %s: %s", self._stage, goodput.describe(spent))

  def resumed(self, step: int) -> None:
    """The state is that of a step, restored or new: all that was done after it is lost."""
    self._ledger.resumed(step)

  @contextlib.contextmanager
  def spend(self, kind: str) -> Iterator[None]:
    """Around what the loop does beside steps, by kind (`goodput.KINDS`)."""
    if kind not in self._known:
      self._known.add(kind)
      self._warm_up = _WARM_UP
    with self._account.spend(kind):
      yield

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Around the call that queues step `number`, from 1."""
    self._window.before(number)
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def queued(self, number: int, bucket: str, outputs: Any) -> int:
    """That step was queued; returns what `line` wants to know of it."""
    entry = self._account.queued(bucket, outputs)
    self._window.after(number, outputs)
    return entry

  def line(self, entry: int) -> dict[str, Any]:
    """For a log line that ends with a step: the seconds of a step, over all and by bucket, the
    share of the time that devices had no data, the goodput of the stage so far, compilations."""
    before, totals = self._before, self._account.totals(entry)
    self._before = totals
    wall = max(totals.wall - before.wall, 1e-6)
    steps, spent, by_bucket = 0, 0.0, {}
    for bucket, (count, seconds) in sorted(totals.buckets.items()):
      count_before, seconds_before = before.buckets.get(bucket, (0, 0.0))
      new = count - count_before
      if new:
        by_bucket[f"step_seconds/{bucket}"] = (seconds - seconds_before) / new
        steps, spent = steps + new, spent + seconds - seconds_before
    return {
      "step_seconds": spent / steps if steps else None,
      **by_bucket,
      "data_wait": (totals.seconds["data"] - before.seconds["data"]) / wall,
      "goodput": self._ledger.write(totals),
      "compiles": len(self._compilations.events),
    }

  def check(self, step: int) -> None:
    """After the line of a step was written.

    Raises:
      RecompilationError: in strict mode, something compiled after the warm-up.
    """
    events = self._compilations.take()
    if self._warm_up:
      self._warm_up -= 1
    elif self._strict:
      compiles.refuse(self._stage, step, events)
