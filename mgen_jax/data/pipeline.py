"""The input pipeline: sources by bucket -> shuffled, repeated, batched, mixed -> this host's rows.

Every quantity is a pure function of (seed, step): which bucket a step trains on, which examples are
in its batch, which window of a clip is cut. So all hosts draw the same bucket at the same step, any
number of hosts draws the same global batches, and to resume is to start at a step: no iterator
state is saved. With B examples in a global batch and P hosts, host p holds rows
[p * B / P, (p + 1) * B / P): the global array is the same for every P.

Not here: how an example is read (`sources`), devices and shardings (`parallel`), or what a task
makes of a batch.
"""

import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags, logging

from mgen_jax.data.buckets import Bucket
from mgen_jax.data.sources import Example, Source, Transform, sha256
from mgen_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Weights are compared as whole numbers of this resolution.
_WEIGHT_UNIT = 2**20


class Stream(Iterator[tuple[Bucket, Batch]]):
  """Batches of this host, in order; close it, or use it in a `with`.

  `bucket_at`, `examples_at` and `examples_before` are for streams from `make_stream`.

  Attributes:
    step: of the batch that comes next.
    wait_seconds: how long the last `next()` took: what the accelerator may have waited for data.
    fingerprint: SHA-256 of all that decides the order of the data. A checkpoint keeps it, and a
      step number is worth something only under the same one. Hosts, threads and workers are not
      part of it.
  """

  def __init__(
    self,
    dataset: grain.IterDataset,
    buckets: Sequence[Bucket],
    *,
    order: "_Order | None" = None,
    names: "Sequence[_Names]" = (),
    batch_sizes: Mapping[Bucket, int],
    start_step: int = 0,
    fingerprint: str = "",
  ):
    self.step = start_step
    self.wait_seconds = 0.0
    self.fingerprint = fingerprint
    self._buckets = tuple(buckets)
    self._order = order
    self._names = tuple(names)
    self._batch_sizes = dict(batch_sizes)
    # Held in a list so that closing lets go of it: Grain's own clean-up, run when the interpreter
    # is half taken down, prints errors.
    self._iterator = [iter(dataset)]
    self._close = weakref.finalize(self, _close_all, self._iterator)
    # Now, and not at the first `next`: workers start and decode while the programs are compiled.
    self._iterator[0].start_prefetch()

  def __next__(self) -> tuple[Bucket, Batch]:
    if not self._iterator:
      raise ValueError("this stream is closed")
    began = time.perf_counter()
    bucket, batch = next(self._iterator[0])
    self.step += 1
    # Out of the workers' shared memory: a batch may outlive the stream, and /dev/shm stays small.
    batch = {key: np.array(a) if type(a) is not np.ndarray else a for key, a in batch.items()}
    self.wait_seconds = time.perf_counter() - began
    return self._buckets[bucket], batch

  def bucket_at(self, step: int) -> Bucket:
    """The bucket of a step, without reading anything."""
    return self._buckets[self._order[step][0]]

  def examples_at(self, step: int) -> tuple[Bucket, list[str]]:
    """The bucket of a step, and what each example of its global batch was made from."""
    bucket, number = self._order[step]
    return self._buckets[bucket], self._names[bucket](number)

  def examples_before(self, step: int) -> dict[Bucket, int]:
    """How many examples of each bucket all hosts together draw before `step`.

    Divided by the length of a source it is the number of epochs over it.
    """
    counts = self._order.counts(step)
    return {b: n * self._batch_sizes[b] for b, n in zip(self._buckets, counts, strict=True)}

  def close(self) -> None:
    """Ends threads and worker processes; done at exit for a stream that was left open."""
    self._close()

  def __enter__(self) -> "Stream":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


