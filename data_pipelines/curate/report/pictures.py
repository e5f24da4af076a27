"""Thumbnails of clips: at a threshold, on both sides of it, and of duplicates beside each other.

Frames come from the sources, through the same guarded decoder as the scores; a file that has gone
since is passed over.
"""

import base64
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipelines.curate import decode, select
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stage import Rule

_WIDTH = 176  # pixels
_AT_THRESHOLD = 4  # thumbnails on either side
_PAIRS = 6


@dataclasses.dataclass(frozen=True)
class Thumbnail:
  """One picture with what to say below it."""

  uri: str
  title: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class AtThreshold:
  """Clips on both sides of a threshold, nearest first."""

  reason: str
  threshold: str
  kept: Sequence[Thumbnail]
  rejected: Sequence[Thumbnail]


def middle_frame(path: str, start: float, end: float, limits: decode.Limits) -> bytes | None:
  """The middle frame of a span as JPEG bytes; to be called in a `decode.Guard`."""
  middle, best = (start + end) / 2, None
  for time, _, forms in decode.decode_frames(path, limits, max(start, middle - 0.25), end):
    best = forms("rgb", _WIDTH)
    if time >= middle:
      break
  if best is None:
    return None
  buffer = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(best)).save(buffer, "JPEG", quality=80)
  return buffer.getvalue()


class Pictures:
  """Makes thumbnails, each clip's once."""

  def __init__(self, input_root: str, table: pa.Table, limits: decode.Limits):
    self._root = input_root
    self._limits = limits
    self._guard = decode.Guard(limits)
    self._made: dict[str, str | None] = {}
    names = ("clip_id", "path", "start", "end", "duration")
    columns = {name: table[name].to_pylist() for name in names if name in table.column_names}
    self._clips = {
      values["clip_id"] or values["path"]: values
      for values in (
        dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)
      )
    }

  def __enter__(self) -> "Pictures":
    return self

  def __exit__(self, *exception) -> None:
    self._guard.close()

  def of(self, key: str, note: str = "") -> Thumbnail | None:
    """Of a clip by its id, or of a source without clips by its path; None if it cannot be read."""
    clip = self._clips[key]
    if key not in self._made:
      self._made[key] = self._make(clip)
    uri = self._made[key]
    return None if uri is None else Thumbnail(uri, clip["path"], note)

  def _make(self, clip: Mapping[str, Any]) -> str | None:
    start, end = clip.get("start"), clip.get("end")
    if start is None:
      start, end = 0.0, clip.get("duration") or 0.0
    path = os.path.join(self._root, clip["path"])
    try:
      data = self._guard.call(middle_frame, path, start, end, self._limits)
    except decode.DecodeError:
      return None
    return data and "data:image/jpeg;base64," + base64.b64encode(data).decode()


def at_thresholds(recipe: Recipe, table: pa.Table, pictures: Pictures) -> list[AtThreshold]:
  """For each rule: what is just good enough, and what just is not and fails nothing else."""
  found, seen = [], set()
  fails = table["fails"].to_pylist()
  keep = table["keep"].to_pylist()
  keys = [
    c or p for c, p in zip(table["clip_id"].to_pylist(), table["path"].to_pylist(), strict=True)
  ]
  for _, rule in select.ordered_rules(recipe):
    if (rule.column, rule.at_least, rule.at_most) in seen:
      continue
    seen.add((rule.column, rule.at_least, rule.at_most))
    values = table[rule.column].to_pylist()
    kept, rejected = [], []
    for key, value, kept_it, reasons in zip(keys, values, keep, fails, strict=True):
      if value is None:
        continue
      if kept_it:
        kept.append((_distance(rule, value), key, value))
      elif rule.reason in reasons:
        rejected.append((len(reasons), _distance(rule, value), key, value))
    good = [(key, value) for _, key, value in sorted(kept)]
    bad = [(key, value) for _, _, key, value in sorted(rejected)]
    if bad:
      found.append(
        AtThreshold(
          rule.reason,
          select.thresholds_of(rule),
          _some(pictures, rule, good),
          _some(pictures, rule, bad),
        )
      )
  return found


def _distance(rule: Rule, value: float) -> float:
  bounds = [bound for bound in (rule.at_least, rule.at_most) if bound is not None]
  return min(abs(value - bound) for bound in bounds)


def _some(pictures: Pictures, rule: Rule, clips: Sequence[tuple[str, Any]]) -> list[Thumbnail]:
  made = []
  for key, value in clips[: 3 * _AT_THRESHOLD]:
    thumbnail = pictures.of(key, f"{rule.column} {float(value):.3g}")
    if thumbnail is not None:
      made.append(thumbnail)
    if len(made) == _AT_THRESHOLD:
      break
  return made


def duplicates(table: pa.Table, pictures: Pictures) -> list[tuple[Thumbnail, Thumbnail]]:
  """(kept, its copy) pairs, the least alike first: those are the ones to doubt."""
  if not {"copy_of", "copy_similarity"} <= set(table.column_names):
    return []
  names = ("clip_id", "copy_of", "copy_similarity", "fails")
  rows = zip(*(table[name].to_pylist() for name in names), strict=True)
  pairs = sorted((s, c, o) for c, o, s, fails in rows if c and o and "duplicate" in (fails or ()))
  made = []
  for similarity, copy, original in pairs[: 3 * _PAIRS]:
    left, right = pictures.of(original), pictures.of(copy, f"similarity {similarity:.3f}")
    if left and right:
      made.append((left, right))
    if len(made) == _PAIRS:
      break
  return made
