"""Small stages and small videos for the tests of running: what a run does, not what stages see."""

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipelines.curate.decode import Limits
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stage import (
  FrameStage,
  RowStage,
  Rule,
  SourceStage,
  SplitStage,
  TableStage,
  threshold,
)
from mgen_jax.data import media

LIMITS = Limits(memory=2 << 30, patience=30.0)


@dataclasses.dataclass(frozen=True)
class Header(SourceStage):
  """Reads the header with the library's own prober."""

  name: ClassVar[str] = "header"
  columns: ClassVar[dict] = {
    "width": pa.int32(),
    "height": pa.int32(),
    "duration": pa.float64(),
    "fps": pa.float64(),
  }
  min_side: int = threshold(32)

  def rules(self):
    return (
      Rule("width", "too_small", "resolution", at_least=self.min_side),
      Rule("height", "too_small", "resolution", at_least=self.min_side),
    )

  def score(self, path: str) -> dict[str, Any]:
    try:
      info = media.probe(path)
    except media.MediaError as error:
      return {"error_code": "probe_failed", "error": str(error)}
    return {name: getattr(info, name) for name in self.columns}


@dataclasses.dataclass(frozen=True)
class Halves(SplitStage):
  """Two clips: the first and the second half."""

  name: ClassVar[str] = "halves"
  columns: ClassVar[dict] = {
    "start": pa.float64(),
    "end": pa.float64(),
    "start_pts": pa.int64(),
    "end_pts": pa.int64(),
  }
  needs: ClassVar[tuple] = ("duration",)

  def clips(self, source) -> list[dict[str, Any]]:
    middle, end = source["duration"] / 2, source["duration"]
    spans = [(0.0, middle), (middle, end)]
    return [
      {"start": a, "end": b, "start_pts": round(a * 1000), "end_pts": round(b * 1000)}
      for a, b in spans
    ]


@dataclasses.dataclass(frozen=True)
class Light(FrameStage):
  """The mean luma; `pause` makes a run long enough to be killed in."""

  name: ClassVar[str] = "light"
  columns: ClassVar[dict] = {"light": pa.float64(), "frames_seen": pa.int32()}
  gain: float = 1.0
  pause: float = 0.0
  darkest: float = threshold(40.0)

  def rules(self):
    return (Rule("light", "dark", "aesthetics", at_least=self.darkest),)

  def observer(self, row):
    return _Mean(self)


class _Mean:
  def __init__(self, stage: Light):
    self._stage = stage
    self._sums: list[float] = []

  def frame(self, frame) -> None:
    self._sums.append(float(frame.luma.mean()))

  def scores(self) -> dict[str, Any]:
    time.sleep(self._stage.pause)
    return {"light": self._stage.gain * float(np.mean(self._sums)), "frames_seen": len(self._sums)}


@dataclasses.dataclass(frozen=True)
class Dear(FrameStage):
  """A stage that is only worth its cost for clips that are light enough."""

  name: ClassVar[str] = "dear"
  columns: ClassVar[dict] = {"contrast": pa.float64()}

  def rules(self):
    return (Rule("contrast", "flat", "text", at_least=0.0),)

  def observer(self, row):
    return _Contrast()


class _Contrast:
  def __init__(self):
    self._values: list[float] = []

  def frame(self, frame) -> None:
    self._values.append(float(frame.luma.std()))

  def scores(self) -> dict[str, Any]:
    return {"contrast": float(np.mean(self._values))}


@dataclasses.dataclass(frozen=True)
class Twins(TableStage):
  """Clips of about the same light: the first of each kind has rank 0."""

  name: ClassVar[str] = "twins"
  columns: ClassVar[dict] = {"twin": pa.int64(), "twin_rank": pa.int32()}
  needs: ClassVar[tuple] = ("light",)
  step: float = 4.0
  keep: int = threshold(1)

  def rules(self):
    return (Rule("twin_rank", "twin", "duplicates", at_most=self.keep - 1),)

  def score(self, table: pa.Table) -> pa.Table:
    kinds = [round(value / self.step) for value in table["light"].to_pylist()]
    ranks = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return pa.table({"twin": kinds, "twin_rank": ranks})


@dataclasses.dataclass(frozen=True)
class Words(RowStage):
  """A caption out of scores."""

  name: ClassVar[str] = "words"
  columns: ClassVar[dict] = {"caption": pa.string()}
  needs: ClassVar[tuple] = ("light", "twin", "clip_id")

  def score(self, row) -> dict[str, Any]:
    return {"caption": f"light {row['light']:.1f} of kind {row['twin']}"}


@dataclasses.dataclass(frozen=True)
class Note(SourceStage):
  """The text beside the video."""

  name: ClassVar[str] = "note"
  beside: ClassVar[bool] = True
  columns: ClassVar[dict] = {"note": pa.string()}

  def score(self, path: str) -> dict[str, Any]:
    text = Path(path).with_suffix(".txt")
    return {"note": text.read_text() if text.exists() else ""}


@dataclasses.dataclass(frozen=True)
class Shout(RowStage):
  """Reads what a gated stage wrote."""

  name: ClassVar[str] = "shout"
  columns: ClassVar[dict] = {"shout": pa.string()}
  needs: ClassVar[tuple] = ("caption", "note")

  def score(self, row) -> dict[str, Any]:
    return {"shout": row["caption"].upper() + row["note"]}


def recipe(**changes: Any) -> Recipe:
  """The stages above; `light=Light(...)` and so on replace one."""
  stages = {
    "header": Header(),
    "note": Note(),
    "halves": Halves(),
    "light": Light(),
    "dear": Dear(),
  }
  stages |= {"twins": Twins(), "words": Words(), "shout": Shout()}
  fields = {"seed": 0, "partitions": 8, "gated": ("dear", "words")}
  for key in list(changes):
    (stages if key in stages else fields)[key] = changes[key]
  return Recipe(tuple(stages.values()), **fields)


def write_videos(folder: Path, count: int, *, first: int = 0) -> Path:
  """`count` videos of two halves, dark to light; every seventh is no video at all."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(first)
  for number in range(first, first + count):
    path = folder / f"clip{number:03d}.mp4"
    if number % 7 == 6:
      path.write_bytes(rng.bytes(2000))
      continue
    noise = rng.integers(0, 8, (8, 48, 64, 3))
    levels = np.repeat([20 + (number * 37) % 200, 30 + (number * 53) % 200], 4)
    frames = np.clip(noise + levels[:, None, None, None], 0, 255).astype(np.uint8)
    media.write_video(path, frames, 8.0)
  return folder