def make_stream(
  sources: Mapping[Bucket, Source],
  *,
  batch_sizes: Mapping[Bucket, int],
  weights: Mapping[Bucket, float] | None = None,
  seed: int,
  start_step: int = 0,
  first_step: int = 0,
  drawn: Mapping[Bucket, int] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 4,
  workers: int = 0,
  transform: Transform | None = None,
  repeat: bool = False,
) -> Stream:
  """An endless stream of training batches that starts at any step.

  Starting at step k costs no more than starting at 0: it is an offset of the index, nothing is read
  or skipped.

  Args:
    sources: the same on every host.
    batch_sizes: of each bucket, examples over all hosts.
    weights: of each bucket, in steps; 0 leaves it out. None: every example is drawn equally often.
    start_step: of the first batch.
    first_step: at which this order begins; another went before it (`mixture.Scheduled`).
    drawn: examples of each bucket that went before, after which this order goes on. None: none.
    process_index, process_count: which host this is, of how many.
    threads: that read batches ahead, one batch each (0: read when asked). So many batches are in
      memory, times `workers` if there are any.
    workers: processes to decode in, each with `threads` threads; for video only, since records are
      read faster by threads. They hand batches over in /dev/shm, which must hold
      2 * workers batches (docker: --shm-size), and the main module needs
      `if __name__ == "__main__"`. The stream is the same for any number.
    transform: of an example, called with a generator that depends on the seed and on the position
      of the example only. None keeps the example as it is.
    repeat: allow a bucket with fewer examples than its batch: batches then repeat them.

  Raises:
    UserError: a bucket without examples or with less than a batch of them, or whose batch does not
      divide by the hosts.
  """
  if weights is not None and (set(weights) != set(sources) or min(weights.values()) < 0):
    raise UserError(
      f"weights are given for {_names(weights)} but the buckets are {_names(sources)}; give each"
      " bucket one that is 0 or more."
    )
  buckets = sorted(bucket for bucket in sources if weights is None or weights[bucket] > 0)
  if not buckets:
    raise UserError("no bucket is left to draw from; give at least one a weight above 0.")
  _check(buckets, sources, batch_sizes, process_index, process_count)
  if weights is None:
    weights = {bucket: len(sources[bucket]) / batch_sizes[bucket] for bucket in buckets}
  order = _Order([weights[bucket] for bucket in buckets], first_step)
  parts, names = [], []
  for position, bucket in enumerate(buckets):
    size, length = batch_sizes[bucket], len(sources[bucket])
    if length < size:
      if not repeat:
        raise UserError(
          f"bucket {bucket.name} has {length} examples for a batch of {size}: lower its batch to"
          f" {length} or less, remove the bucket, or add clips of its length and shape."
        )
      repeats = "Bucket %s has %d examples for a batch of %d: batches repeat them."
      logging.warning(repeats, bucket.name, length, size)
    bucket_seed = _hash32(seed, bucket.name)
    before = 0 if drawn is None else drawn[bucket]
    rows = _HostRows(
      position, sources[bucket], transform, bucket_seed, process_index, process_count, before=before
    )
    indices = grain.MapDataset.range(length).shuffle(seed=bucket_seed).repeat()[before:]
    batches = indices.batch(size, drop_remainder=True)
    parts.append(batches.map_with_index(rows))
    names.append(_Names(sources[bucket], batches))
  mixed = grain.MapDataset.select_from_datasets(parts, order)
  return Stream(
    _read_ahead(mixed[start_step:], threads, workers),
    buckets,
    order=order,
    names=names,
    batch_sizes=batch_sizes,
    start_step=start_step,
    fingerprint=sha256(
      {
        "seed": seed,
        "buckets": {
          b.name: [sources[b].digest, batch_sizes[b], n]
          for b, n in zip(buckets, order.weights, strict=True)
        },
      }
    ),
  )


def make_ordered_stream(
  sources: Mapping[Bucket, Source],
  *,
  batch_sizes: Mapping[Bucket, int],
  seed: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 4,
  workers: int = 0,
  transform: Transform | None = None,
) -> Stream:
  """Every example once, in order, bucket after bucket: for evaluation and for encoding.

  The last batch of a bucket is filled up with its last example; the key "valid", bool [B], tells
  which rows count. Without `seed` nothing is random (centre windows); with it, windows depend on
  the seed and on the example. Buckets without examples are passed over, and none at all is an empty
  stream. Other arguments as in `make_stream`.
  """
  buckets = sorted(bucket for bucket in sources if len(sources[bucket]))
  _check(buckets, sources, batch_sizes, process_index, process_count)
  parts = [grain.MapDataset.source(())]
  for position, bucket in enumerate(buckets):
    # By content: the shards that a long source is cut into do not draw the same windows again.
    source_seed = None if seed is None else _hash32(seed, sources[bucket].digest)
    rows = _HostRows(
      position, sources[bucket], transform, source_seed, process_index, process_count, ordered=True
    )
    size = batch_sizes[bucket]
    batches = grain.MapDataset.range(math.ceil(len(sources[bucket]) / size))
    parts.append(batches.map(functools.partial(_consecutive, size)).map_with_index(rows))
  dataset = _read_ahead(grain.MapDataset.concatenate(parts), threads, workers)
  return Stream(dataset, buckets, batch_sizes=batch_sizes)


def _consecutive(size: int, batch: int) -> np.ndarray:
  return np.arange(batch * size, (batch + 1) * size)


def _read_ahead(dataset: grain.MapDataset, threads: int, workers: int) -> grain.IterDataset:
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  ahead = dataset.to_iter_dataset(options)
  if not workers:
    return ahead
  if not flags.FLAGS.is_parsed():  # Grain reads its flags to start workers; absl insists
    flags.FLAGS.mark_as_parsed()
  return ahead.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), _begin_worker
  )


