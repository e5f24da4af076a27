"""The training loop. One loop trains every task; this file reads from top to bottom.

A run starts in one of three ways, tried in this order:
  1. this stage has a checkpoint: continue from it, bit for bit, data order included;
  2. the stage says `init_from` another: start at step 0 from that stage's averaged parameters,
     fitted to this one's model (`start.py`);
  3. else: start at step 0 from random parameters.

Not here: what is learned (`tasks/`), the step itself (`step.py`), what a stage is (`runner.py`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from absl import logging

from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks.base import Task
from mgen_jax.training import lora, parameters, plateau, validation
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib
from mgen_jax.training.checkpoint import CheckpointError, Checkpoints
from mgen_jax.training.interrupt import Interrupted, StopSignal
from mgen_jax.training.meter import Meter

Rows = tuple[Bucket, dict[str, np.ndarray]]  # a bucket and this host's rows of a batch


class Batches(Protocol):
  """An endless iterator of training batches (`data.pipeline.Stream` is one)."""

  fingerprint: str  # of everything that decides the order of examples

  def __iter__(self) -> "Batches": ...

  def __next__(self) -> Rows: ...

  def close(self) -> None: ...


class Stream(NamedTuple):
  """Where batches come from."""

  batch_sizes: Mapping[Bucket, int]  # global
  open: Callable[[int], Batches]  # from a step on
  validation: Callable[[], Iterator[Rows]]  # held out, finite, always the same
  changed_sizes: tuple[Mapping[Bucket, int], ...] = ()  # global batches of later steps

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

  Returns:
    Seconds that this stage has taken, earlier runs of it included.

  Raises:
    NotFiniteError: a loss or gradient that is not finite.
    CheckpointError: a checkpoint that cannot be read or written.
    Interrupted: on SIGINT or SIGTERM, after saving.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as stack:
    stack.enter_context(mesh_lib.use(mesh))
    stop = stack.enter_context(StopSignal())
    checkpoints = stack.enter_context(Checkpoints(f"{folder}/checkpoints", keep=config.keep))
    task = lora.wrap(task, config.lora)
    optimizer, shapes, layout, train_step, contents = make_program(task, config, mesh, seed)
    validate = validation.Validator(task, mesh, seed=seed, bins=config.validate_bins)
    observe = jax.jit(plateau.observe, static_argnums=2, out_shardings=layout.plateau)

    extra = () if frozen is None else (frozen,)

    # Restore.
    start, seconds_before = 0, 0.0
    if checkpoints.latest_step() is not None:
      restored = checkpoints.restore(shapes, layout)
      start, state = restored.step, restored.state
      seconds_before = restored.meta["seconds"]
      logging.info("stage %s continues from step %d of %d", name, start, config.steps)
    else:
      load_initial = lora.starting(task, load_initial, seed)
      initial = load_initial(shapes.params, layout.params) if load_initial else None
      state = state_lib.initialise(task, optimizer, layout, seed, initial, contents)

    rows_of, put = shapes_by_size(task, stream, mesh), putter(task, stream, mesh)
    batches = stack.enter_context(contextlib.closing(stream.open(start)))
    if start:
      _check_data(restored.data, batches, checkpoints.folder)
    if start < config.steps:
      train_step = step_lib.compile_for(
        train_step, state_lib.with_layout(shapes, layout), rows_of, frozen
      )
    metrics = stack.enter_context(
      metrics_lib.Metrics(folder, name, steps=config.steps, start_step=start)
    )
    meter = Meter(task, metrics, checkpoints, name, config.log_every)

    # Evaluate if due -> save if due -> next batch -> step -> log the steps before.
    saved = start
    for step in range(start, config.steps + 1):
      last = step == config.steps
      signum = stop.received(step, config.log_every)
      if step > start and _due(step, config.validate_every, last):
        found = validate(state_lib.averaged(state), stream.validation(), put, *extra)
        metrics.write(step, found)
        if contents.plateau:
          loss = np.float32(found[validation.LOSS])
          state = state.replace(plateau=observe(state.plateau, loss, config.optimizer.plateau))
      if step > saved and (_due(step, config.checkpoint_every, last) or signum):
        meter.flush()  # stops here rather than save a state that went wrong
        data = {"step": step, "seed": seed, "fingerprint": batches.fingerprint}
        seconds = seconds_before + time.perf_counter() - began
        checkpoints.save(step, state, data, {**meta, "seconds": seconds})
        saved = step
      if signum:
        checkpoints.wait()
        raise Interrupted(signum, name, step)
      if last:
        break
      with meter.waiting():
        bucket, rows = next(batches)
      examples = _examples(rows)
      state, values = train_step[bucket, examples](state, put(bucket, rows), *extra)
      meter.after(step + 1, bucket, examples, values)
  if config.validate_every and jax.process_index() == 0:
    validation.draw(folder)
  return seconds_before + time.perf_counter() - began


class Program(NamedTuple):
  """What a stage runs, before it is compiled: no array is made for it."""

  optimizer: optax.GradientTransformation
  shapes: state_lib.TrainState  # of the state
  layout: state_lib.TrainState  # its shardings
  train_step: Callable[..., Any]  # from `step.make_train_step`
  contents: state_lib.Contents  # of the state


def make_program(task: Task, config: TrainStage, mesh: jax.sharding.Mesh, seed: int) -> Program:
  """The train step of a stage on a mesh, which may be one of devices that are not here."""
  task = lora.wrap(task, config.lora)
  untrained = state_lib.untrained_parts(task)
  names = list(parameters.flatten(state_lib.param_shapes(task)))
  frozen = parameters.matching(config.frozen, names, "frozen") | parameters.matching(
    untrained, names, "untrained"
  )
  contents = state_lib.Contents(
    frozen, ema=config.ema != "off", plateau=config.optimizer.schedule == "plateau"
  )
  optimizer = optimizer_lib.make_optimizers(
    config.optimizer, config.optimizers, untrained, config.steps, frozen
  )
  layout = state_lib.shardings(task, optimizer, mesh, contents)
  train_step = step_lib.make_train_step(
    task,
    optimizer,
    optimizer_lib.make_schedule(config.optimizer, config.steps),
    layout,
    seed=seed,
    passes=lambda examples: config.passes(examples, mesh_lib.batch_shards(mesh)),
    ema_decay=step_lib.ema_decay(config),
    contents=contents,
  )
  shapes = state_lib.shapes(task, optimizer, contents)
  return Program(optimizer, shapes, layout, train_step, contents)


def _due(step: int, every: int, last: bool) -> bool:
  """Whether something that happens every so many steps (0: never) and at the end is due."""
  return every > 0 and (step % every == 0 or last)


def batch_shapes(
  task: Task, batch_sizes: Mapping[Bucket, int], mesh: jax.sharding.Mesh
) -> dict[Bucket, dict[str, jax.ShapeDtypeStruct]]:
  """The batch of each bucket as shapes, dtypes and shardings, which follow the rules table."""
  return {
    bucket: {
      name: jax.ShapeDtypeStruct(
        spec.shape, spec.dtype, sharding=rules.sharding(mesh, spec.axes, spec.shape)
      )
      for name, spec in task.batch_spec(bucket, examples).items()
    }
    for bucket, examples in batch_sizes.items()
  }


def shapes_by_size(
  task: Task, stream: Stream, mesh: jax.sharding.Mesh
) -> dict[tuple[Bucket, int], dict[str, jax.ShapeDtypeStruct]]:
  """`batch_shapes` by bucket and number of examples: a stage may change its batches."""
  return {
    (bucket, sizes[bucket]): shapes
    for sizes in (stream.batch_sizes, *stream.changed_sizes)
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
  return {
    name: jax.make_array_from_process_local_data(shapes[name].sharding, x, shapes[name].shape)
    for name, x in rows.items()
  }


def _check_data(data: dict[str, Any], batches: Batches, folder: str) -> None:
  """Refuses to continue on other data: the order of examples would silently change."""
  if data["fingerprint"] != batches.fingerprint:
    raise CheckpointError(
      f"the checkpoint in {folder} was trained on other data, buckets, batch sizes or another seed "
      f"({data['fingerprint'][:8]} there, {batches.fingerprint[:8]} here): restore them, or use "
      "another --workdir."
    )
