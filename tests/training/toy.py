"""A task small enough to train in milliseconds, and its data: for tests of the loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.config import TrainStage
from mgen_jax.data import pipeline, records, sources
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.autoencoder import AutoencoderTaskConfig
from mgen_jax.tasks.base import ArraySpec
from mgen_jax.training import checkpoint as checkpoint_lib
from mgen_jax.training import loop
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import program as program_lib
from mgen_jax.training.optimizer import OptimizerConfig

BUCKETS = (Bucket(1, 8, 8), Bucket(4, 8, 8))
BATCH = 16


class ToyTask:
  """Noisy regression: y = x A, learned as x W + b with noise on x from each example's key."""

  config = None
  source = "media"

  def init(self, key):
    def box(value, *names):
      return nn.LogicallyPartitioned(value, names)

    return {
      "w": box(0.1 * jax.random.normal(key, (8, 16)), "embed", "mlp"),
      "b": jnp.zeros((16,)),
    }

  def loss(self, params, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
    error = (batch["x"] + 0.1 * noise) @ params["w"] + params["b"] - batch["y"]
    # Which examples the batch has, and in which order: whole numbers, exact in any order of sums.
    seen = jnp.sum(batch["id"] * (1 + jnp.arange(batch["id"].size)))
    return jnp.square(error).mean(), {"bias": params["b"].mean(), "seen": seen}

  def batch_spec(self, bucket, examples):
    return {
      "x": ArraySpec((examples, 8), np.float32, ("batch", None)),
      "y": ArraySpec((examples, 16), np.float32, ("batch", None)),
      "id": ArraySpec((examples,), np.float32, ("batch",)),
    }

  def flops(self, bucket):
    return 3.0 * 2 * 8 * 16

  def tokens(self, bucket):
    return bucket.frames


class Crash(Exception):
  """Ends a run in the middle."""


def crash_at(number):
  """For `on_step`: a crash when batch `number` is drawn."""

  def on_step(step):
    if step == number:
      raise Crash

  return on_step


def batch_at(step, poison=(), leap=(), rows=3):
  """(bucket, batch) of a step; those in `poison` have a NaN, those in `leap` are far too large."""
  rng = np.random.default_rng(step)
  x = rng.normal(size=(BATCH, 8)).astype(np.float32)
  target = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  if step in poison:
    x[rows, 2] = np.nan
  if step in leap:
    x *= 100
  ids = (step * BATCH + np.arange(BATCH, dtype=np.float32)) % 97
  return BUCKETS[step % 2], {"x": x, "y": (x @ target).astype(np.float32), "id": ids}


class Batches:
  """Endless batches from a step on; `on_step(step)` is called before each is handed out.

  With `jump` (step, offset) other batches are drawn from that step on.
  """

  def __init__(self, step, on_step=None, fingerprint="toy", jump=(0, 0), **faults):
    self.step, self.faults, self.on_step, self.jump = step, faults, on_step, jump
    self.fingerprint = fingerprint

  def __iter__(self):
    return self

  def __next__(self):
    if self.on_step is not None:
      self.on_step(self.step)
    self.step += 1
    number = self.step - 1 + (self.jump[1] if self.step > self.jump[0] else 0)
    return batch_at(number, **self.faults)

  def examples_at(self, step):
    return BUCKETS[step % 2], [f"example {step}-{row}" for row in range(BATCH)]

  def close(self):
    pass


def stream(**options):
  """A loop.Stream; options of `Batches`."""

  def validation():
    for index in range(2):
      yield batch_at(10_000 + index)

  sizes = dict.fromkeys(BUCKETS, BATCH)
  start = lambda step: Batches(step, **options)  # noqa: E731
  return loop.Stream(sizes, start, validation, validation_sizes=sizes)


class Examples:
  """A source of the pipeline: the same regression, with a random draw in each example."""

  def __init__(self, count):
    self.count, self.digest = count, f"toy {count}"

  def __len__(self):
    return self.count

  def name(self, index):
    return f"number {index} of {self.count}"

  def example(self, index, rng):
    x = np.random.default_rng(index).normal(size=8) + 0.1 * (rng.random() if rng else 0.5)
    target = np.random.default_rng(0).normal(size=(8, 16))
    made = {"x": x, "y": x @ target, "id": np.asarray(index)}
    return {name: value.astype(np.float32) for name, value in made.items()}


def _hooked(stream, on_batch):
  """The same stream, with `on_batch(number)` called before each batch is handed out."""

  class Hooked(pipeline.Stream):
    def __next__(self):
      if on_batch is not None:
        on_batch(self.step)
      return super().__next__()

  stream.__class__ = Hooked
  return stream


def mixed_stream(workers=0, on_batch=None):
  """A loop.Stream of the real pipeline: two buckets in unequal shares, this host's rows.

  Args:
    workers: of Grain.
    on_batch: called with the number of each batch before it is handed out.
  """

  def start(step):
    stream = pipeline.make_stream(
      {BUCKETS[0]: Examples(50), BUCKETS[1]: Examples(90)},
      batch_sizes=dict.fromkeys(BUCKETS, BATCH),
      seed=3,
      start_step=step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      workers=workers,
    )
    return _hooked(stream, on_batch)

  return loop.Stream(dict.fromkeys(BUCKETS, BATCH), start, lambda: iter(()))


def write_records(folder):
  """The examples as records, in two shards; returns the path of the second."""
  shards = []
  for shard in range(2):
    with records.RecordWriter(folder / records.shard_name(shard, 2)) as writer:
      for index in range(50 * shard, 50 * shard + 50):
        arrays = Examples(100).example(index, None)
        writer.write(records.Record(str(index), BUCKETS[0].name, "", 0.0, 0.0, arrays))
    shards.append(writer.shard)
  records.write_manifest(folder, shards, bucket=BUCKETS[0], settings={})
  return folder / shards[1].name


def record_stream(folder, on_batch=None):
  """A loop.Stream of such records."""

  def start(step):
    source = sources.LatentSource(records.open_records(folder))
    stream = pipeline.make_stream(
      {BUCKETS[0]: source},
      batch_sizes={BUCKETS[0]: BATCH},
      seed=3,
      start_step=step,
      transform=lambda example, rng: {name: example[name] for name in ("x", "y", "id")},
    )
    return _hooked(stream, on_batch)

  return loop.Stream({BUCKETS[0]: BATCH}, start, lambda: iter(()))


def stage(**values):
  """A TrainStage for the toy."""
  values = {
    "steps": 24,
    "log_every": 1,
    "checkpoint_every": 8,
    "optimizer": OptimizerConfig(lr=0.05, warmup_steps=4),
    **values,
  }
  return TrainStage(task=AutoencoderTaskConfig(), **values)


def train(folder, *, devices=1, data=None, load_initial=None, **values):
  """Trains the toy on some of the simulated devices."""
  config = stage(**values)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
  return loop.train(
    ToyTask(),
    config,
    stream() if data is None else data,
    mesh,
    name="toy",
    seed=3,
    folder=str(folder),
    meta={"stage": "toy"},
    load_initial=load_initial,
  )


def losses(folder):
  """By step, as the log has them."""
  return {line["step"]: line["loss"] for line in metrics_lib.read(str(folder)) if "loss" in line}


def final_state(folder, **values):
  """What the newest checkpoint holds, on the host; `values` as for `stage`."""
  program = program_lib.make_program(
    ToyTask(), stage(**values), mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1]), 3
  )
  with checkpoint_lib.Checkpoints(f"{folder}/checkpoints", read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(program.shapes, program.layout).state)
