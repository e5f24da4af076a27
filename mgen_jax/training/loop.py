"""The training loop. One loop trains every task; this file reads from top to bottom.

A run starts in one of three ways, tried in this order:
  1. this stage has a checkpoint: continue from it, bit for bit, data order included;
  2. the stage says `init_from` another: start at step 0 from that stage's averaged parameters,
     fitted to this one's model (`start.py`);
  3. else: start at step 0 from random parameters.

Not here: what is learned (`tasks/`), the step itself (`step.py`), what a stage is (`runner.py`),
what is done about a bad step (`guard.py`), how checkpoints are kept whole (`checkpoint.py`).
docs/reliability.md lists every fault and what comes of it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging

from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.base import Task
from mgen_jax.training import ahead, lora, validation
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import CheckpointError, Checkpoints
from mgen_jax.training.guard import Guard, RollBack
from mgen_jax.training.interrupt import BAD_DATA, Interrupted, StopSignal
from mgen_jax.training.meter import Meter
from mgen_jax.training.observe import Observation
from mgen_jax.training.patience import Patience
from mgen_jax.training.program import Program, batch_shapes, make_program

Rows = tuple[Bucket, dict[str, np.ndarray]]  # a bucket and this host's rows of a batch


class Batches(Protocol):
  """An endless iterator of training batches (`data.pipeline.Stream` is one)."""

  fingerprint: str  # of everything that decides the order of examples

  def __iter__(self) -> "Batches": ...

  def __next__(self) -> Rows: ...

  def examples_at(self, step: int) -> tuple[Bucket, list[str]]: ...  # names, of a global batch

  def close(self) -> None: ...


class Stream(NamedTuple):
  """Where batches come from."""

  batch_sizes: Mapping[Bucket, int]  # global
  open: Callable[[int], Batches]  # from a number of batch on
  validation: Callable[[], Iterator[Rows]]  # held out, finite, always the same
  changed_sizes: tuple[Mapping[Bucket, int], ...] = ()  # global batches of later steps
  validation_sizes: Mapping[Bucket, int] | None = None  # of `validation`; None: not known ahead

  def buckets(self) -> list[Bucket]:
    """Of all steps, in order."""
    return sorted({b for sizes in (self.batch_sizes, *self.changed_sizes) for b in sizes})


def train(
  task: Task,
  config: TrainStage,
  stream: Stream,
  mesh: jax.sharding.Mesh,
  *,
  name: str,
  seed: int,
  folder: str,
  meta: dict[str, Any],
  load_initial: Callable[[Any, Any], Any] | None = None,
  frozen: Any = None,
  load_base: Callable[[Any, Any], Any] | None = None,
) -> float:
  """Trains a stage to its last step, or continues to train it.

  Args:
    task: what is learned.
    config: of the stage.
    stream: its data.
    mesh: the devices.
    name: of the stage, for messages.
    seed: of the run.
    folder: of the stage; checkpoints, metrics and TensorBoard files go there.
    meta: saved in every checkpoint: what is needed to use it later.
    load_initial: (shapes, shardings) -> parameters to start from; None for random ones.
    frozen: parameters that the task reads in every step and never changes, on the mesh; None: none.
    load_base: (shapes, shardings) -> the base of adapters, which `meta["base"]` refers to and
      checkpoints then leave out.

  Returns:
    Seconds that this stage has taken, earlier runs of it included.

  Raises:
    BadStepError: a loss or gradient that is not finite, or a spike (`guard.py`).
    CheckpointError: a checkpoint that cannot be read or written.
    Interrupted: on SIGINT or SIGTERM, after saving.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as stack:
    stack.enter_context(mesh_lib.use(mesh))
    task = lora.wrap(task, config.lora)
    run = _Run(
      *(task, config, stream, mesh, name, seed, folder, meta, began),
      frozen=() if frozen is None else (frozen,),
      load_base=load_base,
      program=make_program(task, config, mesh, seed),
      rows_of=shapes_by_size(task, stream, mesh),
      put=putter(task, stream, mesh),
      validate=validation.Validator(task, mesh, seed=seed, bins=config.validate_bins),
      stop=stack.enter_context(StopSignal()),
      observation=stack.enter_context(Observation(folder, name, config.observe)),
      patience=stack.enter_context(Patience()),
      checkpoints=stack.enter_context(
        Checkpoints(f"{folder}/checkpoints", keep=config.keep, fall_back=config.fall_back)
      ),
    )
    beyond = None  # of a roll-back: the batch that it goes past, and how many there were by then
    while True:
      state, at, fingerprint = run.restore(load_initial)
      run.observation.resumed(at.step)
      if beyond is not None:
        at = at.past(*beyond)
      with contextlib.closing(stream.open(at.batch)) as batches:
        if fingerprint is not None:
          _check_data(fingerprint, batches, run.checkpoints.folder)
        try:
          return run.steps(state, at, batches)
        except RollBack as bad:
          beyond = at.batch + bad.step - 1 - at.step, at.roll_backs + 1
          target = bad.step - 1 - config.guard.back
          logging.warning("%s: goes back, and on after batch %d", bad, beyond[0])
      del state
      run.checkpoints.go_back(target)