def _begin_worker(worker: int, workers: int) -> None:
  """Ctrl-C is for the main process to handle; if that is killed, its workers go with it."""
  del worker, workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _HostRows:
  """(number of a global batch, its example indices) -> (bucket, this host's rows, stacked)."""

  bucket: int
  source: Source
  transform: Transform | None
  seed: int | None
  process_index: int
  process_count: int
  ordered: bool = False
  before: int = 0  # examples of the source that an earlier order has drawn

  def __call__(self, batch: int, indices: np.ndarray) -> tuple[int, Batch]:
    local = len(indices) // self.process_count
    rows = range(self.process_index * local, (self.process_index + 1) * local)
    first = self.before + batch * len(indices)
    examples = [self._example(first + row, int(indices[row])) for row in rows]
    stacked = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    if self.ordered:
      stacked["valid"] = indices[rows.start : rows.stop] < len(self.source)
    return self.bucket, stacked

  def _example(self, position: int, index: int) -> Example:
    rng = (
      None if self.seed is None else np.random.Generator(np.random.Philox([self.seed, position]))
    )
    example = self.source.example(min(index, len(self.source) - 1), rng)
    return example if self.transform is None else self.transform(example, rng)


@dataclasses.dataclass(frozen=True)
class _Names:
  """Number of a global batch of a bucket -> what its examples were made from."""

  source: Source
  batches: grain.MapDataset

  def __call__(self, batch: int) -> list[str]:
    return [self.source.name(int(index)) for index in self.batches[batch]]


class _Order(grain.transforms.DatasetSelectionMap):
  """Step -> (bucket, how often it was drawn before): each as evenly spread as its weight allows.

  The interleave of Grain's own `mix`, kept here because a checkpoint relies on it for years, and
  because it can count: bucket i takes its share of the steps that the buckets before it left over.
  """

  def __init__(self, weights: Sequence[float], first_step: int = 0):
    self.first_step = first_step
    total = sum(weights)
    self.weights = [max(1, round(weight / total * _WEIGHT_UNIT)) for weight in weights]

  def __len__(self) -> int:
    return sys.maxsize

  def counts(self, step: int) -> list[int]:
    """How many of the steps from `first_step` on, before `step`, go to each bucket."""
    counts, steps, remaining = [], step - self.first_step, sum(self.weights)
    for weight in self.weights:
      left = steps * (remaining - weight) // remaining
      counts.append(steps - left)
      steps, remaining = left, remaining - weight
    return counts

  def __getitem__(self, step: int) -> tuple[int, int]:
    before, after = self.counts(step), self.counts(step + 1)
    bucket = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    return bucket, before[bucket]


def check_shared_memory(batch_bytes: int, workers: int, folder: str = "/dev/shm") -> None:
  """Refuses to start workers that would die of a full shared memory in the middle of a run.

  Args:
    batch_bytes: of the largest batch of this host.
    workers: processes that hand batches over; 0 needs none.
    folder: where the system keeps shared memory; one that has no such folder is not checked.

  Raises:
    UserError: two batches of each worker do not fit.
  """
  if not workers or not os.path.isdir(folder):
    return
  needed, free = 2 * workers * batch_bytes, shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f"{workers} workers hand over batches of {batch_bytes / 2**20:,.0f} MiB through {folder}, of"
      f" which {free / 2**20:,.0f} MiB are free and {needed / 2**20:,.0f} needed: enlarge it"
      " (docker: --shm-size), or lower the batch or the number of workers."
    )


def _check(
  buckets: Sequence[Bucket],
  sources: Mapping[Bucket, Source],
  batch_sizes: Mapping[Bucket, int],
  process_index: int,
  process_count: int,
) -> None:
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} of {process_count}")
  for bucket in buckets:
    size = batch_sizes.get(bucket, 0)
    if not len(sources[bucket]):
      raise UserError(
        f"bucket {bucket.name} has no examples; remove it, or add clips of its length and shape."
      )
    if size < 1 or size % process_count:
      below, above = size // process_count * process_count, math.ceil(size / process_count)
      valid = [n for n in (below, max(1, above) * process_count) if n > 0]
      raise UserError(
        f"the batch of {size} of bucket {bucket.name} does not divide by {process_count} hosts; use"
        f" {' or '.join(map(str, valid))}."
      )


def _names(buckets: Iterable[Bucket]) -> str:
  return ", ".join(bucket.name for bucket in sorted(buckets))


def _hash32(seed: int, name: str) -> int:
  return int.from_bytes(hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=4).digest())
