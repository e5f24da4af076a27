"""What the training loop costs over the bare step: data, metrics, log lines, saves.

  python -m benchmarks.loop_overhead
  python -m benchmarks.loop_overhead --config=experiments/quickstart.py --stage=t2v --rounds=5
  python -m benchmarks.loop_overhead --workdir=runs/quickstart      with the data of a run

The same stage takes the same steps in four ways, in turn, in one process:
  bare    the compiled step on batches that are on the devices: no loop at all
  silent  the whole loop, but no log line
  logging with a log line every --log_every steps
  saving  with one checkpoint amid the steps
"loop" is logging over bare, "metrics" logging over silent. "save_s" is how much longer saving takes
than logging, and "stall" that over a minute: the share of the time at one save a minute. Steps are
timed from when the loop asks for a batch to when it asks for a later one; its first steps and its
end are left out. Without --workdir batches are random, made before, and cost nothing to read.
"""

import dataclasses
import itertools
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common
from mgen_jax import compilation_cache, tasks
from mgen_jax import config as config_lib
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import inputs, loop
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib
from mgen_jax.workdir import Workdir

WARM_UP = 14  # steps of the loop that are not timed: each bucket comes twice
NEVER = 10**9


class Timed:
  """Batches that note when each was asked for."""

  def __init__(self, batches: Any):
    self._batches, self.fingerprint = batches, batches.fingerprint
    self.asked: list[float] = []
    self.order: list[Bucket] = []

  def __iter__(self) -> "Timed":
    return self

  def __next__(self) -> loop.Rows:
    self.asked.append(time.perf_counter())
    bucket, rows = next(self._batches)
    self.order.append(bucket)
    return bucket, rows

  def __getattr__(self, name: str) -> Any:  # what else the loop asks of its data
    return getattr(self._batches, name)


class Made:
  """Random batches of each bucket, the same again and again."""

  fingerprint = "made"

  def __init__(self, rows: dict[Bucket, dict[str, np.ndarray]]):
    self._turn = itertools.cycle(rows.items())

  def __next__(self) -> loop.Rows:
    return next(self._turn)

  def close(self) -> None:
    pass


@dataclasses.dataclass
class Stage:
  """What is timed."""

  task: Any
  config: config_lib.TrainStage
  stream: loop.Stream
  mesh: jax.sharding.Mesh


def made_rows(task: Any, bucket: Bucket, examples: int) -> dict[str, np.ndarray]:
  """A batch of normal numbers; whole numbers are 1, which every vocabulary has."""
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(spec.shape).astype(spec.dtype)
    if np.issubdtype(spec.dtype, np.floating)
    else np.ones(spec.shape, spec.dtype)
    for name, spec in task.batch_spec(bucket, examples).items()
  }


def open_stage(config: str, name: str, workdir: str | None) -> Stage:
  """A train stage of an experiment, or of a run with its data."""
  if workdir is not None:
    work = Workdir.open(workdir)
    stage = work.experiment.stages[name]
    task = tasks.make(stage.task)
    stream, _ = inputs.make_stream(work, name, task)
    return Stage(task, stage, stream, mesh_lib.make_mesh(stage.mesh))
  path, _, variant = config.partition(":")
  made = runpy.run_path(path)["get_config"](*filter(None, [variant]))
  stage = config_lib.resolve(made).stages[name]
  task = tasks.make(stage.task)
  sizes = {bucket: entry.batch for bucket, entry in stage.batches().items()}
  rows = {bucket: made_rows(task, bucket, size) for bucket, size in sizes.items()}
  stream = loop.Stream(sizes, lambda step: Made(rows), lambda: iter(()))
  return Stage(task, stage, stream, mesh_lib.make_mesh(stage.mesh))


def run_loop(stage: Stage, steps: int, **changes: Any) -> tuple[float, list[Bucket]]:
  """Seconds of `steps` steps of the whole loop after the warm-up, and their buckets."""
  config = dataclasses.replace(
    stage.config, steps=WARM_UP + steps + 1, validate_every=0, init_from=None, **changes
  )
  opened = []

  def start(step: int) -> Timed:
    opened.append(Timed(stage.stream.open(step)))
    return opened[-1]

  with tempfile.TemporaryDirectory(prefix="mgen_jax-loop-") as folder:
    loop.train(
      stage.task,
      config,
      loop.Stream(stage.stream.batch_sizes, start, stage.stream.validation),
      stage.mesh,
      name="timed",
      seed=0,
      folder=folder,
      meta={},
    )
  asked = opened[0].asked
  return asked[WARM_UP + steps] - asked[WARM_UP], opened[0].order[WARM_UP : WARM_UP + steps]


