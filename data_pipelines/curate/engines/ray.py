"""Ray Data: a cluster's machines, which see the same folders as this one (NFS, a bucket mounted).

Only tasks of a few hundred bytes travel. A worker is an actor that keeps its decoder and the models
that stages have loaded; Ray starts another one, on another machine if it must, when it is lost, and
gives it the unit again.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
import ray.data

from data_pipelines.curate.engines import Ended
from mgen_jax.errors import UserError

_OBJECT_STORE = 100 * 2**20  # bytes: nothing but tasks goes through it
# How the names of Ray Data's threads begin that ask Ray for something, and how long to wait for one
# (seconds). Its "Prefetcher" sleeps from an early end on.
_THREADS = ("StreamingExecutor", "iter_threaded", "map_tp_", "ray-data-metadata")
_PATIENCE = 60.0


class Ray:
  """Ray Data over units of work.

  Args:
    workers: actors at once (0: one for each CPU of the cluster).
    options: the address of a cluster, like "ray://head:10001" or "auto"; none: one on this machine
      alone, which ends with the run.
  """

  def __init__(self, workers: int = 0, options: Sequence[str] = ()):
    self._ours = not ray.is_initialized()
    if self._ours:
      address = options[0] if options else None
      here = {"num_cpus": workers or None, "object_store_memory": _OBJECT_STORE}
      ray.init(
        address=address or "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        **({} if address else here),
      )
    self._rows: Generator[dict[str, Any], None, None] | None = None
    self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it describes its plans

  def run(self, function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Ended]:
    """Yields as units end; a fault of the user's in one of them is raised here."""
    if not tasks:
      return
    if not ray.is_initialized():
      # Ray would connect once more by itself, and its Data would ask for actors of the connection
      # that is gone ("The actor never ran").
      raise RuntimeError("this engine is closed.")
    actors = min(self.workers, len(tasks))
    numbers = ray.data.from_items(
      [{"task": number} for number in range(len(tasks))], override_num_blocks=len(tasks)
    )
    units = numbers.map(
      _Worker,
      fn_constructor_args=(function, list(tasks)),
      compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
      num_cpus=1,
    )
    rows = self._rows = iter(units.iter_rows())
    try:
      for row in rows:
        if row["fault"]:
          raise UserError(row["fault"])
        yield Ended(row["pid"])
    finally:
      rows.close()  # ends units that are at work

  def close(self) -> None:
    try:
      if self._rows is not None:
        self._rows.close()
    finally:
      if self._ours:
        _wait_for_threads()
        ray.shutdown()


def _wait_for_threads() -> None:
  """Until no thread asks Ray for anything: after a shutdown it would end the whole process."""
  for thread in threading.enumerate():
    if thread.name.startswith(_THREADS):
      thread.join(_PATIENCE)
      if thread.is_alive():
        logging.getLogger(__name__).warning(
          "Ray Data's thread %s has not ended in %g s.", thread.name, _PATIENCE
        )


class _Worker:
  """What an actor does with a unit; it knows all of them, and is told a number."""

  def __init__(self, function: Callable[[Any], None], tasks: Sequence[Any]):
    self._function = function
    self._tasks = tasks

  def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
    fault = ""
    try:
      self._function(self._tasks[row["task"]])
    except UserError as error:  # as a value: an exception would come back wrapped in Ray's
      fault = str(error)
    return {"task": row["task"], "pid": os.getpid(), "fault": fault}
