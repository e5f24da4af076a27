"""Ray Data: a cluster's machines, which see the same folders as this one (NFS, a bucket mounted).

Only tasks of a few hundred bytes travel. A worker is an actor that keeps its decoder and the models
that stages have loaded; Ray starts another one, on another machine if it must, when it is lost, and
gives it the unit again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

_OBJECT_STORE = 100 * 2**20  # bytes: nothing but tasks goes through it


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
    self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

  def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Yields results as they come; an exception of a unit is raised here."""
    if not tasks:
      return
    actors = min(self.workers, len(tasks))
    units = ray.data.from_items(
      [{"task": task} for task in tasks], override_num_blocks=len(tasks)
    ).map(
      _Worker,
      fn_constructor_args=(function,),
      compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
      num_cpus=1,
    )
    for row in units.iter_rows():
      yield row["done"]

  def close(self) -> None:
    if self._ours:
      ray.shutdown()


class _Worker:
  """What an actor does with a unit."""

  def __init__(self, function: Callable[[Any], Any]):
    self._function = function

  def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
    return {"done": self._function(row["task"])}
