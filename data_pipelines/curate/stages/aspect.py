"""Aspect ratio: bounds on it, and the mix of landscape and portrait of a set.

The paper wants 60 % landscape in its first sets and 80 % in the last, and only landscape in the
funnel that it prints (Movie Gen 3.2.1, Table 38). A square counts as landscape, as in its w >= h.
"""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.curate import draws, stage
from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Aspect(stage.RowStage):
  """Bounds on width / height."""

  name = "aspect"
  columns = {"aspect": pa.float64()}
  needs = ("width", "height")

  min_aspect: float = stage.threshold(0.25)  # 1 leaves landscape only
  max_aspect: float = stage.threshold(4.0)

  def rules(self) -> tuple[stage.Rule, ...]:
    bounds = {"at_least": self.min_aspect, "at_most": self.max_aspect}
    return (stage.Rule("aspect", "aspect_ratio", "aspect", **bounds),)

  def score(self, row: stage.Row) -> dict[str, Any]:
    if not row["width"] or not row["height"]:
      return {"aspect": None}
    return {"aspect": row["width"] / row["height"]}


@dataclasses.dataclass(frozen=True)
class AspectMix(stage.TableStage):
  """Thins out landscape or portrait, whichever is too many, to the wanted share.

  It goes last of all, for it is the mix of what is kept that counts; so its clips are no part of
  the table's row "aspect ratio".
  """

  name = "aspect_mix"
  columns = {"in_aspect_mix": pa.bool_()}
  needs = ("aspect",)

  landscape: float = 0.6  # share; 0: whatever comes
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.landscape < 1:
      raise ConfigError(
        f"aspect_mix.landscape is {self.landscape}: give a share below 1, or 0 for any mix"
        " (aspect.min_aspect=1 keeps landscape only)."
      )

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("in_aspect_mix", "aspect_mix", at_least=1),)

  def score(self, table: pa.Table) -> pa.Table:
    kept = np.ones(table.num_rows, bool)
    if self.landscape:
      aspect = table["aspect"].to_numpy(zero_copy_only=False).astype(float)
      draw = draws.uniform(self.seed, "aspect", table["clip_id"].to_pylist())
      kept = draws.to_share(draw, kept, aspect >= 1, self.landscape)
    return pa.table({"in_aspect_mix": kept})
