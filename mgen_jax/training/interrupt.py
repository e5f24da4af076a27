"""Why a run ends before its last step: it was asked to, or another process of it is gone.

Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint. What the exit codes are is
told in `cli.py`.
"""

import collections
import functools
import re
import signal
from collections.abc import Callable
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mgen_jax.parallel import rules

# Steps after which processes look at what they have told each other: as many as may be queued on
# the devices (`meter.MAX_IN_FLIGHT`), so that nobody waits for the answer.
DELAY = 2

BAD_DATA = 1 << 16  # in place of a signal: the data end. More than any signal, so it is what counts

# What a collective, the coordination service or a barrier says when a process does not answer.
_LOST = re.compile(
  r"gloo|nccl|connection|peer|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", re.I
)


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
    self._told: collections.deque[jax.Array] = collections.deque()

  def __enter__(self) -> "StopSignal":
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._before[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *unused) -> None:
    for signum, handler in self._before.items():
      signal.signal(signum, handler)

  def received(self, mesh: jax.sharding.Mesh, last: bool, bad_data: bool = False) -> int:
    """The signal that asks to stop before this step; BAD_DATA where the data of a process end, 0
    for none. To be called before every step.

    A signal may have reached only some of several processes, and all must save at the same step:
    each tells the others in every step, and all act on it two steps later, or at the `last` one.
    """
    own = BAD_DATA if bad_data else self._signum
    if jax.process_count() == 1:
      return own
    sharding = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    mine = np.full(len(mesh.local_devices), own, np.int32)
    told = jax.make_array_from_process_local_data(sharding, mine, (mesh.size,))
    self._told.append(_largest(mesh)(told))
    if last:
      return max(map(int, self._told))
    return int(self._told.popleft()) if len(self._told) > DELAY else 0

  def _note(self, signum: int, frame: FrameType | None) -> None:
    del frame
    logging.warning("%s: saving, then stopping", signal.Signals(signum).name)
    self._signum = signum
    signal.signal(signum, signal.SIG_DFL)


@functools.lru_cache
def _largest(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  """The largest number of an array that is split over all devices, on each of them."""
  return jax.jit(jnp.max, out_shardings=rules.replicated(mesh))


def lost_process(error: BaseException | None) -> bool:
  """Whether an error says that another process of the run is gone or cannot be reached."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or not jax.distributed.is_initialized():
    return False
  return _LOST.search(str(error)) is not None
