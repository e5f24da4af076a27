"""The stages of a run in order: which see sources, clips or everything, and each one's version.

A version covers whatever can change a score: settings, code, scorer, the libraries that decode, and
the versions of the stages it reads from. Thresholds are in none. Not here: the settings themselves
(`config`), doing the work (`work`).
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from data_pipelines.curate.stage import (
  ROWS,
  FrameStage,
  Rule,
  SourceStage,
  SplitStage,
  Stage,
  TableStage,
)
from mgen_jax.errors import ConfigError
from mgen_jax.schema import suggest

Level = Literal["source", "clip", "table"]

SOURCE_KEYS = {"source_id": pa.string(), "copy": pa.int32()}
SOURCE_COLUMNS = SOURCE_KEYS | {"path": pa.string(), "bytes": pa.int64()}
CLIP_KEYS = SOURCE_KEYS | {"clip_id": pa.string()}
_DECODERS = ("av", "numpy", "opencv-python-headless")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is computed and what decides.

  Attributes:
    stages: in the order they run; a stage may read columns of those before it.
    seed: of every choice by hash.
    partitions: into how many parts the sources are dealt by their hash.
    gated: clip stages that are dear: computed only for clips that pass every rule before them.
    gate_sources: do not decode a source that a rule about its header rejects.
  """

  stages: tuple[Stage, ...]
  seed: int = 0
  partitions: int = 64
  gated: tuple[str, ...] = ()
  gate_sources: bool = True

  def __post_init__(self):
    names = [stage.name for stage in self.stages]
    for name in self.gated:
      if name not in names:
        raise ConfigError(f"gated names the stage {name!r}, which is none: {suggest(name, names)}")
      if self.levels[name] == "source":
        raise ConfigError(f"gated names {name!r}, which scores sources; only clip stages can be.")
    if self.partitions < 1:
      raise ConfigError(f"partitions is {self.partitions}; it must be 1 or more.")
    if sum(isinstance(stage, SplitStage) for stage in self.stages) != 1:
      raise ConfigError(f"exactly one stage splits sources into clips; these are: {names}.")
    self._check_columns()

  def _check_columns(self) -> None:
    owner = dict.fromkeys(SOURCE_COLUMNS | CLIP_KEYS, "the list of sources")
    for stage in self.stages:
      for need in stage.needs:
        if need not in owner:
          raise ConfigError(
            f"the stage {stage.name} reads {need!r}, which no stage before it writes;"
            " is one left out?"
          )
      for column in stage.columns:
        if column in owner:
          raise ConfigError(f"{stage.name} and {owner[column]} both write the column {column!r}.")
        owner[column] = stage.name
      for rule in stage.rules():
        if rule.column not in owner:
          raise ConfigError(f"a rule of {stage.name} is about {rule.column!r}, which is no column.")
        if rule.row and rule.row not in ROWS:
          raise ConfigError(f"a rule of {stage.name} names the row {rule.row!r} of no table.")

  @functools.cached_property
  def split(self) -> SplitStage:
    return next(stage for stage in self.stages if isinstance(stage, SplitStage))

  @functools.cached_property
  def levels(self) -> Mapping[str, Level]:
    """Of each stage by name. A stage of rows is of sources if they are all that it reads."""
    levels: dict[str, Level] = {}
    of_sources = set(SOURCE_COLUMNS)
    for stage in self.stages:
      if isinstance(stage, TableStage):
        level = "table"
      elif isinstance(stage, FrameStage):
        level = stage.level
      elif isinstance(stage, SourceStage):
        level = "source"
      elif isinstance(stage, SplitStage):
        level = "clip"
      else:
        level = "source" if stage.needs and set(stage.needs) <= of_sources else "clip"
      levels[stage.name] = level
      if level == "source":
        of_sources |= set(stage.columns)
    return levels

  @functools.cached_property
  def versions(self) -> Mapping[str, str]:
    """Of each stage by name, see `Stage.version`."""
    versions: dict[str, str] = {}
    writer: dict[str, str] = {}
    split = ""
    for stage in self.stages:
      inputs = {writer[need]: versions[writer[need]] for need in stage.needs if need in writer}
      if self.levels[stage.name] != "source" and split:
        inputs[split] = versions[split]
      if isinstance(stage, FrameStage | SourceStage):
        inputs |= _decoders()
      if isinstance(stage, FrameStage) and self.stages[0].name in versions:
        inputs[self.stages[0].name] = versions[self.stages[0].name]
      versions[stage.name] = stage.version(inputs)
      writer |= dict.fromkeys(stage.columns, stage.name)
      if isinstance(stage, SplitStage):
        split = stage.name
    return versions

  @functools.cached_property
  def dear(self) -> tuple[str, ...]:
    """The gated stages, and those that read from them: they have nothing to read without."""
    dear: list[str] = []
    columns: set[str] = set()
    for stage in self.stages:
      if stage.name in self.gated or columns & set(stage.needs):
        dear.append(stage.name)
        columns |= set(stage.columns)
    return tuple(dear)

  @functools.cached_property
  def from_beside(self) -> tuple[str, ...]:
    """Stages that read what stages read from files beside the videos: their old rows are only good
    for the same values."""
    columns = {column for stage in self.stages if stage.beside for column in stage.columns}
    found: list[str] = []
    for stage in self.stages:
      if columns & set(stage.needs):
        found.append(stage.name)
        columns |= set(stage.columns)
    return tuple(found)

  @functools.cached_property
  def phases(self) -> tuple[tuple[Stage, ...], ...]:
    """Runs of stages of one kind: by partition (sources and clips), or over the whole table."""
    phases: list[list[Stage]] = []
    for stage in self.stages:
      table = self.levels[stage.name] == "table"
      if phases and (self.levels[phases[-1][0].name] == "table") == table and not table:
        phases[-1].append(stage)
      else:
        phases.append([stage])
    return tuple(map(tuple, phases))

  def phase_of(self, stage: Stage) -> int:
    return next(n for n, stages in enumerate(self.phases) if stage in stages)

  def rules(self, before: str | None = None) -> tuple[tuple[Stage, Rule], ...]:
    """(stage, rule) of all stages, or of those that run before the stage named `before`."""
    found = []
    for stage in self.stages:
      if stage.name == before:
        break
      found += [(stage, rule) for rule in stage.rules()]
    return tuple(found)

  def column_types(self, level: Level | None = None) -> dict[str, pa.DataType]:
    """The columns of the stages (of a level) with their types."""
    return {
      column: kind
      for stage in self.stages
      if level in (None, self.levels[stage.name])
      for column, kind in stage.columns.items()
    }

  def plain(self) -> dict[str, Any]:
    """What is written beside the results: all settings and thresholds, scorers and versions."""
    return {
      "seed": self.seed,
      "partitions": self.partitions,
      "gated": list(self.gated),
      "stages": {
        stage.name: {
          "version": self.versions[stage.name],
          "scorer": stage.scorer(),
          "settings": stage.settings(),
          "thresholds": thresholds(stage),
        }
        for stage in self.stages
      },
    }


def thresholds(stage: Stage) -> dict[str, Any]:
  """The fields of a stage that only decide."""
  fields = dataclasses.fields(stage)
  return {f.name: getattr(stage, f.name) for f in fields if f.metadata.get("threshold")}


def passes(rule: Rule, value: Any) -> bool | None:
  """Whether a score meets a rule; None if it was not computed."""
  if value is None or value != value:
    return None
  low = rule.at_least is None or (value > rule.at_least if rule.strict else value >= rule.at_least)
  high = rule.at_most is None or (value < rule.at_most if rule.strict else value <= rule.at_most)
  return low and high


@functools.cache
def _decoders() -> dict[str, str]:
  found = {}
  for name in _DECODERS:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "none"
  return found
