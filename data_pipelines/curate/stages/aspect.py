"""Aspect ratio: bounds on it, and the mix of landscape and portrait of a set.

The paper wants 60 % landscape in its first sets and 80 % in the last, and only landscape in the
funnel that it prints (Movie Gen 3.2.1, Table 38).
"""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.curate import draws, stage
from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Aspect(stage.RowStage):
  """A square counts as landscape, as in the paper's w >= h."""

  name = "aspect"
  columns = {"aspect": pa.float64()}
  needs = ("width", "height")
  choice = ("aspect_mix", "aspect")

  min_aspect: float = stage.threshold(0.0)  # width / height; 1 leaves landscape only
  max_aspect: float = stage.threshold(4.0)
  landscape: float = stage.threshold(0.0)  # share of what is kept; 0: whatever comes
  seed: int = stage.threshold(0)

  def __post_init__(self):
    if not 0 <= self.landscape < 1:
      raise ConfigError(
        f"aspect.landscape is {self.landscape}: give a share below 1, or 0 for any mix"
        " (min_aspect=1 keeps landscape only)."
      )

  def rules(self) -> tuple[stage.Rule, ...]:
    bounds = {"at_least": self.min_aspect, "at_most": self.max_aspect}
    return (stage.Rule("aspect", "aspect_ratio", "aspect", **bounds),)

  def score(self, row: stage.Row) -> dict[str, Any]:
    if not row["width"] or not row["height"]:
      return {"aspect": None}
    return {"aspect": row["width"] / row["height"]}

  def choose(self, table: pa.Table, kept: np.ndarray) -> np.ndarray:
    """bool [n], a subset of `kept` with the wanted mix."""
    if not self.landscape:
      return kept
    aspect = table["aspect"].to_numpy(zero_copy_only=False).astype(float)
    draw = draws.uniform(self.seed, "aspect", table["clip_id"].to_pylist())
    return draws.to_share(draw, kept, aspect >= 1, self.landscape)
