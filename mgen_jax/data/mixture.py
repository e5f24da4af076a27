"""Several sets of data as one: mixed within a batch, and changed at fixed steps of a stage.

A mixture is a source like any other: its length is that of one pass, and its index says which set
and which example. A schedule is a stream like any other: phase after phase, each a function of the
step. So what was promised of one source holds here too: the order of examples is a function of
(seed, step), on any number of hosts, and starting at step k reads nothing before it.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mgen_jax.data.buckets import Bucket
from mgen_jax.data.pipeline import Batch, Stream
from mgen_jax.data.sources import Example, Source, sha256


class MixtureSource:
  """Examples of several sources of one bucket, in given shares.

  One pass shows every example at least once. Without weights it shows each exactly once, so that
  each source has the share of its size (movie_gen 4.4). With weights, the source that needs most
  passes over the mixture sets its length; the others repeat, each example as often as any other of
  its source to within one. Shares are exact in every pass, to within one example of each source;
  the pipeline shuffles anew in each.
  """

  def __init__(self, parts: Sequence[Source], weights: Sequence[float] | None = None):
    """`weights`: of each part, above 0; None: their sizes. Parts without examples are left out."""
    kept = [index for index, part in enumerate(parts) if len(part)]
    self.parts = [parts[index] for index in kept]
    sizes = [len(part) for part in self.parts]
    self.counts = sizes
    if weights is not None and self.parts:
      shares = np.asarray([weights[index] for index in kept], np.float64)
      shares /= shares.sum()
      length = max(math.ceil(size / share) for size, share in zip(sizes, shares, strict=True))
      ends = np.round(np.cumsum(shares) * length).astype(np.int64)
      self.counts = np.diff(ends, prepend=0).tolist()
    self._ends = list(itertools.accumulate(self.counts))
    self.digest = sha256([[part.digest for part in self.parts], self.counts])

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def place(self, index: int) -> tuple[int, int]:
    """Which part, of those with examples, and which of its examples."""
    part = bisect.bisect_right(self._ends, index)
    first = self._ends[part - 1] if part else 0
    return part, (index - first) % len(self.parts[part])

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    part, inner = self.place(index)
    return self.parts[part].example(inner, rng)

  def name(self, index: int) -> str:
    part, inner = self.place(index)
    return self.parts[part].name(inner)


class EvenMixture:
  """The same examples for evaluation: one from each source in turn, until each has come once.

  So the first batches, which are all that a validation looks at, have something of every source.
  """

  def __init__(self, parts: Sequence[Source]):
    self.parts = [part for part in parts if len(part)]
    self.digest = sha256([part.digest for part in self.parts])

  def __len__(self) -> int:
    return sum(map(len, self.parts))

  def place(self, index: int) -> tuple[int, int]:
    """Which part, of those with examples, and which of its examples."""
    turn, left = 0, index  # turns that all parts in `still` take, and what is left of the index
    still = range(len(self.parts))
    while True:
      until = min(len(self.parts[part]) for part in still)  # one of them ends there
      if left < (until - turn) * len(still):
        return still[left % len(still)], turn + left // len(still)
      left -= (until - turn) * len(still)
      turn = until
      still = [part for part in still if len(self.parts[part]) > until]

  def example(self, index: int, rng: np.random.Generator | None) -> Example:
    part, inner = self.place(index)
    return self.parts[part].example(inner, rng)

  def name(self, index: int) -> str:
    part, inner = self.place(index)
    return self.parts[part].name(inner)


@dataclasses.dataclass(frozen=True)
class Phase:
  """What is drawn from a step on."""

  first_step: int
  sources: Mapping[Bucket, Source]
  batch_sizes: Mapping[Bucket, int]  # global
  weights: Mapping[Bucket, float]


class Scheduled(Iterator[tuple[Bucket, Batch]]):
  """Batches phase after phase.

  Each source of a bucket has one endless order of examples, of which every phase takes the next
  ones in batches of its own size: a change repeats nothing and leaves nothing out.

  Attributes:
    step: of the batch that comes next.
    fingerprint: of all that decided the order of the batches so far. A phase to come is not part of
      it, so one may be added or changed while a run is interrupted.
  """

  def __init__(self, phases: Sequence[Phase], make: Callable[..., Stream], start_step: int):
    """`make`: `pipeline.make_stream` with all that does not change; the phases begin at step 0."""
    self.step = start_step
    self._phases, self._make = tuple(phases), make
    self._prints: list[str] = []
    self._drawn: list[dict[Bucket, int]] = []  # before each phase, of the sources of its buckets
    self._count()
    self._current = self._index(start_step)
    self._stream = self._open(self._current, start_step)

  def _count(self) -> None:
    """How far the order of each source is when a phase begins."""
    drawn: dict[tuple[Bucket, str], int] = {}
    ends = [phase.first_step for phase in self._phases[1:]] + [self._phases[-1].first_step]
    for index, (phase, end) in enumerate(zip(self._phases, ends, strict=True)):
      keys = {bucket: (bucket, source.digest) for bucket, source in phase.sources.items()}
      self._drawn.append({bucket: drawn.get(key, 0) for bucket, key in keys.items()})
      with self._open(index, phase.first_step, threads=0, workers=0) as stream:
        self._prints.append(stream.fingerprint)
        for bucket, count in stream.examples_before(end).items():
          drawn[keys[bucket]] = drawn.get(keys[bucket], 0) + count

  def _index(self, step: int) -> int:
    return bisect.bisect_right([phase.first_step for phase in self._phases], step) - 1

  def _open(self, index: int, step: int, **options: int) -> Stream:
    phase = self._phases[index]
    return self._make(
      phase.sources,
      batch_sizes=phase.batch_sizes,
      weights=phase.weights,
      start_step=step,
      first_step=phase.first_step,
      drawn=self._drawn[index],
      **options,
    )

  @property
  def fingerprint(self) -> str:
    """See above."""
    begun = [
      [phase.first_step, digest]
      for phase, digest in zip(self._phases, self._prints, strict=True)
      if phase.first_step < max(1, self.step)
    ]
    return begun[0][1] if len(begun) == 1 else sha256(begun)

  def __next__(self) -> tuple[Bucket, Batch]:
    index = self._index(self.step)
    if index != self._current:
      self._stream.close()
      self._stream, self._current = self._open(index, self.step), index
    batch = next(self._stream)
    self.step += 1
    return batch

  def examples_at(self, step: int) -> Any:
    """As that of `pipeline.Stream`."""
    index = self._index(step)
    if index == self._current:
      return self._stream.examples_at(step)
    with self._open(index, step, threads=0, workers=0) as stream:
      return stream.examples_at(step)

  def close(self) -> None:
    """Ends threads and worker processes."""
    self._stream.close()