class Progress(NamedTuple):
  """How far a stage has come; a checkpoint keeps it."""

  step: int = 0
  passed_over: int = 0  # batches that roll-backs have gone past
  roll_backs: int = 0

  @property
  def batch(self) -> int:
    """The number of the batch that comes next."""
    return self.step + self.passed_over

  def past(self, batch: int, roll_backs: int) -> "Progress":
    """The same step, with the data after a batch."""
    return Progress(self.step, batch + 1 - self.step, roll_backs)


@dataclasses.dataclass
class _Run:
  """What stays the same when a stage goes back to an earlier step."""

  task: Task
  config: TrainStage
  stream: Stream
  mesh: jax.sharding.Mesh
  name: str
  seed: int
  folder: str
  meta: dict[str, Any]
  began: float  # when this process did, less what the stage has taken before
  frozen: tuple[Any, ...]  # nothing, or the frozen parameters
  load_base: Callable[[Any, Any], Any] | None  # where checkpoints refer to it
  program: Program
  rows_of: dict[tuple[Bucket, int], dict[str, jax.ShapeDtypeStruct]]
  put: Callable[[Bucket, Mapping[str, np.ndarray]], dict[str, jax.Array]]
  validate: validation.Validator
  stop: StopSignal
  observation: Observation
  patience: Patience
  checkpoints: Checkpoints
  train_step: Mapping[tuple[Bucket, int], Callable[..., Any]] | None = None  # once compiled

  def restore(self, load_initial: Callable[[Any, Any], Any] | None):
    """(state, progress, fingerprint of the data or None): of the newest checkpoint, or step 0."""
    optimizer, shapes, layout, _, contents = self.program
    if self.checkpoints.latest_step() is None:
      with self.observation.spend("initialise"):
        load_initial = lora.starting(self.task, load_initial, self.seed)
        initial = load_initial(shapes.params, layout.params) if load_initial else None
        state = state_lib.initialise(self.task, optimizer, layout, self.seed, initial, contents)
      return state, Progress(), None
    with self.observation.spend("restore"):
      if self.load_base is None:
        restored = self.checkpoints.restore(shapes, layout)
      else:
        restored = self.checkpoints.restore(lora.without_base(shapes), lora.without_base(layout))
        base = self.load_base(shapes.params[lora.BASE], layout.params[lora.BASE])
        restored = restored._replace(state=lora.with_base(restored.state, base))
    logging.info(
      "stage %s continues from step %d of %d", self.name, restored.step, self.config.steps
    )
    if self.train_step is None:  # it is this process's first, not one that it goes back to
      self.began -= restored.meta["seconds"]
    at = Progress(restored.step, restored.data["passed_over"], restored.data["roll_backs"])
    return restored.state, at, restored.data["fingerprint"]

  def steps(self, state: state_lib.TrainState, at: Progress, batches: Batches) -> float:
    """From where the stage is to its last step; returns the seconds that it has taken."""
    config = self.config
    if self.train_step is None and at.step < config.steps:
      with self.observation.spend("compile"):
        self._compile()
    guard = Guard(
      *(config.guard, self.name, self.folder),
      examples_of=lambda step: batches.examples_at(step - 1 + at.passed_over),
      last_good=self.checkpoints.latest_step,
      roll_backs=at.roll_backs,
    )
    # Evaluate if due -> save if due -> next batch -> step -> log the steps before.
    with metrics_lib.Metrics(
      *(self.folder, self.name),
      steps=config.steps,
      start_step=at.step,
      wandb_project=config.observe.wandb,
    ) as metrics:
      meter = Meter(self.task, metrics, guard.check, self.observation, config.log_every)
      saved, upcoming = at.step, ahead.Ahead(batches, config.steps - at.step)

      def save(step):
        meter.flush()  # stops here rather than save a state that went wrong
        seconds = time.perf_counter() - self.began
        data = {"step": step, "seed": self.seed, "fingerprint": upcoming.fingerprint}
        data |= {"passed_over": at.passed_over, "roll_backs": at.roll_backs}
        with (
          self.observation.spend("save"),
          self.patience.over("the checkpoint before to be written"),
        ):
          kept = state if self.load_base is None else lora.without_base(state)
          self.checkpoints.save(step, kept, data, {**self.meta, "seconds": seconds})

      for step in range(at.step, config.steps + 1):
        last = step == config.steps
        stop = self.stop.received(self.mesh, last, upcoming.fault is not None)
        if step > at.step and _due(step, config.validate_every, last):
          try:
            with self.observation.spend("validation"):
              held_out = ahead.together(self.stream.validation())
              found = self.validate(state_lib.averaged(state), held_out, self.put, *self.frozen)
          except UserError as error:  # likewise of a batch: see below
            if step > saved:
              logging.error("%s", error)
              save(step)
            raise
          metrics.write(step, found)
          state = self.program.follow(state, np.float32(found[validation.LOSS]), config)
        if step > saved and (_due(step, config.checkpoint_every, last) or stop):
          save(step)
          saved = step
        if stop or last:
          with self.observation.spend("save"):
            self.checkpoints.wait()
        if stop == BAD_DATA:
          raise upcoming.fault or ahead.elsewhere()
        if stop:
          raise Interrupted(stop, self.name, step)
        if last:
          break
        try:
          with (
            self.observation.spend("data"),
            self.patience.over(f"the batch of step {step + 1}"),
          ):
            bucket, rows = next(upcoming)
            examples, rows = _examples(rows), self.put(bucket, rows)
        except UserError as error:  # its records are gone; the state is as good as ever
          if step > saved:
            logging.error("%s", error)
            save(step)
          raise
        with self.observation.step(step + 1):
          state, values = self.train_step[bucket, examples](state, rows, *self.frozen)
        meter.after(step + 1, bucket, examples, values)
    if config.validate_every and jax.process_index() == 0:
      validation.draw(self.folder)
    return time.perf_counter() - self.began

  def _compile(self) -> None:
    """Everything that runs between two saves, before the first step."""
    sizes, held_out = self.stream, self.stream.validation_sizes or {}
    trained = {item for s in (sizes.batch_sizes, *sizes.changed_sizes) for item in s.items()}
    steps = {key: rows for key, rows in self.rows_of.items() if key in trained}
    self.train_step = self.program.compile(steps, *self.frozen)
    if self.config.validate_every and held_out:
      state = state_lib.with_layout(self.program.shapes, self.program.layout)
      batches = {key: self.rows_of[key] for key in held_out.items()}
      self.validate.compile(state_lib.averaged(state), batches, *self.frozen)


