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


def show_all(record: Record, console: rich.console.Console) -> None:
  """A plan as it is saved: the one that needs most memory, then its other buckets and its search,
  where they were asked for."""
  show(record, console)
  if "buckets" in record:
    show_buckets(list(record["buckets"].values()), console)
  if "search" in record:
    show_search(record["search"], console)


def show(record: Record, console: rich.console.Console) -> None:
  """All of one plan."""
  console.rule(_title(record))
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
  if record["largest_gather"]:
    console.print(_gather(record["largest_gather"]), markup=False, highlight=False, soft_wrap=True)
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
  elif not record["fits"] and _is_sampler(record):
    console.print(
      "It does not fit: other meshes (--search), fewer --samples or more devices may.", markup=False
    )
  elif not record["fits"]:
    console.print(
      "No change of the mesh, the remat policy or the accumulation is estimated to make it fit: "
      "more devices, a smaller batch or fewer tokens are needed.",
      markup=False,
    )


def show_buckets(records: Sequence[Record], console: rich.console.Console) -> None:
  """One line for each bucket of a stage."""
  limit = records[0]["memory_gib"]["limit"]
  table = rich.table.Table(title=f"All {len(records)} buckets ({limit:.1f} GiB a device)")
  for name in ("bucket", "tokens", "batch", "fits", "GiB", "bound s", "limit", "MFU %"):
    table.add_column(name, justify="left" if name in ("bucket", "limit") else "right")
  for record in sorted(records, key=lambda record: -record["memory_gib"]["total"]):
    table.add_row(
      record["bucket"],
      f"{record['tokens']:,}",
      str(record["batch"]),
      "yes" if record["fits"] else "NO",
      f"{record['memory_gib']['total']:.1f}",
      _number(record["step_seconds_bound"]),
      record["critical"] or "",
      _percent(record["mfu_range"]),
    )
  console.print(table)


def show_search(trials: Sequence[Record], console: rich.console.Console) -> None:
  """The ranking of a search."""
  table = rich.table.Table(title="Choices that were compiled, best first")
  names = ("", "choice", "batch", "fits", "GiB (estimate)", "bound s", "no overlap s", "limit")
  for name in (*names, "MFU %"):
    table.add_column(name, justify="left" if name in ("choice", "limit") else "right")
  for place, trial in enumerate(trials, start=1):
    guess = trial["estimated_gib"]
    table.add_row(
      str(place),
      trial["choice"],
      str(trial["batch"]),
      "yes" if trial["fits"] else "no",
      f"{trial['total_gib']:.1f}" + ("" if guess is None else f" ({guess:.1f})"),
      _number(trial["step_seconds_bound"]),
      _number(trial["step_seconds_serial"]),
      trial["critical"] or "",
      _percent(trial["mfu_range"]),
    )
  console.print(table)
  if trials:
    console.print(f"The best: {trials[0]['flags']}", markup=False, highlight=False, soft_wrap=True)


def show_comparison(old: Record, new: Record, console: rich.console.Console) -> None:
  """Two plans side by side, with the change in per cent; what is the same in both only once."""
  table = rich.table.Table(title=f"{_title(old)}  ->  {_title(new)}")
  for name in ("", "first", "second", "change"):
    table.add_column(name, justify="left" if not name else "right")
  same = []
  for name in (
    "experiment", "what", "stage", "bucket", "tokens", "batch", "accumulate", "remat", "topology",
    "devices", "mesh", "fits",
  ):  # fmt: skip
    a, b = (_plain(r.get(name)) for r in (old, new))
    if a == b:
      same.append(f"{name} {a}")
    else:
      table.add_row(name, a, b, "differs")
  for part in (*MEMORY_PARTS, "host", "total", "limit"):
    a, b = (r["memory_gib"][part] for r in (old, new))
    if max(a, b) >= 0.005 or part == "total":
      _compare_row(table, f"memory: {part}, GiB", a, b)
  table.add_section()
  terms = sorted({term for r in (old, new) for term in r["step_seconds_terms"]})
  for term in terms:
    _compare_row(
      table, f"seconds: {term}", *(r["step_seconds_terms"].get(term) for r in (old, new))
    )
  for label, key in (("bound", "step_seconds_bound"), ("no overlap", "step_seconds_serial")):
    _compare_row(table, f"seconds: {label}", old[key], new[key])
  table.add_row("MFU, %", _percent(old["mfu_range"]), _percent(new["mfu_range"]), "")
  table.add_section()
  _compare_row(table, "model PFLOP", *(_scaled(r["model_flops"], 1e15) for r in (old, new)))
  _compare_row(table, "compiled PFLOP", *(_scaled(r["hlo_flops"], 1e15) for r in (old, new)))
  _compare_row(
    table, "main memory, GB a device", *(_scaled(r["hbm_bytes"], 1e9) for r in (old, new))
  )
  wires = [_wire_by_axes(record) for record in (old, new)]
  least = 1e-4 * max(sum(wire.values()) for wire in wires)  # GB worth a line
  for axes in sorted(set(wires[0]) | set(wires[1])):
    values = [wire.get(axes, 0.0) for wire in wires]
    if max(values) >= least:
      _compare_row(table, f"sent on {axes}, GB a device", *values)
  for key in ("compile_seconds", "stablehlo_lines"):
    _compare_row(table, key.replace("_", " "), old[key], new[key])
  console.print(table)
  if same:
    console.print(f"The same in both: {', '.join(same)}.", markup=False, highlight=False)


