"""Makes the checked-in plans of the 30B again: `make plans`, or a few with

  python plans/regenerate.py --only=v5p --only=h100_t2v_768_cp2

Each plan is a run of `python -m mgen_jax.plan` for hardware that is not here. Needs both compilers,
libtpu and CUDA's (pip install -e .[tpu,cuda], 6 GB; no TPU and no GPU). Writes NAME.json and
NAME.txt beside this file, and README.md, the index of all that are there. Figures are rounded and
compile times are the only ones that depend on the machine, so that a diff shows what changed.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXPERIMENT = "experiments/t2v_30b.py"
DIGITS = 5  # of the figures that are kept
DEVICE_SECONDS = ("lower_seconds", "compile_seconds")  # of this machine


@dataclasses.dataclass(frozen=True)
class Entry:
  """One plan. `changes`: keys of the stage that differ from the preset, as flags spell them."""

  name: str
  hardware: str  # the variant of the experiment
  stage: str
  topology: str
  changes: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  why: str = ""

  def command(self) -> list[str]:
    """The flags of the plan command."""
    path = f"--config.stages.{self.stage}"
    return [
      f"--config={EXPERIMENT}:{self.hardware}",
      f"--stage={self.stage}",
      f"--topology={self.topology}",
      *(f"{path}.{change}" for change in self.changes),
      *self.flags,
    ]


def _h100(stage: str, nodes: int, *changes: str, name: str = "", why: str = "") -> Entry:
  return Entry(name or f"h100_{stage}", "h100", stage, f"h100:{nodes}x8", changes, why=why)


def _pod(hardware: str, topology: str, stage: str, accumulate: int, *changes: str) -> Entry:
  changes = (f"accumulate={accumulate}", *changes)
  return Entry(f"{hardware}_{stage}", hardware, stage, topology, changes)


_V5P = lambda stage, accumulate: _pod("v5p", "v5p:8x8x8", stage, accumulate)  # noqa: E731
_V6E = lambda stage, accumulate: _pod("v6e", "v6e:16x16", stage, accumulate, "mesh.replica=1")  # noqa: E731
_SAMPLE = ("--what=sample", "--bucket=256x768x768")

# Stages called "..._low" differ in their learning rate only, but for the last one's batch.
PLANS = (
  # The paper's own stages, on its own numbers of GPUs (Table 3).
  _h100("t2i_256", 192),
  _h100("t2v_256", 384),
  _h100("t2v_256_wide", 768),
  _h100("t2v_768", 768),
  _h100("t2v_768_cp2", 768, why="tensor 4, context 2, as the paper"),
  _h100("t2v_768_cp2_low", 512),
  _h100(
    "t2v_768_cp2", 768, "mesh.tensor=8", "mesh.context=1",
    name="h100_t2v_768_tp8", why="the same batch with tensor 8 instead of 4 x 2",
  ),
  # One pod of each TPU, with the passes of accumulation that leave an example to a batch shard.
  _V5P("t2i_256", 1),
  _V5P("t2v_256", 2),
  _V5P("t2v_256_wide", 4),
  _V5P("t2v_768", 12),
  _V5P("t2v_768_cp2", 6),
  _V6E("t2i_256", 4),
  _V6E("t2v_256", 6),
  _V6E("t2v_256_wide", 12),
  _V6E("t2v_768", 48),
  _V6E("t2v_768_cp2", 24),
  # Drawing one sample of 73,728 tokens at a time.
  Entry(
    "h100_sample_768", "h100", "t2v_768_cp2", "h100:1x8", flags=(*_SAMPLE, "--mesh=context=8")
  ),
  Entry(
    "v5p_sample_768", "v5p", "t2v_768_cp2", "v5p:2x2x1", flags=(*_SAMPLE, "--mesh=context=4")
  ),
)  # fmt: skip


def missing() -> str | None:
  """A sentence about the compiler that is not installed; None where both are."""
  gpu = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
  names = [] if importlib.util.find_spec("libtpu") else ["libtpu (the extra tpu)"]
  names += [] if gpu else ["XLA for CUDA (the extra cuda)"]
  if not names:
    return None
  return (
    f"The plans need {' and '.join(names)}, of no use to other targets: pip install -e .[tpu,cuda]"
  )


def tidy(value: Any, key: str = "") -> Any:
  """A record with its figures rounded: whole seconds of this machine, `DIGITS` digits else."""
  if isinstance(value, dict):
    return {k: tidy(v, k) for k, v in value.items()}
  if isinstance(value, list):
    return [tidy(v) for v in value]
  if isinstance(value, float):
    return round(value) if key in DEVICE_SECONDS else float(f"{value:.{DIGITS}g}")
  return value


def make(entry: Entry) -> str | None:
  """Plans an entry and writes its files; the error's sentence if it could not be planned."""
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
  with tempfile.TemporaryDirectory(prefix="mgen_jax-plan-") as folder:
    out = Path(folder) / "plan"
    done = subprocess.run(
      [sys.executable, "-m", "mgen_jax.plan", *entry.command(), f"--out={out}"],
      cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if line.strip()]
      return next((s for s in said if s.startswith("error: ")), said[-1] if said else "no words")
    record = tidy(json.loads(out.with_suffix(".json").read_text()))
    text = out.with_suffix(".txt").read_text()
  (HERE / f"{entry.name}.json").write_text(json.dumps(record, indent=1) + "\n")
  # The line of the machine's own seconds stays out of the table.
  kept = [line for line in text.splitlines() if not line.startswith("traced in ")]
  header = f"python -m mgen_jax.plan {' '.join(entry.command())}"
  (HERE / f"{entry.name}.txt").write_text("\n".join([header, "", *kept]) + "\n")
  return None