def _due(step: int, every: int, last: bool) -> bool:
  """Whether something that happens every so many steps (0: never) and at the end is due."""
  return every > 0 and (step % every == 0 or last)


def shapes_by_size(
  task: Task, stream: Stream, mesh: jax.sharding.Mesh
) -> dict[tuple[Bucket, int], dict[str, jax.ShapeDtypeStruct]]:
  """`batch_shapes` by bucket and number of examples: a stage may change its batches."""
  return {
    (bucket, sizes[bucket]): shapes
    for sizes in (stream.batch_sizes, *stream.changed_sizes, stream.validation_sizes or {})
    for bucket, shapes in batch_shapes(task, sizes, mesh).items()
  }


def putter(
  task: Task, stream: Stream, mesh: jax.sharding.Mesh
) -> Callable[[Bucket, Mapping[str, np.ndarray]], dict[str, jax.Array]]:
  """A function of a bucket and this host's rows of a batch to the batch on the devices."""
  shapes = shapes_by_size(task, stream, mesh)
  return lambda bucket, rows: _to_devices(rows, shapes[bucket, _examples(rows)])


def _examples(rows: Mapping[str, np.ndarray]) -> int:
  """Of the global batch that these rows of one host are part of."""
  return len(next(iter(rows.values()))) * jax.process_count()


def _to_devices(
  rows: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """This host's rows of a batch as parts of global arrays, split over the batch axes."""
  made = {
    name: jax.make_array_from_process_local_data(shapes[name].sharding, x, shapes[name].shape)
    for name, x in rows.items()
  }
  # A CPU runs a step in the thread that has kept its memory only where the batch is there.
  return jax.block_until_ready(made) if jax.default_backend() == "cpu" else made


def _check_data(fingerprint: str, batches: Batches, folder: str) -> None:
  """Refuses to continue on other data: the order of examples would silently change."""
  if fingerprint != batches.fingerprint:
    raise CheckpointError(
      f"the checkpoint in {folder} was trained on other data, buckets, batch sizes or another seed "
      f"({fingerprint[:8]} there, {batches.fingerprint[:8]} here): restore them, or use another "
      "--workdir."
    )
