"""Resolution: both sides of the picture are large enough (Movie Gen 3.2.1, Table 38)."""

import dataclasses
from typing import Any

import pyarrow as pa

from data_pipelines.curate import stage


@dataclasses.dataclass(frozen=True)
class Resolution(stage.RowStage):
  """The paper: 720 px for the first set, 768 px for the later ones."""

  name = "resolution"
  columns = {"short_side": pa.int32()}
  needs = ("width", "height")

  min_side: int = stage.threshold(720)  # of the picture as shown, in pixels

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("short_side", "too_small", "resolution", at_least=self.min_side),)

  def score(self, row: stage.Row) -> dict[str, Any]:
    if row["width"] is None or row["height"] is None:
      return {"short_side": None}
    return {"short_side": min(row["width"], row["height"])}
