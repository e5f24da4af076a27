"""Shows plans: tables for the terminal and a text file, a picture, and a comparison of two.

Everything is read from the record of a plan (its JSON), so a saved plan shows like a new one.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from matplotlib import figure

Record = Mapping[str, Any]

MEMORY_PARTS = {
  "parameters": "parameters (fp32)",
  "optimizer": "optimizer state",
  "ema": "EMA of the parameters",
  "frozen": "frozen text encoders",
  "batch": "batch",
  "temp": "activations, gradients, work space",
  "code": "program",
}
_COLOURS = ("#4477aa", "#66ccee", "#228833", "#bbbbbb", "#ccbb44", "#aa3377", "#ee8866")


def show(record: Record, console: rich.console.Console) -> None:
  """All of one plan."""
  title = f"{record['experiment']} / {record['stage']} / {record['bucket']} on {record['topology']}"
  console.rule(title)
  console.print(_summary(record), markup=False, highlight=False, soft_wrap=True)
  console.print(_memory_table(record))
  console.print(_flops_table(record))
  if record["collectives"]:
    console.print(_collectives_table(record))
    for one in record["largest_collectives"]:
      console.print(
        f"  {one['wire'] / 1e9:.3g} GB: {one['kind']} on {' x '.join(one['axes'])}, {one['count']} "
        f"times, from {one['source']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
      )
  if record["step_seconds_terms"]:
    console.print(_terms_table(record))
  for note in record["notes"]:
    console.print(f"note: {note}", markup=False, soft_wrap=True)
  if record["changes"]:
    console.print("Changes after which it is estimated to fit:", markup=False)
    for change in record["changes"]:
      host = change["estimated_host_gib"]
      console.print(
        f"  about {change['estimated_total_gib']:.1f} GiB"
        + (f" (and {host:.1f} GiB of host memory)" if host else "")
        + f": {change['change']}\n    {change['flags']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
      )
  elif not record["fits"]:
    console.print(
      "No change of the mesh, the remat policy or the accumulation is estimated to make it fit: "
      "more devices, a smaller batch or fewer tokens are needed.",
      markup=False,
    )


def show_search(trials: Sequence[Record], console: rich.console.Console) -> None:
  """The ranking of a search."""
  table = rich.table.Table(title="Choices that were compiled, best first")
  for name in ("", "choice", "fits", "GiB (estimate)", "bound s", "no overlap s", "limit", "MFU %"):
    table.add_column(name, justify="left" if name in ("choice", "limit") else "right")
  for place, trial in enumerate(trials, start=1):
    table.add_row(
      str(place),
      trial["choice"],
      "yes" if trial["fits"] else "no",
      f"{trial['total_gib']:.1f} ({trial['estimated_gib']:.1f})",
      _number(trial["step_seconds_bound"]),
      _number(trial["step_seconds_serial"]),
      trial["critical"] or "",
      _percent(trial["mfu_range"]),
    )
  console.print(table)
  if trials:
    console.print(f"The best: {trials[0]['flags']}", markup=False, highlight=False, soft_wrap=True)


def show_comparison(old: Record, new: Record, console: rich.console.Console) -> None:
  """Two plans side by side, with the change in per cent."""
  table = rich.table.Table(title="Compared with the other plan")
  for name in ("", "other", "this", "change"):
    table.add_column(name, justify="left" if not name else "right")
  for name in ("topology", "stage", "bucket", "mesh", "remat", "accumulate", "batch", "fits"):
    a, b = (_plain(r[name]) for r in (old, new))
    table.add_row(name, a, b, "" if a == b else "differs")
  figures = {f"memory {k}, GiB": ("memory_gib", k) for k in (*MEMORY_PARTS, "host", "total")}
  for label, (group, key) in figures.items():
    _compare_row(table, label, old[group][key], new[group][key])
  for key in (
    "model_flops", "hlo_flops", "hbm_bytes", "step_seconds_bound", "step_seconds_serial",
    "compile_seconds", "stablehlo_lines",
  ):  # fmt: skip
    _compare_row(table, key.replace("_", " "), old[key], new[key])
  wires = [_wire_by_axes(record) for record in (old, new)]
  for axes in sorted(set(wires[0]) | set(wires[1])):
    _compare_row(table, f"sent on {axes}, GB", *(wire.get(axes, 0.0) for wire in wires))
  console.print(table)


def as_text(draw: Any) -> str:
  """What `draw(console)` prints, without colours."""
  console = rich.console.Console(file=io.StringIO(), width=120, no_color=True)
  draw(console)
  return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def picture(records: Sequence[Record]) -> bytes:
  """A PNG of the plans: memory against the limit, and the terms of the step time."""
  height = 1.6 + 0.8 * len(records)
  fig = figure.Figure(figsize=(11, height + 0.8), layout="constrained")
  left, right = fig.subplots(1, 2)
  names = [f"{r['stage']}\n{r['bucket']}" for r in records]
  for row, record in enumerate(records):
    start = 0.0
    for colour, (part, label) in zip(_COLOURS, MEMORY_PARTS.items(), strict=True):
      width = record["memory_gib"][part]
      left.barh(row, width, left=start, color=colour, label=label if row == 0 else None)
      start += width
    left.plot([record["memory_gib"]["limit"]] * 2, [row - 0.45, row + 0.45], color="#cc3311")
    for place, (term, seconds) in enumerate(record["step_seconds_terms"].items()):
      thickness = 0.8 / len(record["step_seconds_terms"])
      right.barh(
        row - 0.4 + (place + 0.5) * thickness,
        seconds,
        height=thickness,
        color=_COLOURS[place],
        label=term if row == 0 else None,
      )
  for axes, title, unit in (
    (left, "Memory of a device (red: the limit)", "GiB"),
    (right, "Least time of a step, by what it waits for", "seconds"),
  ):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)
  fig.suptitle(f"{records[0]['experiment']} on {records[0]['topology']}", fontsize=11)
  file = io.BytesIO()
  fig.savefig(file, format="png", dpi=120)
  return file.getvalue()


def _summary(record: Record) -> str:
  mesh = " x ".join(f"{axis}={size}" for axis, size in record["mesh"].items())
  memory = record["memory_gib"]
  verdict = (
    f"FITS, {memory['margin']:.1f} GiB to spare"
    if record["fits"]
    else f"DOES NOT FIT, {-memory['margin']:.1f} GiB too much"
  )
  where = f"{record['devices']} x {record['chip']} on {record['hosts']} hosts, mesh {mesh}"
  lines = [
    f"{where}, remat={record['remat']}, accumulate={record['accumulate']}",
    f"batch {record['batch']} x {record['tokens']} tokens",
    f"{verdict}: {memory['total']:.1f} of {memory['limit']:.1f} GiB a device",
  ]
  if record["step_seconds_bound"] is not None:
    line = f"a step takes at least {record['step_seconds_bound']:.3g} s ({record['critical']})"
    if record["mfu_range"]:
      line += f", MFU {_percent(record['mfu_range'])} %"
    lines.append(line)
  lines.append(
    f"traced in {record['lower_seconds']:.1f} s ({record['stablehlo_lines']} lines of StableHLO), "
    f"compiled in {record['compile_seconds']:.1f} s"
  )
  return "\n".join(lines)


def _memory_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title="Memory of one device", min_width=48)
  memory = record["memory_gib"]
  unit, factor = ("GiB", 1) if memory["total"] > 0.5 else ("MiB", 1024)
  table.add_column("")
  table.add_column(unit, justify="right")
  for part, label in MEMORY_PARTS.items():
    table.add_row(label, f"{factor * memory[part]:.3f}")
  table.add_row("total", f"{factor * memory['total']:.3f}", style="bold")
  table.add_row("limit", f"{factor * memory['limit']:.3f}")
  table.add_row("offloaded to the host", f"{factor * memory['host']:.3f}")
  return table


def _flops_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title="FLOPs of one step, all devices", min_width=48)
  unit, factor = ("PFLOP", 1e15) if record["model_flops"] > 1e14 else ("GFLOP", 1e9)
  table.add_column("")
  table.add_column(unit, justify="right")
  for part, flops in record["model_flops_by_part"].items():
    table.add_row(part.replace("_", " "), f"{flops / factor:.4g}")
  table.add_row("the model's own", f"{record['model_flops'] / factor:.4g}", style="bold")
  if record["hlo_flops"] is not None:
    ratio = record["hlo_flops"] / record["model_flops"]
    table.add_row(f"compiled ({ratio:.2f} x)", f"{record['hlo_flops'] / factor:.4g}")
  return table


def _collectives_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title="Collectives of one step, of one device")
  for name in ("mesh axes", "kind", "devices", "count", "GB of arrays", "GB sent", "seconds"):
    table.add_column(name, justify="left" if name in ("mesh axes", "kind") else "right")
  rows = [row for row in record["collectives"] if row["wire"] >= 1e6]
  for row in rows:
    table.add_row(
      " x ".join(row["axes"]),
      row["kind"],
      str(row["size"]),
      str(row["count"]),
      f"{row['bytes'] / 1e9:.3g}",
      f"{row['wire'] / 1e9:.3g}",
      _number(row["seconds"]),
    )
  rest = [row for row in record["collectives"] if row["wire"] < 1e6]
  if rest:
    sent = sum(row["wire"] for row in rest)
    table.add_row(
      "", "below 1 MB", "", str(sum(row["count"] for row in rest)), "", f"{sent / 1e9:.2g}", ""
    )
  return table


def _terms_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title="Least time of a step", min_width=48)
  table.add_column("if all else were free")
  table.add_column("seconds", justify="right")
  for term, seconds in record["step_seconds_terms"].items():
    table.add_row(term, f"{seconds:.4g}", style="bold" if term == record["critical"] else "")
  if record["step_seconds_serial"] is not None:
    table.add_row("nothing overlaps, at working rates", f"{record['step_seconds_serial']:.4g}")
  return table


def _wire_by_axes(record: Record) -> dict[str, float]:
  sent: dict[str, float] = {}
  for row in record["collectives"]:
    axes = " x ".join(row["axes"])
    sent[axes] = sent.get(axes, 0.0) + row["wire"] / 1e9
  return sent


def _compare_row(table: rich.table.Table, label: str, old: Any, new: Any) -> None:
  change = f"{100 * (new / old - 1):+.1f} %" if old and new is not None else ""
  table.add_row(label, _number(old), _number(new), change)


def _plain(value: Any) -> str:
  if isinstance(value, Mapping):
    return " ".join(f"{k}={v}" for k, v in value.items())
  return str(value)


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.4g}"


def _percent(span: Sequence[float] | None) -> str:
  return "" if span is None else f"{100 * span[0]:.0f}-{100 * span[1]:.0f}"