def index() -> str:
  """README.md: one line for each plan whose file is there."""
  lines = [
    "# Plans of the 30B",
    "",
    "Written by `make plans`; do not edit. Each was compiled for its hardware on a CPU host: see",
    "[docs/planning.md](../docs/planning.md) for what the figures mean and what they leave out.",
    "A bound is what a step takes at least, never what it takes. Stages named `..._low` are the",
    "programs of those without, but for the last one's batch.",
    "",
    "| plan | stage, bucket | on | mesh | accumulate | batch | GiB a device | fits | bound | MFU |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for entry in PLANS:
    path = HERE / f"{entry.name}.json"
    if not path.is_file():
      lines.append(f"| {entry.name} | {entry.stage} | {entry.topology} | not made | | | | | | |")
      continue
    record = json.loads(path.read_text())
    memory, mfu = record["memory_gib"], record["mfu_range"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    sampled = "sampler" in record
    stage = record["stage"] + (", sampled" if sampled else "")
    bound = record["step_seconds_bound"]
    cells = [
      f"[{entry.name}]({entry.name}.txt)",
      f"{stage}, {record['bucket']} ({record['tokens']:,} tokens)",
      f"{record['topology']} ({record['devices']:,})",
      mesh,
      "" if sampled else str(record["accumulate"]),
      str(record["batch"]),
      f"{memory['total']:.1f} of {memory['limit']:.1f}",
      "yes" if record["fits"] else "**no**",
      "" if bound is None else f"{bound:.3g} s ({record['critical']})",
      "" if mfu is None else f"{100 * mfu[0]:.0f}-{100 * mfu[1]:.0f} %",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def main() -> int:
  """Makes what the flags ask for; 1 if something could not be planned."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--only", action="append", default=[], help="Plans whose name begins so.")
  parser.add_argument("--index", action="store_true", help="Write README.md only.")
  args = parser.parse_args()
  wanted = [e for e in PLANS if not args.only or e.name.startswith(tuple(args.only))]
  if not wanted:
    parser.error(f"--only names none of {', '.join(entry.name for entry in PLANS)}")
  failed = []
  if not args.index:
    complaint = missing()
    if complaint:
      print(f"error: {complaint}", file=sys.stderr)
      return 2
    for number, entry in enumerate(wanted, start=1):
      began = time.perf_counter()
      print(f"[{number}/{len(wanted)}] {entry.name} ({entry.topology}) ...", end=" ", flush=True)
      error = make(entry)
      print(f"{error or 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
      failed += [entry.name] if error else []
  (HERE / "README.md").write_text(index())
  if failed:
    print(f"error: {len(failed)} could not be planned: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
