"""What the benchmarks share: interleaved timing, tables, the JSON of a result, the machine.

Not here: what is measured. Nothing in `mgen_jax` imports this folder.
"""

import argparse
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


def parser(doc: str) -> argparse.ArgumentParser:
  """The flags that every benchmark has; `doc` is the docstring of its file."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  made.add_argument("--out", help="Save the result as JSON here.")
  made.add_argument("--rounds", type=int, default=10, help="Timed rounds (default: 10).")
  return made


def numbers(text: str) -> tuple[int, ...]:
  """Reads "64,256" as a flag's value."""
  return tuple(int(part) for part in text.split(","))


def interleave(steps: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict:
  """Seconds of each step: all of them in turn, `rounds` times, so that what else the machine does
  hits them alike. A step returns when its work is done.

  Returns:
    {name: [seconds of each round]}.
  """
  for step in steps.values():
    for _ in range(warm_up):
      step()
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  order = list(steps)
  for number in range(rounds):
    for name in order if number % 2 else reversed(order):
      began = time.perf_counter()
      steps[name]()
      seconds[name].append(time.perf_counter() - began)
  return seconds


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> Row:
  """How the seconds of two interleaved steps compare: medians, and the spread over the rounds."""
  quotients = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
  return {
    "ratio": statistics.median(seconds[above]) / statistics.median(seconds[below]),
    "ratio_low": quotients[len(quotients) // 10],
    "ratio_high": quotients[-1 - len(quotients) // 10],
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
  return str(value)