def as_text(draw: Any) -> str:
  """What `draw(console)` prints, without colours."""
  console = rich.console.Console(file=io.StringIO(), width=120, no_color=True)
  draw(console)
  return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def picture(records: Sequence[Record]) -> bytes:
  """A PNG of the plans: memory against the limit, and the terms of the step time."""
  height = 1.6 + 0.8 * min(len(records), 4) + 0.4 * max(0, len(records) - 4)
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
    (right, f"Least time of {_unit(records[0])}, by what it waits for", "seconds"),
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


def _is_sampler(record: Record) -> bool:
  return "sampler" in record


def _unit(record: Record) -> str:
  """What the figures of a plan are of."""
  return "a batch of samples" if _is_sampler(record) else "a step"


def _title(record: Record) -> str:
  stage = f"{record['stage']}, sampled" if _is_sampler(record) else record["stage"]
  return f"{record['experiment']} / {stage} / {record['bucket']} on {record['topology']}"


def _scaled(value: float | None, unit: float) -> float | None:
  return None if value is None else value / unit


def _summary(record: Record) -> str:
  mesh = " x ".join(f"{axis}={size}" for axis, size in record["mesh"].items())
  memory = record["memory_gib"]
  verdict = (
    f"FITS, {memory['margin']:.1f} GiB to spare"
    if record["fits"]
    else f"DOES NOT FIT, {-memory['margin']:.1f} GiB too much"
  )
  where = f"{record['devices']} x {record['chip']} on {record['hosts']} hosts, mesh {mesh}"
  if _is_sampler(record):
    sampler = record["sampler"]
    how = (
      f"{sampler['count']} samples of {record['tokens']} tokens at a time: {sampler['num_steps']} "
      f"{sampler['method']} steps, {sampler['evaluations']} evaluations, guidance "
      f"{sampler['guidance']:g} by {sampler['guidance_split']}, dtype {sampler['dtype']}"
    )
    lines = [where, how]
  else:
    lines = [
      f"{where}, remat={record['remat']}, accumulate={record['accumulate']}",
      f"batch {record['batch']} x {record['tokens']} tokens",
    ]
  lines.append(f"{verdict}: {memory['total']:.1f} of {memory['limit']:.1f} GiB a device")
  if record["step_seconds_bound"] is not None:
    line = (
      f"{_unit(record)} takes at least {record['step_seconds_bound']:.3g} s ({record['critical']})"
    )
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
    if _is_sampler(record):  # nothing is learned
      label = {"temp": "activations, work space, samples"}.get(part, label)
      if part in ("optimizer", "ema"):
        continue
    table.add_row(label, f"{factor * memory[part]:.3f}")
  table.add_row("total", f"{factor * memory['total']:.3f}", style="bold")
  table.add_row("limit", f"{factor * memory['limit']:.3f}")
  table.add_row("offloaded to the host", f"{factor * memory['host']:.3f}")
  return table


def _flops_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title=f"FLOPs of {_unit(record)}, all devices", min_width=48)
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
  table = rich.table.Table(title=f"Collectives of {_unit(record)}, of one device")
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


def _gather(one: Record) -> str:
  """What is gathered at once, and whether that is more than a layer needs."""
  size, limit = one["bytes"] / 1e9, one["limit"] / 1e9
  if size <= limit:
    return f"largest all-gather: {size:.3g} GB, within what one layer needs ({limit:.3g} GB)"
  return (
    f"largest all-gather: {size:.3g} GB, MORE THAN ONE LAYER NEEDS ({limit:.3g} GB), on "
    f"{' x '.join(one['axes'])}, from {one['source']}"
  )


def _terms_table(record: Record) -> rich.table.Table:
  table = rich.table.Table(title=f"Least time of {_unit(record)}", min_width=48)
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
