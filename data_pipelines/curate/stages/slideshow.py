"""Slideshows: still pictures one after another, which pass every average of motion.

Judged on the whole source, because cuts between the pictures would hide it from its clips. In steps
of a fifth of a second, a step is still (nothing moves), a change (much of the picture becomes
another, at once or in a dissolve), or neither. A slideshow is still but for its changes. Pictures
that are panned or zoomed ("Ken Burns") are not found.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipelines.curate.stage import Frame, FrameStage, Row, Rule, threshold
from data_pipelines.curate.stages.static import Steps


@dataclasses.dataclass(frozen=True)
class Slideshow(FrameStage):
  """Settings of the steps.

  Attributes:
    step: seconds.
    still: grey levels; in a still step no cell of the small picture changes by as much.
    change: grey levels by which the whole picture changes on average in a change.
    min_changes: a source with fewer is no slideshow.
    max_still: share of still steps of a source with changes, from which on it is dropped.
  """

  name: ClassVar[str] = "slideshow"
  level: ClassVar[str] = "source"
  columns: ClassVar[dict[str, pa.DataType]] = {
    "slideshow": pa.float64(),  # share of still steps where there are changes, else 0
    "slide_changes": pa.int32(),
  }

  step: float = 0.2
  still: float = 5.0
  change: float = 6.0
  min_changes: int = 2
  max_still: float = threshold(0.75)

  def rules(self) -> tuple[Rule, ...]:
    return (Rule("slideshow", "slideshow", "motion", at_most=self.max_still),)

  def observer(self, row: Row) -> "_Observer":
    return _Observer(self)


class _Observer:
  def __init__(self, stage: Slideshow):
    self._stage = stage
    self._steps = Steps(stage.step)
    self._kinds: list[int] = []  # 0 still, 1 neither, 2 change

  def frame(self, frame: Frame) -> None:
    change = self._steps.change(frame)
    if change is not None:
      still = change.max() < self._stage.still
      self._kinds.append(0 if still else 1 + (change.mean() >= self._stage.change))

  def scores(self) -> dict[str, Any]:
    if not self._kinds:
      return {"slideshow": None, "slide_changes": None}
    kinds = np.array(self._kinds)
    # Steps of change in a row, as in a dissolve, are one.
    changes = int(np.sum((kinds == 2) & (np.append(0, kinds[:-1]) != 2)))
    others = kinds[kinds != 2]
    still = float(np.mean(others == 0)) if len(others) else 0.0
    enough = changes >= self._stage.min_changes
    return {"slideshow": still if enough else 0.0, "slide_changes": changes}
