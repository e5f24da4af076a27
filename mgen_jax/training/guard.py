"""Steps that go wrong: a loss or a gradient that is not finite, or that leaps far above the others.

The judgement is a part of the step, on the devices: `judge` compares with a running median and the
step keeps the state as it was where the verdict is not GOOD. So nothing is spoilt, whatever the
policy, the devices never wait for the host, and a resumed run judges as the uninterrupted one
would, since the numbers behind the median are a part of the state. What follows from a verdict is
decided on the host, when it reads the metrics of the step: `Guard`.

Not here: the loop, which does what a `RollBack` asks for.
"""

import json
import os
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mgen_jax.config import GuardConfig
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError

GOOD, NOT_FINITE, SPIKE = 0, 1, 2  # verdicts

WINDOW = 128  # good steps behind the running median
_LEAST = 16  # of them, before a step can be a spike
_ROBUST = 1.4826  # the median distance from the median, times this: a normal's standard deviation
_FLOOR = 0.01  # of the median: the least deviation, where all steps are alike

FILE_NAME = "bad_steps.jsonl"
_SHOWN = 8  # examples of a bad batch in the log; the file has all


@flax.struct.dataclass
class History:
  """The last good steps, as a part of the training state."""

  values: jax.Array  # fp32 [2, WINDOW]: loss and norm of the gradient; a ring
  seen: jax.Array  # int32 []: good steps so far


def no_history() -> History:
  """That of step 0."""
  return History(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
  history: History, loss: jax.Array, norm: jax.Array, spike: float
) -> tuple[jax.Array, History]:
  """The verdict on a step and the history after it, which only good steps enter.

  Args:
    history: of the steps before.
    loss, norm: of the step and its gradient, [].
    spike: robust standard deviations above the median that make a spike; 0: there are none.
  """
  now = jnp.stack([loss, norm]).astype(jnp.float32)
  verdict = jnp.where(jnp.isfinite(now).all(), GOOD, NOT_FINITE)
  if spike:
    past = jnp.where(jnp.arange(WINDOW) < history.seen, history.values, jnp.nan)  # [2, WINDOW]
    median = jnp.nanmedian(past, axis=1)
    distance = jnp.nanmedian(jnp.abs(past - median[:, None]), axis=1)
    deviation = jnp.maximum(_ROBUST * distance, _FLOOR * jnp.abs(median))
    leaps = (now - median > spike * deviation).any() & (history.seen >= _LEAST)
    verdict = jnp.where((verdict == GOOD) & leaps, SPIKE, verdict)
  verdict = verdict.astype(jnp.int32)
  good = verdict == GOOD
  here = good & (jnp.arange(WINDOW) == jax.lax.rem(history.seen, WINDOW))
  values = jnp.where(here, now[:, None], history.values)
  return verdict, History(values, history.seen + good)


class BadStepError(UserError):
  """A loss or a gradient that is not finite or a spike, where the run is to stop."""


class RollBack(Exception):
  """A bad step, where the run is to go back: the loop does it."""

  def __init__(self, step: int, message: str):
    super().__init__(message)
    self.step = step


class Guard:
  """Reads the verdicts of the steps, notes the bad ones, and does what the config says.

  Args:
    config: of the stage.
    stage: its name.
    folder: of the stage; process 0 appends a line to FILE_NAME there for each bad step (one that is
      run again after a crash has a line again).
    examples_of: step number, from 1 -> its bucket and the names of the examples of its batch.
    last_good: the step of the newest whole checkpoint, or None.
    roll_backs: of the stage so far.
  """

  def __init__(
    self,
    config: GuardConfig,
    stage: str,
    folder: str,
    examples_of: Callable[[int], tuple[Bucket, list[str]]],
    last_good: Callable[[], int | None],
    roll_backs: int,
  ):
    self._config, self._stage = config, stage
    self._path = os.path.join(folder, FILE_NAME)
    self._examples_of, self._last_good = examples_of, last_good
    self._roll_backs, self._in_a_row = roll_backs, 0

  def check(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Looks at the metrics of step number `step`; all steps come here, in order.

    Raises:
      BadStepError: it is bad, and by the config the run stops.
      RollBack: it is bad, and by the config the run goes back.
    """
    if values["verdict"] == GOOD:
      self._in_a_row = 0
      return
    self._in_a_row += 1
    what = self._note(step, values)
    if self._config.action == "roll_back" and self._roll_backs < self._config.most:
      raise RollBack(step, what)
    if self._config.action != "skip" or self._in_a_row >= self._config.most:
      good = self._last_good()
      last = f"its last good checkpoint is step {good}" if good is not None else "no checkpoint yet"
      raise BadStepError(
        f"{what}; {last}: lower optimizer.lr or optimizer.clip_norm, lengthen "
        f"optimizer.warmup_steps, look at that batch in {self._path}, or set "
        f"config.stages.{self._stage}.guard.action to "
        f"{' or '.join(a for a in ('skip', 'roll_back') if a != self._config.action)}, and run the "
        "same command again."
      )
    logging.warning("%s: skipped", what)

  def _note(self, step: int, values: Mapping[str, np.ndarray]) -> str:
    """Writes a bad step down and returns it in words."""
    loss, norm = float(values["loss"]), float(values["grad_norm"])
    spike = int(values["verdict"]) == SPIKE
    kind = "a spike" if spike else "not finite"
    what = (
      f"stage {self._stage}: the loss or the gradient of step {step} is {kind} (loss {loss:.4g}, "
      f"norm of the gradient {norm:.4g})"
    )
    if jax.process_index() != 0:  # one tells it for all
      return what
    bucket, examples = self._examples_of(step)
    first = ", ".join(examples[:_SHOWN])
    more = f" and {len(examples) - _SHOWN} more in {self._path}" if len(examples) > _SHOWN else ""
    logging.error("%s; its batch of bucket %s: %s%s", what, bucket.name, first, more)
    line = {
      "step": step,
      "verdict": kind,
      "loss": repr(loss),  # JSON has no NaN
      "grad_norm": repr(norm),
      "bucket": bucket.name,
      "examples": examples,
    }
    with open(self._path, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    return what
