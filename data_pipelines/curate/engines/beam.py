"""Apache Beam: Dataflow, Flink, Spark, or its DirectRunner here, chosen by Beam's own flags."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.curate.engines import Ended


class Beam:
  """One pipeline for each phase: the tasks, dealt out, and a function for each of them.

  Args:
    workers: of the DirectRunner, as processes; other runners have flags of their own.
    options: Beam's flags, like "--runner=DataflowRunner", "--project=...".
  """

  def __init__(self, workers: int = 0, options: Sequence[str] = ()):
    direct = not any(option.startswith("--runner") for option in options)
    own = (
      [
        "--runner=DirectRunner",
        "--direct_running_mode=multi_processing",
        f"--direct_num_workers={workers}",
      ]
      if direct
      else []
    )
    self._options = [*own, *options]

  def run(self, function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Ended]:
    """Runs the whole pipeline and yields nothing: what is done is told by the commits.

    An exception of a unit fails the pipeline and is raised here.
    """
    if tasks:
      with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
        _ = (
          pipeline
          | "tasks" >> beam.Create(list(tasks), reshuffle=False)
          | "deal out" >> beam.Reshuffle()
          | "work" >> beam.Map(function)
        )
    yield from ()

  def close(self) -> None:
    """Nothing is held."""
