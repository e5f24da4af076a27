"""Who runs the units of work: processes here, a Ray cluster, or an Apache Beam runner.

An engine is handed a function and tasks of a few hundred bytes, and says when one has ended, in any
order. It keeps nothing: a unit commits its own files, so a unit that runs twice, or whose worker
dies, costs time and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from mgen_jax.errors import UserError

NAMES = ("local", "ray", "beam")


@dataclasses.dataclass(frozen=True)
class Ended:
  """A unit that is done, and the process that did it."""

  pid: int


class Engine(Protocol):
  """Runs `function(task)` somewhere for every task."""

  def run(self, function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Ended]:
    """Yields as units end, or (Beam) nothing before all have; returns when all have."""
    ...

  def close(self) -> None: ...


def make(name: str, workers: int, options: Sequence[str] = ()) -> Engine:
  """An engine by name.

  Args:
    name: one of `NAMES`.
    workers: processes (local), tasks at once (ray); 0: as many as there are cores. Beam asks its
      runner, see `options`.
    options: of the engine: the address of a Ray cluster, or Beam's own flags.

  Raises:
    UserError: an unknown name, or its package is missing.
  """
  if name == "local":
    from data_pipelines.curate.engines.local import Local

    return Local(workers)
  try:
    if name == "ray":
      from data_pipelines.curate.engines.ray import Ray

      return Ray(workers, options)
    if name == "beam":
      from data_pipelines.curate.engines.beam import Beam

      return Beam(workers, options)
  except ModuleNotFoundError as error:
    if error.name not in ("ray", "apache_beam"):
      raise
    raise UserError(
      f'--engine={name} needs the package {error.name}: pip install "mgen_jax[{name}]".'
    ) from error
  raise UserError(f"--engine={name} is unknown; it must be one of {', '.join(NAMES)}.")
