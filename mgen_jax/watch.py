"""A live view of a run in a terminal: what each stage does, how well, and where its time goes.

  python -m mgen_jax.watch runs/quickstart
  python -m mgen_jax.watch runs/quickstart --once       one picture of now, for logs and scripts

Reads the files of the run and nothing else: it may be started, stopped and started again while the
run goes on, on any machine that sees the folder.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box, console, live, panel, table, text

from mgen_jax import config as config_lib
from mgen_jax.errors import UserError
from mgen_jax.training import goodput, metrics
from mgen_jax.workdir import Workdir

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {
  "step": "green", "compile": "yellow", "data": "red", "validation": "cyan", "save": "blue",
  "restore": "magenta", "initialise": "bright_black", "lost": "bright_red",
  "down": "bright_magenta", "other": "white",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StageView:
  """What is known of a stage."""

  name: str
  kind: str
  state: str  # "done", "running", "waiting"; "quiet": trains, and has written nothing for a while
  seconds: float | None = None  # that it took, if it is done
  steps: int = 0  # of a train stage
  step: int = 0
  lines: tuple[dict[str, Any], ...] = ()
  spent: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds by kind
  silent: float = 0.0  # seconds since something was written


def look(root: Path | str, now: float, quiet_after: float = 120.0) -> list[StageView]:
  """The stages of a run in order.

  Raises:
    UserError: the folder is not one of a run.
  """
  work = Workdir.open(root)
  return [_look_at(work, name, now, quiet_after) for name in work.experiment.recipe]


def _look_at(work: Workdir, name: str, now: float, quiet_after: float) -> StageView:
  config = work.experiment.stages[name]
  folder = work.folder(name)
  done = work.done_record(name)
  if isinstance(config, config_lib.TrainStage):
    lines = tuple(metrics.read(str(folder)))
    view = StageView(
      *(name, config.kind, "waiting"),
      steps=config.steps,
      step=lines[-1]["step"] if lines else 0,
      lines=lines,
      spent=goodput.summarise(goodput.read(str(folder))),
    )
  else:
    view = StageView(name, config.kind, "waiting")
  if done is not None:
    return dataclasses.replace(view, state="done", seconds=done["seconds"])
  if not folder.exists():
    return view
  if not isinstance(config, config_lib.TrainStage):  # others write below, and no log
    return dataclasses.replace(view, state="running")
  written = [path.stat().st_mtime for path in folder.iterdir()] or [folder.stat().st_mtime]
  silent = max(0.0, now - max(written))
  state = "running" if silent < quiet_after else "quiet"
  return dataclasses.replace(view, state=state, silent=silent)


def draw(root: Path | str, views: Sequence[StageView]) -> console.Group:
  """The whole picture."""
  parts: list[console.RenderableType] = [_overview(root, views)]
  active = [view for view in views if view.lines]
  current = next((v for v in active if v.state != "done"), active[-1] if active else None)
  if current is not None:
    parts.append(_details(current))
  return console.Group(*parts)


def _overview(root: Path | str, views: Sequence[StageView]) -> table.Table:
  rows = [_row(view) for view in views]
  made = table.Table(title=str(root), box=box.SIMPLE_HEAD, expand=True, padding=(0, 1, 0, 0))
  # MFU is known for some hardware only. Eighty columns must hold a row: what is left may wrap.
  shown = [name for name in rows[0] if name != "MFU" or any(row[name] != "–" for row in rows)]
  for name in shown:
    left, wraps = name in ("stage", "kind"), name in ("progress", "state")
    made.add_column(name, no_wrap=not wraps, justify="left" if left else "right")
  for row in rows:
    made.add_row(*(row[name] for name in shown))
  return made


def _row(view: StageView) -> dict[str, str | text.Text]:
  """What stands in the line of a stage, by column."""
  last = _last(view.lines)
  state = {
    "done": text.Text("done", "green"),
    "running": text.Text("running", "bold yellow"),
    "waiting": text.Text("waiting", "bright_black"),
    "quiet": text.Text(f"nothing for {_duration(view.silent)}", "bold red"),
  }[view.state]
  progress = "" if view.seconds is None else _duration(view.seconds)
  if view.steps and view.state != "done":
    progress = f"{view.step}/{view.steps} {_left(view)}" if view.lines else f"0/{view.steps}"
  spent = goodput.goodput(view.spent) if any(view.spent.values()) else None
  return {
    "stage": view.name,
    "kind": view.kind,
    "state": state,
    "progress": progress,
    "loss": _number(last.get("loss"), "{:.4f}"),
    "MFU": _number(last.get("mfu"), "{:.1%}"),
    "data wait": _number(last.get("data_wait"), "{:.0%}"),
    "goodput": _number(spent, "{:.0%}"),
  }


def _details(view: StageView) -> panel.Panel:
  last = _last(view.lines)
  grid = table.Table.grid(padding=(0, 2))
  grid.add_column(style="bold", no_wrap=True)
  grid.add_column()
  for name in ("loss", "validation_loss", "grad_norm", "examples_per_second"):
    values = [line[name] for line in view.lines if line.get(name) is not None]
    if values:
      grid.add_row(
        name.replace("_", " "), f"{sparkline(values)} {values[0]:.4g} → {values[-1]:.4g}"
      )
  wall = sum(view.spent.values())
  if wall:
    grid.add_row("time", _shares(view.spent, wall))
  steps = [f"{last['step_seconds']:.3g} s"] if last.get("step_seconds") else []
  for bucket in sorted({key for line in view.lines for key in line if "step_seconds/" in key}):
    seconds = next(line[bucket] for line in reversed(view.lines) if bucket in line)
    steps.append(f"{bucket.split('/')[1]} {seconds:.3g} s")
  if steps:
    grid.add_row("a step", " · ".join(steps))
  facts = [f"memory {_number(last.get('peak_memory_gib'), '{:.1f} GiB')}"]
  facts.append(f"lr {_number(last.get('lr'), '{:.3g}')}")
  again = sum(line.get("compiles", 0) for line in view.lines[1:])
  facts.append(f"compilations after the first line {again}")
  grid.add_row("", " · ".join(facts))
  return panel.Panel(grid, title=f"{view.name}, step {view.step} of {view.steps}", box=box.ROUNDED)


def _shares(spent: dict[str, float], wall: float, width: int = 40) -> text.Text:
  """A bar of where the time went, and its parts in words."""
  bar, words = text.Text(), text.Text("  ")
  for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
    if seconds / wall >= 0.005:
      bar.append("█" * max(1, round(width * seconds / wall)), _COLOURS[kind])
      words.append(f"{kind} {seconds / wall:.0%} ", _COLOURS[kind])
  return bar + words


def sparkline(values: Sequence[float], width: int = 48) -> str:
  """A row of bars, one for the mean of each equal part of the finite values."""
  values = [value for value in values if math.isfinite(value)]
  if not values:
    return ""
  count = min(width, len(values))
  parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
  means = [sum(part) / len(part) for part in parts]
  low, high = min(means), max(means)
  scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
  return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _last(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The last line of steps (one of a validation has the validation loss only)."""
  return next((line for line in reversed(lines) if "loss" in line), {})


