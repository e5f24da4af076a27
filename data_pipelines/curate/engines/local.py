"""Worker processes on this machine: the default, and the fastest on one machine."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines.curate.engines import Ended
from mgen_jax.errors import UserError

_ATTEMPTS = 3  # of a unit whose worker died: somebody may have killed a neighbour's


class Local:
  """A pool of spawned processes, made anew when one of them is killed."""

  def __init__(self, workers: int = 0):
    self.workers = workers or os.cpu_count() or 1
    self._pool: futures.ProcessPoolExecutor | None = None

  def run(self, function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Ended]:
    """Yields as units end.

    Raises:
      UserError: a unit has lost its worker three times.
    """
    waiting = list(tasks)
    for attempt in range(1, _ATTEMPTS + 1):
      waiting = yield from self._attempt(function, waiting)
      if not waiting:
        return
      self.close()
      if attempt == _ATTEMPTS:
        raise UserError(
          f"{len(waiting)} units of work lost their process {attempt} times (the system kills"
          " processes when memory runs out); use fewer --workers. What is done is kept."
        )

  def _attempt(self, function, tasks):
    """Yields as units end; returns the tasks that were lost with a process."""
    if self._pool is None:
      # Spawned, not forked: this process has threads (DuckDB, PyArrow).
      context = multiprocessing.get_context("spawn")
      self._pool = futures.ProcessPoolExecutor(self.workers, mp_context=context)
    lost = []
    running = {}
    try:
      for task in tasks:
        running[self._pool.submit(_call, function, task)] = task
    except BrokenProcessPool:
      lost += tasks[len(running) :]
    try:
      for future in futures.as_completed(running):
        try:
          pid = future.result()
        except BrokenProcessPool:
          lost.append(running[future])
        else:
          yield Ended(pid)
    finally:
      for future in running:
        future.cancel()
    return lost

  def close(self) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None


def _call(function: Callable[[Any], None], task: Any) -> int:
  function(task)
  return os.getpid()
