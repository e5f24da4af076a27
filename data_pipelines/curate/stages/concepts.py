"""Concepts: clusters of alike clips, of which the large ones are thinned out (Movie Gen 3.2.1).

k-means on the embeddings, clusters whose centres nearly agree merged, and then from a cluster of n
clips a share of min(1, sqrt(t / n)) is kept, which is sampling by 1 / sqrt(n); t follows from how
many shall be left. A clip with a person may be spared: the paper keeps their frequency.
"""

import dataclasses

import faiss
import numpy as np
import pyarrow as pa

from data_pipelines.curate import draws, stage
from data_pipelines.curate.stages.copies import groups
from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Concepts(stage.TableStage):
  """The paper keeps 0.817 of its clips here (Table 38: 1.15 % to 0.94 %)."""

  name = "concepts"
  columns = {"cluster": pa.int32(), "cluster_size": pa.int32()}
  needs = ("embedding",)
  choice = ("resampled", "concepts")

  clusters: int = 0  # before merging; 0: one for `per_cluster` clips
  per_cluster: int = 64
  iterations: int = 20
  merge: float = 0.9  # cosine of two centres from which on they are one
  keep: float = stage.threshold(0.817)  # share of the clips; 1 keeps all
  spare_humans: float = stage.threshold(0.0)  # clips with `human` from here on stay; 0: no exception
  seed: int = stage.threshold(0)

  def __post_init__(self):
    if not 0 < self.keep <= 1 or not 0 < self.merge <= 1:
      raise ConfigError(
        f"concepts.keep is {self.keep} and concepts.merge {self.merge}: shares above 0 and up to 1."
      )
    if self.clusters < 0 or self.per_cluster < 1 or self.iterations < 1:
      raise ConfigError("concepts.clusters, per_cluster and iterations cannot be below 0, 1 and 1.")

  def scorer(self) -> str:
    return f"faiss k-means {faiss.__version__}"

  def score(self, table: pa.Table) -> pa.Table:
    rows = table["embedding"].to_pylist()
    there = [index for index, row in enumerate(rows) if row is not None]
    labels: list[int | None] = [None] * len(rows)
    if there:
      vectors = np.float32([rows[index] for index in there])
      count = self.clusters or max(1, len(there) // self.per_cluster)
      merged = cluster(vectors, min(count, len(there)), self.iterations, self.merge)
      for index, label in zip(there, merged.tolist(), strict=True):
        labels[index] = label
    sizes = np.bincount([label for label in labels if label is not None], minlength=1)
    size = [None if label is None else int(sizes[label]) for label in labels]
    return pa.table({"cluster": labels, "cluster_size": size}, schema=pa.schema(self.columns))

  def choose(self, table: pa.Table, kept: np.ndarray) -> np.ndarray:
    """bool [n], a subset of `kept`; cluster sizes are those of the clips that are kept so far."""
    if self.keep == 1:
      return kept
    labels = np.array([-1 if x is None else x for x in table["cluster"].to_pylist()], np.int64)
    spared = ~kept | (labels < 0)
    if self.spare_humans and "human" in table.column_names:
      human = np.array([x or 0.0 for x in table["human"].to_pylist()])
      spared |= human >= self.spare_humans
    free = ~spared
    sizes = np.bincount(labels[free], minlength=labels.max(initial=0) + 1)
    wanted = self.keep * kept.sum() - (kept & spared).sum()
    shares = inverse_root(sizes, max(wanted, 0.0))
    draw = draws.uniform(self.seed, "concepts", table["clip_id"].to_pylist())
    left = kept.copy()
    left[free] = draw[free] < shares[labels[free]]
    return left


def cluster(vectors: np.ndarray, count: int, iterations: int, merge: float) -> np.ndarray:
  """int [n]: merged clusters of unit rows float32 [n, d], numbered by their first member.

  One thread: a sum over threads would depend on how many there are.
  """
  threads = faiss.omp_get_max_threads()
  faiss.omp_set_num_threads(1)
  try:
    kmeans = faiss.Kmeans(
      vectors.shape[1], count, niter=iterations, spherical=True, seed=1, verbose=False,
      min_points_per_centroid=1, max_points_per_centroid=1024,
    )  # fmt: skip
    kmeans.train(vectors)
    _, nearest = kmeans.index.search(vectors, 1)
  finally:
    faiss.omp_set_num_threads(threads)
  centres = kmeans.centroids
  alike = np.argwhere(np.triu(centres @ centres.T >= merge, 1))
  joined = np.array(groups(count, [(int(i), int(j)) for i, j in alike]))[nearest[:, 0]]
  _, first, labels = np.unique(joined, return_index=True, return_inverse=True)
  return np.argsort(np.argsort(first))[labels]


def inverse_root(sizes: np.ndarray, wanted: float) -> np.ndarray:
  """Shares min(1, sqrt(t / n)) of clusters of n clips, t such that `wanted` clips are expected."""
  sizes = np.maximum(sizes, 0).astype(np.float64)
  if wanted >= sizes.sum():
    return np.ones(len(sizes))
  low, high = 0.0, float(sizes.max())
  roots = np.sqrt(np.where(sizes > 0, sizes, 1))
  for _ in range(100):
    t = (low + high) / 2
    expected = (np.minimum(1, np.sqrt(t) / roots) * sizes).sum()
    low, high = (t, high) if expected < wanted else (low, t)
  return np.minimum(1, np.sqrt(high) / roots)