def _left(view: StageView) -> str:
  """How long the rest takes at the rate of the last line."""
  seconds = _last(view.lines).get("step_seconds")
  return "" if not seconds else f"({_duration((view.steps - view.step) * seconds)} left)"


def _number(value: float | None, form: str) -> str:
  return "–" if value is None else form.format(value)


def _duration(seconds: float) -> str:
  minutes, hours = seconds / 60, seconds / 3600
  if hours >= 48:
    return f"{hours / 24:.1f} days"
  if hours >= 1:
    return f"{int(hours)} h {int(minutes) % 60:02} min"
  return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m mgen_jax.watch",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdir", help="Folder of the run.")
  parser.add_argument("--once", action="store_true", help="Draw once and end.")
  parser.add_argument("--every", type=float, default=2.0, help="Seconds between looks (2).")
  options = parser.parse_args(arguments)
  screen = console.Console()
  try:
    if not 0 < options.every < math.inf:
      raise UserError(f"--every={options.every:g} must be more than 0 seconds.")
    if options.once:
      screen.print(draw(options.workdir, look(options.workdir, time.time())))
      return 0
    with live.Live(console=screen, auto_refresh=False) as view:
      while True:
        views = look(options.workdir, time.time())
        view.update(draw(options.workdir, views), refresh=True)
        if all(stage.state == "done" for stage in views):
          return 0
        time.sleep(options.every)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 0


if __name__ == "__main__":
  sys.exit(main())
