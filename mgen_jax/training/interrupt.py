"""Stopping a run on request: Ctrl-C and SIGTERM end it after the step, with a checkpoint."""

import signal
from types import FrameType

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


class Interrupted(Exception):
  """The run was asked to stop and has saved; the same command continues it."""

  def __init__(self, signum: int, stage: str, step: int):
    super().__init__(f"stage {stage} stopped at step {step} on {signal.Signals(signum).name}")
    self.signum = signum


class StopSignal:
  """While entered, notes SIGINT and SIGTERM; a second one ends the process at once."""

  def __init__(self):
    self._signum = 0
    self._before: dict[int, signal.Handlers | None] = {}

  def __enter__(self) -> "StopSignal":
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._before[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *unused) -> None:
    for signum, handler in self._before.items():
      signal.signal(signum, handler)

  def received(self, step: int, agree_every: int) -> int:
    """The signal that asks all processes to stop before this step; 0 for none.

    With several processes the signal may have reached only some: they agree every `agree_every`
    steps, since all must save at the same step.
    """
    if jax.process_count() == 1:
      return self._signum
    if step % agree_every:
      return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(self._signum))))

  def _note(self, signum: int, frame: FrameType | None) -> None:
    del frame
    logging.warning("%s: saving, then stopping", signal.Signals(signum).name)
    self._signum = signum
    signal.signal(signum, signal.SIG_DFL)
