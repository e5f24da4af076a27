"""From the outputs of steps to log lines, one step late, so that the devices never wait for it."""

import time

import jax
import numpy as np

from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.parallel import hardware
from mgen_jax.tasks.base import Task
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.training.observe import Observation

Values = dict[str, jax.Array]

# Steps that may be queued on the devices: enough that they never idle, few enough that batches
# do not pile up in memory.
MAX_IN_FLIGHT = 2


class NotFiniteError(UserError):
  """A loss or a gradient that is not finite."""


class Meter:
  """Gathers what happens between two log lines."""

  def __init__(
    self,
    task: Task,
    metrics: metrics_lib.Metrics,
    checkpoints: Checkpoints,
    observation: Observation,
    stage: str,
    log_every: int,
  ):
    self._task, self._metrics, self._checkpoints = task, metrics, checkpoints
    self._observation, self._stage, self._log_every = observation, stage, log_every
    self._interval = _Interval()
    self._due: _Interval | None = None  # complete, but its last steps may still be running
    self._written = time.perf_counter()  # when the last line was

  def after(self, step: int, bucket: Bucket, examples: int, values: Values) -> None:
    """Step number `step` on a batch of `examples` is queued; `values` are its metrics to come.

    Raises:
      NotFiniteError: an earlier step's loss or gradient was not finite.
    """
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
      NotFiniteError: a loss or gradient was not finite.
    """
    self._write_due()
    if self._interval.values:
      self._check(jax.device_get(self._interval.values[-1]))

  def _write_due(self) -> None:
    if self._due is None:
      return
    interval, self._due = self._due, None
    values = jax.device_get(interval.values)
    self._check(values[-1])
    now = time.perf_counter()
    seconds = max(now - self._written, 1e-6)
    peak = hardware.peak_flops(jax.devices()[0])
    line = {name: float(np.mean([v[name] for v in values])) for name in values[-1]}
    del line["nonfinite_step"]
    line["lr"] = float(values[-1]["lr"])
    line["examples_per_second"] = interval.examples / seconds
    line["tokens_per_second"] = interval.tokens / seconds
    line["mfu"] = interval.flops / seconds / (peak * jax.device_count()) if peak else None
    line.update(self._observation.line(interval.entry))
    line["peak_memory_gib"] = metrics_lib.peak_memory_gib()
    self._metrics.write(interval.step, line)
    self._observation.check(interval.step)
    self._written = now

  def _check(self, values: dict[str, np.ndarray]) -> None:
    bad = int(values["nonfinite_step"])
    if bad < 0:
      return
    good = self._checkpoints.latest_step()
    last = f"its last good checkpoint is step {good}" if good is not None else "no checkpoint yet"
    raise NotFiniteError(
      f"stage {self._stage}: the loss or the gradient of step {bad + 1} is not finite ({last} in "
      f"{self._checkpoints.folder}): lower optimizer.lr or optimizer.clip_norm, lengthen "
      "optimizer.warmup_steps, or look for bad data, and run the same command again."
    )


class _Interval:
  """Sums since the last log line."""

  def __init__(self):
    self.step = self.entry = 0
    self.values: list[Values] = []
    self.examples = self.tokens = 0
    self.flops = 0.0
