"""From the outputs of steps to log lines, one step late, so that the devices never wait for it."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import hardware
from mgen_jax.tasks.base import Task
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training.guard import GOOD
from mgen_jax.training.observe import Observation

Values = dict[str, jax.Array]

# Steps that may be queued on the devices: enough that they never idle, few enough that batches
# do not pile up in memory.
MAX_IN_FLIGHT = 2


class Meter:
  """Gathers what happens between two log lines.

  Args:
    task: what is learned.
    metrics: where the lines go.
    check: called with each step's number and values, in order, before its line is written; what it
      raises ends the run or sends it back (`guard.Guard.check`).
    observation: what is watched beside.
    log_every: steps.
  """

  def __init__(
    self,
    task: Task,
    metrics: metrics_lib.Metrics,
    check: Callable[[int, Mapping[str, np.ndarray]], None],
    observation: Observation,
    log_every: int,
  ):
    self._task, self._metrics, self._check = task, metrics, check
    self._observation, self._log_every = observation, log_every
    self._checked: int | None = None  # the last step that was
    self._interval = _Interval()
    self._due: _Interval | None = None  # complete, but its last steps may still be running
    self._written = time.perf_counter()  # when the last line was

  def after(self, step: int, bucket: Bucket, examples: int, values: Values) -> None:
    """Step number `step` on a batch of `examples` is queued; `values` are its metrics to come.

    Raises:
      what `check` raises for an earlier step.
    """
    if self._checked is None:
      self._checked = step - 1
    interval = self._interval
    interval.entry = self._observation.queued(step, bucket.name, values)
    interval.values.append(values)
    interval.examples += examples
    interval.tokens += examples * self._task.tokens(bucket)
    interval.flops += examples * self._task.flops(bucket)
    self._write_due()
    if step % self._log_every == 0:
      interval.step = step
      self._due, self._interval = interval, _Interval()
    elif len(interval.values) > MAX_IN_FLIGHT:
      jax.block_until_ready(interval.values[-1 - MAX_IN_FLIGHT])
    self._metrics.advance(step)

  def flush(self) -> None:
    """Writes the line that is due and checks all steps so far.

    Raises:
      what `check` raises for one of them.
    """
    self._write_due()
    self._check_all(jax.device_get(self._interval.values), self._interval)

  def _write_due(self) -> None:
    if self._due is None:
      return
    interval, self._due = self._due, None
    values = jax.device_get(interval.values)
    self._check_all(values, interval)
    now = time.perf_counter()
    seconds = max(now - self._written, 1e-6)
    peak = hardware.peak_flops(jax.devices()[0])
    good = [v for v in values if v["verdict"] == GOOD]
    line = {n: float(np.mean([v[n] for v in good])) if good else None for n in values[-1]}
    del line["verdict"]
    line["bad_steps"] = len(values) - len(good)
    line["lr"] = float(values[-1]["lr"])
    line["examples_per_second"] = interval.examples / seconds
    line["tokens_per_second"] = interval.tokens / seconds
    line["mfu"] = interval.flops / seconds / (peak * jax.device_count()) if peak else None
    line.update(self._observation.line(interval.entry))
    line["peak_memory_gib"] = metrics_lib.peak_memory_gib()
    self._metrics.write(interval.step, line)
    self._observation.check(interval.step)
    self._written = now

  def _check_all(self, values: list[dict[str, np.ndarray]], interval: "_Interval") -> None:
    """Shows each step of an interval to `check` once: `flush` may have seen some of them."""
    for value in values[interval.checked :]:
      self._checked += 1
      interval.checked += 1
      self._check(self._checked, value)


class _Interval:
  """Sums since the last log line."""

  def __init__(self):
    self.step = self.entry = 0
    self.values: list[Values] = []
    self.checked = 0  # of the values
    self.examples = self.tokens = 0
    self.flops = 0.0
