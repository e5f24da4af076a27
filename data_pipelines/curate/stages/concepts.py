"""Concepts: clusters of alike clips, of which the large ones are thinned out (Movie Gen 3.2.1).

k-means on the embeddings, clusters whose centres nearly agree merged, and then from a cluster of n
clips a share of min(1, sqrt(t / n)) is kept, which is sampling by 1 / sqrt(n); t follows from how
many shall be left. A clip with a person may be spared: the paper keeps their frequency.
"""

import dataclasses

import faiss
import numpy as np
import pyarrow as pa

from data_pipelines.curate import columns, draws, stage
from data_pipelines.curate.stages.copies import Groups, faiss_threads
from mgen_jax.errors import ConfigError

_BLOCK = 1024  # centres that are compared with all others at a time


@dataclasses.dataclass(frozen=True)
class Concepts(stage.TableStage):
  """The paper keeps 0.817 of its clips here (Table 38: 1.15 % to 0.94 %)."""

  name = "concepts"
  columns = {
    "cluster": pa.int32(),  # -1 for a clip without embedding
    "cluster_size": pa.int32(),
    "in_concepts": pa.bool_(),  # whether it is still there after resampling
  }
  needs = ("embedding", "human")

  clusters: int = 0  # before merging; 0: one for `per_cluster` clips
  per_cluster: int = 64
  iterations: int = 20
  merge: float = 0.9  # cosine of two centres from which on they are one
  keep: float = 0.817  # share of the clips; 1 keeps all
  spare_humans: float = 2.0  # clips with `human` from here on stay; above 1: no exception
  seed: int = 0

  def __post_init__(self):
    if not 0 < self.keep <= 1 or not 0 < self.merge <= 1:
      raise ConfigError(
        f"concepts.keep is {self.keep} and concepts.merge {self.merge}: shares above 0 and up to 1."
      )
    if self.clusters < 0 or self.per_cluster < 1 or self.iterations < 1:
      raise ConfigError("concepts.clusters, per_cluster and iterations cannot be below 0, 1 and 1.")

  def scorer(self) -> str:
    return f"faiss k-means {faiss.__version__}"

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("in_concepts", "resampled", "concepts", at_least=1),)

  def score(self, table: pa.Table) -> pa.Table:
    there, vectors = columns.vectors(table["embedding"])
    labels = np.full(table.num_rows, -1)
    if len(there):
      count = self.clusters or max(1, len(there) // self.per_cluster)
      labels[there] = cluster(vectors, min(count, len(there)), self.iterations, self.merge)
    human = np.array([each or 0.0 for each in table["human"].to_pylist()])
    spared = (labels < 0) | (human >= self.spare_humans)
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    draw = draws.uniform(self.seed, "concepts", table["clip_id"].to_pylist())
    made = {
      "cluster": labels,
      "cluster_size": np.where(labels < 0, 0, sizes[labels]),
      "in_concepts": resample(labels, spared, draw, self.keep),
    }
    return pa.table({name: pa.array(made[name], kind) for name, kind in self.columns.items()})


def resample(labels: np.ndarray, spared: np.ndarray, draw: np.ndarray, keep: float) -> np.ndarray:
  """bool [n]: which clips of clusters `labels` [n] stay so that a share `keep` of all does.

  Those `spared` (bool [n]) stay whatever the size of their cluster; of the others in a cluster of
  n, those with a draw below min(1, sqrt(t / n)).
  """
  free = ~spared
  sizes = np.bincount(labels[free], minlength=1)
  shares = inverse_root(sizes, max(keep * len(labels) - spared.sum(), 0.0))
  kept = spared.copy()
  kept[free] = draw[free] < shares[labels[free]]
  return kept


def cluster(vectors: np.ndarray, count: int, iterations: int, merge: float) -> np.ndarray:
  """int [n]: merged clusters of unit rows float32 [n, d], numbered by their first member.

  One thread: a sum over threads would depend on how many there are.
  """
  with faiss_threads(0):
    kmeans = faiss.Kmeans(
      vectors.shape[1], count, niter=iterations, spherical=True, seed=1, verbose=False,
      min_points_per_centroid=1, max_points_per_centroid=1024,
    )  # fmt: skip
    kmeans.train(vectors)
    _, nearest = kmeans.index.search(vectors, 1)
  centres = kmeans.centroids
  joined = Groups(range(count))
  for start in range(0, count, _BLOCK):
    cosines = centres[start : start + _BLOCK] @ centres.T
    pairs = np.argwhere(cosines >= merge).tolist()
    for i, j in pairs:
      joined.join(start + i, j)
  heads = np.array([joined.head(i) for i in range(count)])[nearest[:, 0]]
  _, first, labels = np.unique(heads, return_index=True, return_inverse=True)
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
