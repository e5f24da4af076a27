"""Near-duplicates over all clips: who is a copy of whom, and which one of them stays.

Found are pairs: by equal packets and span, then by what `hashes` wrote. Two clips are as alike as
their frames are at the best shift of one against the other; embeddings are alike by their cosine.
Groups are the connected parts of the pairs (union-find), and all but its winner leave a group. The
winner is the clip with the most pixels, then the best looks, then the longest, then the smallest
id. What is stored of a clip is the similarity at which it falls into the group of a better one, so
that groups at any other threshold are a query.

Comparing every clip with every other is exact up to `exact_up_to` rows; beyond, each is compared
with those of its nearest cells only (faiss, inverted lists).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa

from data_pipelines.curate import columns, stage
from data_pipelines.curate.stages.hashes import BITS
from mgen_jax.errors import ConfigError, UserError

_OVERLAP = 0.5  # least share of the shorter clip over which two are compared
_PROBES = 8  # cells that a row is compared with
_MANY = 50_000  # rows from which on a search takes all threads
_BIT_COUNT = np.array([bin(value).count("1") for value in range(256)], np.uint8)


@dataclasses.dataclass(frozen=True)
class Copies(stage.TableStage):
  """Similarity is 1 - the share of differing bits, or a cosine; the paper drops from 0.99 of SSCD.

  For hashes 0.92 was chosen on real videos: encoded again 0.967, scaled 0.959, shifted by a second
  0.943, the 5 % most alike of unrelated clips 0.57. Pictures of few plain areas, as in Marbles,
  need a lower one: their finer coefficients are noise.
  """

  name = "copies"
  columns = {
    "copy_similarity": pa.float64(),  # at which it falls into a better clip's group; 0: never
    "copy_of": pa.string(),  # that clip; "" for none
    "copy_group": pa.string(),  # the winner of its group, at `grouped_at`
  }
  needs = (
    *("packets_md5", "copy_hashes", "copy_embedding", "start", "end"),
    *("width", "height", "aesthetics"),
  )

  by: Literal["hash", "embedding"] = "hash"
  floor: float = 0.9  # what is less alike counts as not alike at all
  grouped_at: float = 0.92
  exact_up_to: int = 200_000  # frames (hash) or clips (embedding)
  max_similarity: float = stage.threshold(0.92)

  def __post_init__(self):
    for name, value in (("max_similarity", self.max_similarity), ("grouped_at", self.grouped_at)):
      if not 0.5 <= self.floor <= value <= 1:
        raise ConfigError(
          f"copies.{name} is {value} and copies.floor {self.floor}: 0.5 <= floor <= {name} <= 1."
        )

  def rules(self) -> tuple[stage.Rule, ...]:
    most = self.max_similarity
    rule = stage.Rule("copy_similarity", "duplicate", "duplicates", at_most=most, strict=True)
    return (rule,)

  def scorer(self) -> str:
    return f"{self.by}, faiss {faiss.__version__}"

  def score(self, table: pa.Table) -> pa.Table:
    ids = table["clip_id"].to_pylist()
    order = rank(table)
    pairs = dict(exact_pairs(table))
    found = self._by_embedding(table) if self.by == "embedding" else self._by_hash(table)
    for pair, similarity in found:
      pairs[pair] = max(similarity, pairs.get(pair, 0.0))
    return pa.table(describe(ids, order, pairs, self.grouped_at), schema=pa.schema(self.columns))

  def _by_hash(self, table) -> Iterator[tuple[tuple[int, int], float]]:
    frames = columns.byte_rows(table["copy_hashes"], BITS // 8)
    for i, j in near_hashes(frames, int((1 - self.floor) * BITS), self.exact_up_to):
      similarity = aligned(frames[i], frames[j])
      if similarity >= self.floor:
        yield (i, j), similarity

  def _by_embedding(self, table) -> Iterator[tuple[tuple[int, int], float]]:
    there, vectors = columns.vectors(table["copy_embedding"])
    if table.num_rows and not len(there):
      raise UserError(
        'copies.by is "embedding" and no clip has one: give hashes.model, or set copies.by="hash".'
      )
    if len(there):
      for i, j, similarity in near_vectors(vectors, self.floor, self.exact_up_to):
        yield (int(there[i]), int(there[j])), similarity


def rank(table: pa.Table) -> list[int]:
  """The place of each clip, 0 for the best: pixels, looks, length, and then its id."""
  names = ("width", "height", "aesthetics", "start", "end", "clip_id")
  width, height, looks, start, end, ids = (table[name].to_pylist() for name in names)

  def key(i):
    pixels = (width[i] or 0) * (height[i] or 0)
    return -pixels, -(looks[i] or 0.0), (start[i] or 0) - (end[i] or 0), ids[i]

  places = [0] * table.num_rows
  for place, index in enumerate(sorted(range(table.num_rows), key=key)):
    places[index] = place
  return places


def exact_pairs(table: pa.Table) -> Iterator[tuple[tuple[int, int], float]]:
  """Clips of the same packets and the same span, with similarity 1, as a chain in each group."""
  equal: dict[tuple, list[int]] = {}
  found = (table[name].to_pylist() for name in ("packets_md5", "start", "end"))
  for index, (digest, start, end) in enumerate(zip(*found, strict=True)):
    if digest is not None and start is not None and end is not None:
      equal.setdefault((digest, round(start, 3), round(end, 3)), []).append(index)
  for members in equal.values():
    yield from (((i, j), 1.0) for i, j in itertools.pairwise(members))


@contextlib.contextmanager
def faiss_threads(rows: int) -> Iterator[None]:
  """One thread for few rows: for those, many threads mostly wait for each other."""
  before = faiss.omp_get_max_threads()
  faiss.omp_set_num_threads(1 if rows < _MANY else before)
  try:
    yield
  finally:
    faiss.omp_set_num_threads(before)


def near_hashes(
  frames: Sequence[np.ndarray], radius: int, exact_up_to: int
) -> Iterator[tuple[int, int]]:
  """Pairs (i < j) of clips with two frames whose hashes differ in at most `radius` bits.

  `frames` are uint8 [n_i, 32] of each clip; n_i may be 0. Blank frames do not count: else every
  clip with a fade would have to be compared with every other.
  """
  distinct = [np.unique(clip[clip.any(axis=1)], axis=0) for clip in frames]
  owner = np.repeat(np.arange(len(frames)), [len(clip) for clip in distinct])
  if not len(owner):
    return
  rows = np.ascontiguousarray(np.concatenate(distinct))
  if len(rows) <= exact_up_to:
    index = faiss.IndexBinaryFlat(BITS)
  else:
    cells = faiss.IndexBinaryFlat(BITS)
    index = faiss.IndexBinaryIVF(cells, BITS, int(np.sqrt(len(rows))))
    index.nprobe = _PROBES
    index.cp.niter, index.cp.max_points_per_centroid = 10, 64
    with faiss_threads(0):  # sums over threads would depend on how many there are
      index.train(rows)
  seen = set()
  with faiss_threads(len(rows)):
    index.add(rows)
  for start in range(0, len(rows), 4096):
    with faiss_threads(len(rows)):
      limits, _, hits = index.range_search(rows[start : start + 4096], radius + 1)
    first = np.repeat(owner[start : start + 4096], np.diff(limits.astype(np.int64)))
    second = owner[hits]
    forward = first < second
    seen.update(zip(first[forward].tolist(), second[forward].tolist(), strict=True))
  yield from sorted(seen)


def near_vectors(
  vectors: np.ndarray, floor: float, exact_up_to: int
) -> Iterator[tuple[int, int, float]]:
  """(i, j, cosine) with i < j of unit rows float32 [n, d] with a cosine of at least `floor`."""
  if len(vectors) <= exact_up_to:
    index = faiss.IndexFlatIP(vectors.shape[1])
  else:
    cells = faiss.IndexFlatIP(vectors.shape[1])
    lists = int(np.sqrt(len(vectors)))
    index = faiss.IndexIVFFlat(cells, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = _PROBES
    index.cp.niter, index.cp.max_points_per_centroid = 10, 64
    with faiss_threads(0):
      index.train(vectors)
  with faiss_threads(len(vectors)):
    index.add(vectors)
  found = []
  for start in range(0, len(vectors), 4096):
    part = vectors[start : start + 4096]
    with faiss_threads(len(vectors)):
      limits, _, hits = index.range_search(part, floor - 1e-3)
    first = np.repeat(np.arange(start, start + len(part)), np.diff(limits.astype(np.int64)))
    forward = first < hits
    found += zip(first[forward].tolist(), hits[forward].tolist(), strict=True)
  for i, j in sorted(found):
    # Once more in double precision: how faiss sums depends on the size of its blocks.
    cosine = float(np.dot(vectors[i].astype(np.float64), vectors[j].astype(np.float64)))
    if cosine >= floor:
      yield i, j, min(cosine, 1.0)


def aligned(first: np.ndarray, second: np.ndarray) -> float:
  """How alike two rows of hashes uint8 [n, 32] and [m, 32] are, at the best shift in time.

  1 - the mean share of differing bits over the frames that lie on each other and of which neither
  is blank; those must be half of the shorter one's.
  """
  shown = first.any(axis=1), second.any(axis=1)
  least = max(1, int(np.ceil(_OVERLAP * min(shown[0].sum(), shown[1].sum()))))
  differ = _BIT_COUNT[first[:, None] ^ second[None]].sum(axis=-1, dtype=np.int64)  # [n, m]
  both = shown[0][:, None] & shown[1]
  best = 1.0
  for shift in range(-len(first) + 1, len(second)):
    counts = np.diagonal(both, shift)
    if counts.sum() >= least:
      best = min(best, float(np.diagonal(differ, shift)[counts].mean()) / BITS)
  return 1 - best


class Groups:
  """Union-find of things 0, 1, ...; of each group the member with the smallest rank is its head."""

  def __init__(self, ranks: Sequence[int]):
    self._ranks = ranks
    self._parent = list(range(len(ranks)))

  def head(self, thing: int) -> int:
    """Of the group that a thing is in."""
    parent = self._parent
    while parent[thing] != thing:
      parent[thing] = parent[parent[thing]]
      thing = parent[thing]
    return thing

  def join(self, first: int, second: int) -> tuple[int, int] | None:
    """Makes one group of two; (its head, the head that it replaces), None if it was one."""
    heads = sorted((self.head(first), self.head(second)), key=lambda each: self._ranks[each])
    if heads[0] == heads[1]:
      return None
    self._parent[heads[1]] = heads[0]
    return heads[0], heads[1]


def describe(
  ids: Sequence[str], ranks: Sequence[int], pairs: dict[tuple[int, int], float], grouped_at: float
) -> dict[str, Any]:
  """The columns of `Copies` from pairs (i < j) and their similarities.

  Pairs are joined from the most similar one on, so the groups at a threshold are those when it is
  reached, and a clip is the winner of its group until it is joined to a better one.
  """
  joined = Groups(ranks)
  fell: list[tuple[float, str]] = [(0.0, "")] * len(ids)
  grouped = Groups(ranks)
  for (i, j), similarity in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
    heads = joined.join(i, j)
    if heads:
      fell[heads[1]] = (similarity, ids[heads[0]])
      if similarity >= grouped_at:
        grouped.join(i, j)
  return {
    "copy_similarity": [similarity for similarity, _ in fell],
    "copy_of": [other for _, other in fell],
    "copy_group": [ids[grouped.head(i)] for i in range(len(ids))],
  }
