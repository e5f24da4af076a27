"""One picture of the metrics of several runs, to see which is better and which is slower.

  python -m mgen_jax.plot runs/quickstart --out=quickstart.png
  python -m mgen_jax.plot runs/a runs/b --stage=t2v --metrics=loss,validation_loss,step_seconds
  python -m mgen_jax.plot runs/a/t2v runs/b/t2v --smooth=0.9 --x=hours

A RUN is the folder of a run (all of its train stages, or --stage) or of one stage. Each metric is a
panel, each stage of a run a line; --smooth draws an exponential average over the faint raw line.
The last panel shows where the time went.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from mgen_jax.data import files
from mgen_jax.errors import UserError
from mgen_jax.training import goodput, metrics
from mgen_jax.workdir import CONFIG_NAME

METRICS = (
  "loss",
  "validation_loss",
  "grad_norm",
  "examples_per_second",
  "step_seconds",
  "data_wait",
)
_AXES = ("step", "hours")
_MANY = 20  # fewer points are drawn as dots, and not smoothed
_COLOURS = {
  "step": "#2a9d5c", "compile": "#e9b44c", "data": "#d1495b", "validation": "#3aa6b9",
  "save": "#30638e", "restore": "#9b5de5", "initialise": "#bbbbbb", "lost": "#7f1d1d",
  "down": "#f15bb5", "other": "#dddddd",
}  # fmt: skip


class Curve(NamedTuple):
  """A stage of a run."""

  label: str
  lines: list[dict[str, Any]]
  spent: Mapping[str, float]  # seconds by kind


def gather(runs: Sequence[str], stage: str | None) -> list[Curve]:
  """The stages with metrics in folders of runs or of stages, named as short as they differ.

  Raises:
    UserError: one of them has none.
  """
  found: list[tuple[Path, Path]] = []
  for run in map(Path, runs):
    if (run / metrics.FILE_NAME).exists():
      stages = [run]
    elif (run / CONFIG_NAME).exists():
      stages = sorted(path.parent for path in run.glob(f"*/{metrics.FILE_NAME}"))
      stages = [path for path in stages if stage in (None, path.name)]
    else:
      raise UserError(f"{run} is no folder of a run or of a stage: name one with metrics.jsonl.")
    if not stages:
      of = "" if stage is None else f" of stage {stage}"
      raise UserError(f"{run} has no metrics{of} yet: see its folders for the stages it has.")
    found += [(run, path) for path in stages]
  folders = [str(path.absolute()) for _, path in found]
  shared = os.path.commonpath(folders) if len(found) > 1 else str(found[0][1].absolute().parent)
  one_stage = all(run != path for run, path in found) and len({path.name for _, path in found}) == 1
  curves = []
  for _, path in found:
    name = os.path.relpath(path.absolute(), shared)
    if one_stage and name != path.name:  # what they share need not be said
      name = os.path.dirname(name)
    spent = goodput.summarise(goodput.read(str(path)))
    curves.append(Curve(name, metrics.read(str(path)), spent))
  return curves


def points(curve: Curve, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
  """(x, y) of a metric; in hours, of the steps themselves, what is between runs left out."""
  xs, ys, hours, before = [], [], 0.0, 0
  for line in curve.lines:
    if line.get("step_seconds") is not None:
      hours += (line["step"] - before) * line["step_seconds"] / 3600
      before = line["step"]
    if line.get(name) is not None and math.isfinite(line[name]):
      xs.append(line["step"] if x == "step" else hours)
      ys.append(line[name])
  return np.asarray(xs, float), np.asarray(ys, float)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
  """The exponential average, without the pull of its start."""
  total, norm, made = 0.0, 0.0, np.empty_like(values)
  for index, value in enumerate(values):
    total = weight * total + (1 - weight) * value
    norm = weight * norm + (1 - weight)
    made[index] = total / norm
  return made


def draw(
  curves: Sequence[Curve], names: Sequence[str], *, x: str = "step", smooth: float = 0.0
) -> matplotlib.figure.Figure:
  """The picture.

  Raises:
    UserError: no curve has any of the metrics.
  """
  shown = [name for name in names if any(len(points(curve, name, x)[0]) for curve in curves)]
  if not shown:
    have = sorted({key for curve in curves for line in curve.lines for key in line} - {"step"})
    raise UserError(f"no run has {', '.join(names)}: choose --metrics from {', '.join(have)}.")
  timed = [curve for curve in curves if sum(curve.spent.values())]
  panels = len(shown) + bool(timed)
  columns = min(3, panels)
  rows = -(-panels // columns)
  figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 3.5 * rows + 0.6), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False).flat
  for axis, name in zip(axes, shown, strict=False):
    for number, curve in enumerate(curves):
      xs, ys = points(curve, name, x)
      colour = f"C{number % 10}"
      if smooth and len(ys) >= _MANY:
        axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
        ys = smoothed(ys, smooth)
      style = "-" if len(xs) >= _MANY else "o-"
      axis.plot(xs, ys, style, color=colour, linewidth=1.4, markersize=3, label=curve.label)
      if name.endswith(("loss", "norm")) and len(ys) and 0 < 30 * min(ys) < max(ys):
        axis.set_yscale("log")
    axis.set_title(name.replace("_", " "), fontsize=10)
    axis.set_xlabel(x)
    axis.grid(alpha=0.3)
  if timed:
    _draw_time(figure.axes[len(shown)], timed)
  for axis in figure.axes[panels:]:
    axis.set_visible(False)
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=9)
  return figure


def _draw_time(axis: Any, curves: Sequence[Curve]) -> None:
  """A bar for each curve: the share of each kind in the wall time."""
  kinds = [kind for kind in _COLOURS if any(curve.spent.get(kind, 0) > 0 for curve in curves)]
  left = np.zeros(len(curves))
  walls = np.asarray([sum(curve.spent.values()) for curve in curves])
  for kind in kinds:
    share = np.asarray([curve.spent.get(kind, 0.0) for curve in curves]) / walls
    axis.barh(range(len(curves)), share, left=left, color=_COLOURS[kind], label=kind)
    left += share
  names = [f"{curve.label}\n{wall:.0f} s" for curve, wall in zip(curves, walls, strict=True)]
  axis.set_yticks(range(len(curves)), names, fontsize=7)
  axis.invert_yaxis()
  axis.set_xlim(0, 1)
  axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  axis.set_title("where the time went", fontsize=10)
  axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m mgen_jax.plot",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run or of a stage.")
  parser.add_argument("--stage", help="Of a run, only this one.")
  parser.add_argument(
    "--metrics", default=",".join(METRICS), help="Panels, with commas (default: %(default)s)."
  )
  parser.add_argument("--x", choices=_AXES, default="step", help="Steps, or hours of training.")
  parser.add_argument("--smooth", type=float, default=0.0, help="0 (none) to below 1.")
  parser.add_argument("--out", default="metrics.png", help="PNG, SVG or PDF (metrics.png).")
  options = parser.parse_args(arguments)
  try:
    if not 0 <= options.smooth < 1:
      raise UserError(f"--smooth={options.smooth} must lie in [0, 1).")
    out = Path(options.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
      raise UserError(f"--out={out} must end in .png, .svg or .pdf.")
    files.make_folder(out.parent, f"--out={out}")
    curves = gather(options.runs, options.stage)
    figure = draw(curves, options.metrics.split(","), x=options.x, smooth=options.smooth)
    figure.savefig(out, dpi=110)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(out)
  return 0


if __name__ == "__main__":
  sys.exit(main())
