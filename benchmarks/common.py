"""What the benchmarks share: interleaved timing, tables, the JSON of a result, the machine.

Not here: what is measured. Nothing in `mgen_jax` imports this folder.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table

Row = dict[str, Any]


def parser(doc: str, rounds: int = 10) -> argparse.ArgumentParser:
  """The flags that every benchmark has; `doc` is the docstring of its file."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  made.add_argument("--out", help="Save the result as JSON here.")
  made.add_argument(
    "--rounds", type=_count, default=rounds, help=f"Timed rounds (default: {rounds})."
  )
  return made


def _count(text: str) -> int:
  """A whole number of 1 or more, as a flag's value."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
  return int(text)


def numbers(text: str) -> tuple[int, ...]:
  """Reads "64,256" as a flag's value."""
  return tuple(int(part) for part in text.split(","))


@dataclasses.dataclass(frozen=True)
class Times:
  """Of one step, one entry for each round."""

  wall: list[float]  # seconds that it took
  cpu: list[float]  # seconds of all cores that this process was given meanwhile


def interleave(
  steps: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, Times]:
  """Times each step: all of them in turn, `rounds` times, so that what else the machine does hits
  them alike. A step returns when its work is done."""
  for step in steps.values():
    for _ in range(warm_up):
      step()
  times = {name: Times([], []) for name in steps}
  order = list(steps)
  for number in range(rounds):
    for name in order if number % 2 else reversed(order):
      wall, cpu = time.perf_counter(), time.process_time()
      steps[name]()
      times[name].wall.append(time.perf_counter() - wall)
      times[name].cpu.append(time.process_time() - cpu)
  return times


def ratios(above: Times, below: Times) -> Row:
  """How two interleaved steps compare: "ratio" of the median times, "low" and "high" where all but
  a tenth of the rounds lie above and below, and "cpu_ratio" of the work, which other programs on
  the machine hardly change."""
  rounds = sorted(a / b for a, b in zip(above.wall, below.wall, strict=True))
  tenth = len(rounds) // 10
  return {
    "ratio": statistics.median(above.wall) / statistics.median(below.wall),
    "low": rounds[tenth],
    "high": rounds[-1 - tenth],
    "cpu_ratio": statistics.median(above.cpu) / statistics.median(below.cpu),
  }


def machine() -> Row:
  """What a reader must know of where a figure comes from."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[0], 1),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def report(title: str, rows: Sequence[Row], out: str | None, **more: Any) -> Row:
  """Prints the rows as a table, and saves everything as JSON if asked to.

  Returns:
    What is saved: "benchmark", "command", "machine", "rows" and whatever `more` holds.
  """
  console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
  table = rich.table.Table(title=title)
  for name in rows[0]:
    text = isinstance(rows[0][name], str)
    table.add_column(name.replace("_", " "), justify="left" if text else "right")
  for row in rows:
    table.add_row(*(_plain(value) for value in row.values()))
  console.print(table)
  record = {
    "benchmark": title,
    "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    "machine": machine(),
    "rows": list(rows),
    **more,
  }
  where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
  console.print(f"{where}; times vary where the machine is shared", markup=False, highlight=False)
  if out:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"saved {path}", markup=False, highlight=False)
  return record


def _plain(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
  return "" if value is None else str(value)
