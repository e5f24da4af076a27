"""What a curated planted corpus got right: each filter, the duplicates, the cuts, the cameras.

    python -m data_pipelines.curate.scorecard --planted DIR --output DIR

reads the truth of `planted` and the decisions of a run. Not here: planting, curating.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.curate import planted, store
from mgen_jax.errors import UserError

Row = Mapping[str, Any]

# By kind of file: the reasons of which at least one must be among those that it fails; "error" is
# any fault of the file. A kind that is not here must pass all filters but that for duplicates.
EXPECTED: Mapping[str, tuple[str, ...]] = {
  "static": ("static",),
  "slideshow": ("slideshow",),
  "many_cuts": ("too_many_shots",),
  "letterbox": ("border",),
  "letterboxed": ("border",),
  "text_overlay": ("text",),
  "jitter": ("shaking",),
  "dull": ("aesthetics",),
  "too_small": ("too_small",),
  "too_short": ("duration",),
  "too_long": ("duration",),
  "panorama": ("aspect_ratio",),
  "corrupt": ("error",),
}
# Reasons that are no fault of a clip but a choice among good ones.
CHOICES = frozenset({"duplicate", "resampled", "aspect_mix", "human_share"})


@dataclasses.dataclass(frozen=True)
class Share:
  """How many of how many, and the files that are not among them."""

  right: int
  of: int
  wrong: tuple[str, ...] = ()

  @property
  def value(self) -> float:
    """1 for none of none."""
    return self.right / self.of if self.of else 1.0

  def __str__(self) -> str:
    return f"{self.right} of {self.of} ({100 * self.value:.1f} %)"


@dataclasses.dataclass(frozen=True)
class Scorecard:
  """The measures.

  Attributes:
    filters: by kind of defect, the files rejected for the right reason.
    false_rejections: by reason, the clean files that fail it; "any" for one or more of them.
    recall, precision: of pairs of copies, among the files that pass everything else.
    one_kept: groups of copies of which exactly one is kept.
    hard_copies: by kind (cropped, mirrored): the files found to be copies of their original.
    cuts: files whose cuts are all found within a frame, and no others.
    cameras: files whose camera's class is right.
  """

  filters: Mapping[str, Share]
  false_rejections: Mapping[str, Share]
  recall: Share
  precision: Share
  one_kept: Share
  hard_copies: Mapping[str, Share]
  cuts: Share
  cameras: Share

  def plain(self) -> dict[str, Any]:
    """As JSON keeps it."""
    return dataclasses.asdict(self)

  def text(self) -> str:
    """A line for each measure, and what was wrong."""
    rows = [(f"found: {kind}", share) for kind, share in self.filters.items()]
    rows += [(f"clean, yet {why}", share) for why, share in self.false_rejections.items()]
    rows += [("pairs of copies found", self.recall), ("found pairs right", self.precision)]
    rows += [("groups of copies with one kept", self.one_kept)]
    rows += [(f"{kind} copies found", share) for kind, share in self.hard_copies.items()]
    rows += [("cuts within a frame", self.cuts), ("camera's class", self.cameras)]
    lines = []
    for name, share in rows:
      wrong = f"   not: {', '.join(share.wrong[:6])}" if share.wrong else ""
      lines.append(f"{name:32} {share!s:>22}{wrong}")
    return "\n".join(lines)


def measure(truth: Sequence[Row], items: Iterable[Row]) -> Scorecard:
  """Compares.

  Args:
    truth: of `planted.read_truth`.
    items: rows of a run's decisions, at least path, clip_id, error_code, fails, keep, cuts,
      camera and copy_group.
  """
  by_file: dict[str, list[Row]] = collections.defaultdict(list)
  for item in items:
    by_file[item["path"]].append(item)
  recall, precision, one_kept, hard = _copies(truth, by_file)
  return Scorecard(
    filters=_filters(truth, by_file),
    false_rejections=_false_rejections(truth, by_file),
    recall=recall,
    precision=precision,
    one_kept=one_kept,
    hard_copies=hard,
    cuts=_cuts(truth, by_file),
    cameras=_cameras(truth, by_file),
  )


def _reasons(items: Sequence[Row]) -> set[str]:
  """All that speaks against a file; its clips are one where it has one."""
  found = {reason for item in items for reason in item["fails"] or ()}
  if any(item["error_code"] for item in items):
    found.add("error")
  return found


def _share(outcomes: Mapping[str, bool]) -> Share:
  wrong = tuple(sorted(name for name, right in outcomes.items() if not right))
  return Share(len(outcomes) - len(wrong), len(outcomes), wrong)


def _filters(truth, by_file) -> dict[str, Share]:
  found: dict[str, dict[str, bool]] = collections.defaultdict(dict)
  for each in truth:
    if each["kind"] in EXPECTED:
      items = by_file[each["file"]]
      kept = any(item["keep"] for item in items)
      right = not kept and bool(_reasons(items) & set(EXPECTED[each["kind"]]))
      found[each["kind"]][each["file"]] = right
  return {kind: _share(outcomes) for kind, outcomes in found.items()}


def _false_rejections(truth, by_file) -> dict[str, Share]:
  """Shares of the clean files that pass; by reason too, where there is a false one."""
  clean = [each["file"] for each in truth if each["kind"] == "clean"]
  faults = {file: _reasons(by_file[file]) - CHOICES for file in clean}
  for file in clean:
    if not any(item["clip_id"] for item in by_file[file]) and not faults[file]:
      faults[file] = {"no_clip"}
  reasons = sorted(set().union(*faults.values()))
  shares = {"any": _share({file: not found for file, found in faults.items()})}
  return shares | {
    why: _share({file: why not in found for file, found in faults.items()}) for why in reasons
  }


def _copies(truth, by_file):
  """Over pairs of files that came as far as the search for copies."""
  origin = {each["file"]: each["of"] or each["file"] for each in truth}
  kind = {each["file"]: each["kind"] for each in truth}
  group = {}
  for file in origin:
    reached = [item["copy_group"] for item in by_file[file] if item["copy_group"]]
    if reached:
      group[file] = reached[0]
  files = [file for file in sorted(group) if kind[file] not in planted.HARD_COPIES]
  recall, precision = {}, {}
  for a, b in itertools.combinations(files, 2):
    same, found = origin[a] == origin[b], group[a] == group[b]
    if same:
      recall[f"{a}+{b}"] = found
    if found:
      precision[f"{a}+{b}"] = same
  members = collections.defaultdict(list)
  for file in files:
    members[origin[file]].append(file)
  one_kept = {
    first: sum(any(item["keep"] for item in by_file[file]) for file in each) == 1
    for first, each in members.items()
    if len(each) > 1
  }
  hard: dict[str, dict[str, bool]] = collections.defaultdict(dict)
  for file in group:
    if kind[file] in planted.HARD_COPIES and origin[file] in group:
      hard[kind[file]][file] = group[file] == group[origin[file]]
  found = {name: _share(outcomes) for name, outcomes in hard.items()}
  return _share(recall), _share(precision), _share(one_kept), found


def _cuts(truth, by_file) -> Share:
  outcomes = {}
  for each in truth:
    if each["kind"] in ("clean", "hard_cut", "many_cuts") and by_file[each["file"]]:
      found = by_file[each["file"]][0]["cuts"]
      wanted, slack = each["cuts"], 1.01 / each["fps"]
      outcomes[each["file"]] = (
        found is not None
        and len(found) == len(wanted)
        and all(abs(a - b) <= slack for a, b in zip(found, wanted, strict=True))
      )
  return _share(outcomes)


def _cameras(truth, by_file) -> Share:
  outcomes = {}
  for each in truth:
    clips = [item for item in by_file[each["file"]] if item["clip_id"]]
    if each["kind"] == "clean" and clips:
      outcomes[each["file"]] = clips[0]["camera"] == each["camera"]
  return _share(outcomes)


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.curate.scorecard", description=__doc__.split("\n\n")[0]
  )
  parser.add_argument("--planted", required=True, metavar="DIR", help="the planted corpus")
  parser.add_argument("--output", required=True, metavar="DIR", help="the results of its curation")
  parser.add_argument("--json", action="store_true", help="write JSON, with all files")
  options = parser.parse_args(arguments)
  try:
    card = measure(planted.read_truth(options.planted), read_items(options.output))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(json.dumps(card.plain(), indent=2) if options.json else card.text())
  return 0


def read_items(output: str) -> list[dict[str, Any]]:
  """The decisions of the run in a folder. Raises UserError if there are none."""
  path = Path(output) / "selection.parquet"
  if not path.is_file():
    raise UserError(f"{path} does not exist; run curation first.")
  return store.read_table(path).to_pylist()


if __name__ == "__main__":
  sys.exit(main())