def bare_steps(stage: Stage) -> Callable[[Sequence[Bucket]], float]:
  """A function that takes steps on a sequence of buckets and returns their seconds."""
  with mesh_lib.use(stage.mesh):
    optimizer, shapes, layout, train_step, _ = loop.make_program(
      stage.task, stage.config, stage.mesh, 0
    )
    rows_of = loop.batch_shapes(stage.task, stage.stream.batch_sizes, stage.mesh)
    state = [state_lib.initialise(stage.task, optimizer, layout, 0)]
    compiled = step_lib.compile_for(train_step, state_lib.with_layout(shapes, layout), rows_of)
    batches = {
      bucket: jax.tree.map(
        jax.device_put,
        made_rows(stage.task, bucket, size),
        {name: spec.sharding for name, spec in rows_of[bucket].items()},
      )
      for bucket, size in stage.stream.batch_sizes.items()
    }

  def run(order: Sequence[Bucket]) -> float:
    with mesh_lib.use(stage.mesh):
      began = time.perf_counter()
      for bucket in order:
        state[0], _ = compiled[bucket](state[0], batches[bucket])
      jax.block_until_ready(state[0])
      return time.perf_counter() - began

  run(list(batches))  # the first of each bucket
  return run


def rounds_of(stage: Stage, steps: int, log_every: int, rounds: int) -> Iterator[common.Row]:
  """Seconds of each way, round by round, in an order that changes."""
  bare = bare_steps(stage)
  order = [bucket for _, bucket in zip(range(steps), itertools.cycle(stage.stream.batch_sizes))]
  for number in range(rounds):
    row: common.Row = {}

    def take(name: str, row: common.Row = row, **changes: Any) -> None:
      row[name], taken = run_loop(stage, steps, **changes)
      order[:] = taken  # the bare steps then take the same buckets

    ways = [
      lambda: take("silent", log_every=NEVER, checkpoint_every=NEVER),
      lambda: take("logging", log_every=log_every, checkpoint_every=NEVER),
      lambda: take("saving", log_every=log_every, checkpoint_every=WARM_UP + steps // 2, keep=1),
    ]
    for way in ways if number % 2 else reversed(ways):
      way()
      row["bare"] = row.get("bare", 0.0) + bare(order) / len(ways)
    yield row


def main(argv: list[str] | None = None) -> common.Row:
  """Times the stage that the flags ask for."""
  parser = common.parser(__doc__, rounds=5)
  add = parser.add_argument
  add("--config", default="experiments/quickstart.py", help="The experiment (the quickstart).")
  add("--stage", default="t2v", help="A train stage of it without frozen encoders (t2v).")
  add("--workdir", help="A run, for its data and its config.")
  add("--steps", type=int, default=40, help="Of each way in a round (40).")
  add("--log_every", type=int, default=10, help="Steps (10; the default of a stage is 50).")
  args = parser.parse_args(argv)
  cpu.keep_memory()  # as `main` does
  with tempfile.TemporaryDirectory(prefix="mgen_jax-cache-") as folder:
    compilation_cache.enable(folder)  # each start of the loop compiles what the first one did
    stage = open_stage(args.config, args.stage, args.workdir)
    found = []
    for row in rounds_of(stage, args.steps, args.log_every, args.rounds):
      found.append(row)
      seconds = ", ".join(f"{name} {spent:.2f} s" for name, spent in row.items())
      print(f"round {len(found)} of {args.rounds}: {seconds}", file=sys.stderr, flush=True)
  rows = []
  for number, row in enumerate(found, 1):
    rows.append({"round": str(number), **_compared(row, args.steps)})
  median = {name: statistics.median(row[name] for row in found) for name in found[0]}
  rows.append({"round": "median", **_compared(median, args.steps)})
  return common.report(f"The loop around {args.stage}, {args.steps} steps", rows, args.out)


def _compared(seconds: common.Row, steps: int) -> common.Row:
  save = seconds["saving"] - seconds["logging"]
  return {
    "bare_step_s": seconds["bare"] / steps,
    "loop": seconds["logging"] / seconds["bare"],
    "metrics": seconds["logging"] / seconds["silent"],
    "save_s": save,
    "stall": save / 60,
  }


if __name__ == "__main__":
  main()
