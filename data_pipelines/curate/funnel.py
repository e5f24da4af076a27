"""What a decision did, as numbers: the rows of Table 38, histograms, buckets, errors, costs.

Everything here is a function of the table that `select` decided and plain values, and becomes JSON
as it is. Not here: pictures and HTML (`report`).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.curate import select
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stage import ROWS, Rule, Stage

_BINS = 40


def rows(recipe: Recipe, table: pa.Table) -> list[dict[str, Any]]:
  """The funnel, in the order of Table 38, after a row for all files and one for the readable ones.

  Each row: "key", "label", "threshold" in words, "reasons", "removed", "left" (items: clips, and
  sources without a clip), "of_pool" and "of_previous" (shares), "of_paper" (share of what the
  duration row leaves, which the paper calls 100 %), "hours" left.
  """
  first = table["first_fail"].to_pylist()
  error = np.array([code is not None for code in table["error_code"].to_pylist()], bool)
  hours = _seconds(table) / 3600
  groups = _groups(recipe)
  place = {reason: i for i, group in enumerate(groups) for reason in group["reasons"]}
  fell = np.array(
    [0 if e else place.get(reason, len(groups)) for reason, e in zip(first, error, strict=True)],
    int,
  )
  found: list[dict[str, Any]] = []
  for number, group in enumerate(groups):
    left = int((fell > number).sum())
    before = found[-1]["left"] if found else len(first)
    found.append(
      group
      | {
        "removed": before - left,
        "left": left,
        "of_pool": left / len(first) if first else 0.0,
        "of_previous": left / before if before else 0.0,
        "hours": float(hours[fell > number].sum()),
      }
    )
  base = next(row["left"] for row in found if row["key"] == "duration")
  for row in found:
    row["of_paper"] = row["left"] / base if base else 0.0
  pool = {"key": "pool", "label": "all", "threshold": "", "reasons": [], "removed": 0}
  pool |= {"left": len(first), "of_pool": 1.0, "of_previous": 1.0, "hours": float(hours.sum())}
  return [pool | {"of_paper": len(first) / base if base else 0.0}, *found]


def _groups(recipe: Recipe) -> list[dict[str, Any]]:
  """The rows with their rules: one for each of Table 38, one for each other reason."""
  groups = [_group("readable", "readable", [], [])]
  found: dict[str, list[Rule]] = {key: [] for key in ROWS}
  for _, rule in select.ordered_rules(recipe):
    key = rule.row or f"other: {rule.reason}"
    if key not in found:
      found[key] = []
    found[key].append(rule)
  late = {rule.reason for stage, rule in recipe.rules() if recipe.phase_of(stage) > 0}
  keys = list(ROWS)
  early = [k for k in found if k not in ROWS and found[k][0].reason not in late]
  others = [k for k in found if k not in ROWS and k not in early]
  cut = keys.index("duplicates")
  for key in [*keys[:cut], *early, *keys[cut:], *others]:
    rules = found[key]
    reasons = list(dict.fromkeys(rule.reason for rule in rules))
    if key == "scene":
      reasons.append(select.NO_CLIP)
    words = list(dict.fromkeys(select.thresholds_of(rule) for rule in rules))
    label = ROWS.get(key, rules[0].reason.replace("_", " ") if rules else key)
    groups.append(_group(key, label, words, reasons))
  groups.append(_group("scored", "scored", [], [select.NOT_SCORED]))
  return groups


def _group(key: str, label: str, words: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
  return {
    "key": key,
    "label": label,
    "threshold": "; ".join(words),
    "reasons": list(reasons),
  }


def _seconds(table: pa.Table) -> np.ndarray:
  """Of each item: of the clip, or of a source without one."""

  def column(name: str) -> np.ndarray:
    if name not in table.column_names:
      return np.full(table.num_rows, np.nan)
    return np.array(table[name].cast(pa.float64()).to_pylist(), float)

  clip = column("end") - column("start")
  return np.nan_to_num(np.where(np.isnan(clip), column("duration"), clip))


def histogram(stage: Stage, rule: Rule, table: pa.Table) -> dict[str, Any] | None:
  """How a score is spread, kept and rejected by any rule; None if there are no scores.

  Extreme scores are counted in the first and the last bin.
  """
  column = table[rule.column]
  if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
    return None
  values = np.array(column.cast(pa.float64()).to_pylist(), float)
  keep = np.array(table["keep"].to_pylist(), bool)[~np.isnan(values)]
  values = values[~np.isnan(values)]
  if not len(values):
    return None
  bounds = [b for b in (rule.at_least, rule.at_most) if b is not None]
  low = min(float(np.quantile(values, 0.01)), *bounds)
  high = max(float(np.quantile(values, 0.99)), *bounds)
  if low == high:
    low, high = low - 0.5, high + 0.5
  edges = np.linspace(low, high, _BINS + 1)
  inside = np.clip(values, low, high)
  return {
    "stage": stage.name,
    "column": rule.column,
    "reason": rule.reason,
    "threshold": select.thresholds_of(rule),
    "bounds": bounds,
    "edges": edges.tolist(),
    "kept": np.histogram(inside[keep], edges)[0].tolist(),
    "rejected": np.histogram(inside[~keep], edges)[0].tolist(),
    "scored": len(values),
  }


def summary(name: str, recipe: Recipe, table: pa.Table, costs: Mapping[str, Any]) -> dict[str, Any]:
  """All of the report but its pictures."""
  kept = table.filter(table["keep"])
  seconds = float(_seconds(kept).sum())
  found: dict[str, Any] = {
    "schema_version": 1,
    "config": name,
    "sources": len(set(zip(*(table[k].to_pylist() for k in ("source_id", "copy")), strict=True))),
    "items": table.num_rows,
    "kept": kept.num_rows,
    "kept_hours": seconds / 3600,
    "funnel": rows(recipe, table),
    "reasons": dict(select.counts(table["first_fail"])),
    "all_reasons": _all_reasons(table),
    "errors": dict(select.counts(table["error_code"])),
    "histograms": _histograms(recipe, table),
    "buckets": _buckets(kept),
    "shares": _shares(kept),
    "costs": dict(costs),
    "recipe": recipe.plain(),
  }
  return found


def _histograms(recipe: Recipe, table: pa.Table) -> list[dict[str, Any]]:
  made, seen = [], set()
  for stage, rule in select.ordered_rules(recipe):
    key = (rule.column, rule.at_least, rule.at_most)
    found = None if key in seen else histogram(stage, rule, table)
    seen.add(key)
    if found is not None:
      made.append(found)
  return made


def _all_reasons(table: pa.Table) -> dict[str, int]:
  """How many items fail each rule, whichever others they fail too."""
  flat = [reason for reasons in table["fails"].to_pylist() for reason in reasons or ()]
  return dict(select.counts(pa.chunked_array([flat], pa.string())))


def _buckets(kept: pa.Table) -> list[dict[str, Any]]:
  """Clips and hours of each bucket of the kept."""
  if "bucket" not in kept.column_names:
    return []
  seconds = _seconds(kept)
  names = kept["bucket"].to_pylist()
  made = []
  for name in sorted({name for name in names if name}):
    mask = np.array([each == name for each in names], bool)
    count = int(mask.sum())
    hours = float(seconds[mask].sum()) / 3600
    made.append({"bucket": name, "clips": count, "share": count / len(names), "hours": hours})
  return made


def _shares(kept: pa.Table) -> dict[str, float]:
  """Landscape and human shares, and camera moves, of the kept clips."""
  shares: dict[str, float] = {}
  if not kept.num_rows:
    return shares
  names = set(kept.column_names)
  if {"width", "height"} <= names:
    pairs = zip(kept["width"].to_pylist(), kept["height"].to_pylist(), strict=True)
    shares["landscape"] = sum(w >= h for w, h in pairs if w) / kept.num_rows
  if "human" in names:
    shares["with people"] = sum((h or 0) >= 0.5 for h in kept["human"].to_pylist()) / kept.num_rows
  if "camera" in names:
    for move, count in select.counts(kept["camera"]).items():
      if move:
        shares[f"camera: {move}"] = count / kept.num_rows
  return shares


def text(found: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] = ()) -> str:
  """The funnel as lines for a terminal; beside it, with `other`, what would be left instead."""
  lines = [f"{'':24}{'left':>9}{'of pool':>9}{'hours':>9}" + (f"{'what if':>9}" if other else "")]
  instead = {row["key"]: row["left"] for row in other}
  for row in found:
    line = f"{row['label']:24}{row['left']:>9,}{row['of_pool']:>9.2%}{row['hours']:>9.2f}"
    if other:
      line += f"{instead[row['key']]:>9,}"
    lines.append(f"{line}  {row['threshold']}".rstrip())
  return "\n".join(lines)


def steep(recipe: Recipe, found: Sequence[Mapping[str, Any]]) -> list[str]:
  """A sentence for each step that takes more than half of what the ones before it left, which is
  hardly ever meant: a mix of which a folder holds little, a bound made for other videos."""
  by_reason = {rule.reason: stage.name for stage, rule in recipe.rules()}
  sentences = []
  for before, row in itertools.pairwise(found):
    stages = dict.fromkeys(by_reason[r] for r in row["reasons"] if r in by_reason)
    if stages and row["left"] < before["left"] / 2:
      flags = ", ".join(f"--config.{name}" for name in stages)
      sentences.append(
        f'"{row["label"]}" leaves {row["left"]} of {before["left"]}; its settings are those of'
        f" {flags}"
      )
  return sentences
