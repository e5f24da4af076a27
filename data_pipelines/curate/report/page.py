"""From the summary of a run and its pictures to one HTML file that fetches nothing.

Not here: counting (`funnel`), decoding (`pictures`).
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from data_pipelines.curate import decode, funnel
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.report import pictures
from data_pipelines.curate.store import write_text

_TEMPLATE = "page.html.jinja"
HTML_NAME = "report.html"
JSON_NAME = "report.json"


def write(
  folder: Path,
  name: str,
  recipe: Recipe,
  table: pa.Table,
  costs: Mapping[str, Any],
  input_root: Path,
  limits: decode.Limits,
) -> dict[str, Any]:
  """Writes both files; returns what the JSON holds.

  Raises UserError if the folder cannot be written.
  """
  found = funnel.summary(name, recipe, table, costs)
  with pictures.Pictures(str(input_root), table, limits) as made:
    shown = pictures.at_thresholds(recipe, table, made)
    pairs = pictures.duplicates(table, made)
  write_text(folder / JSON_NAME, json.dumps(found, indent=2, default=list) + "\n")
  write_text(folder / HTML_NAME, render(found, shown, pairs))
  return found


def render(found: Mapping[str, Any], shown=(), pairs=()) -> str:
  """The page."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  histograms = [h | {"svg": histogram_svg(h)} for h in found["histograms"]]
  total = sum(stage["cpu_s"] for stage in found["costs"]["stages"].values())
  total += found["costs"]["decode_cpu_s"]
  return environment.get_template(_TEMPLATE).render(
    run=found, histograms=histograms, shown=shown, pairs=pairs, cpu_total=total
  )


def histogram_svg(found: Mapping[str, Any]) -> str:
  """Bars of what is kept below those of what is rejected, and a line at each threshold."""
  width, height, base = 320.0, 96.0, 78.0
  kept, rejected, edges = found["kept"], found["rejected"], found["edges"]
  top = max(1, *(a + b for a, b in zip(kept, rejected, strict=True)))
  step = width / len(kept)
  parts = []
  for number, (good, bad) in enumerate(zip(kept, rejected, strict=True)):
    x, low = number * step, base
    for count, kind in ((good, "good"), (bad, "bad")):
      tall = 70.0 * count / top
      if count:
        tall = max(tall, 1.0)
        parts.append(
          f'<rect class="{kind}" x="{x:.1f}" y="{low - tall:.1f}" width="{step - 1:.1f}"'
          f' height="{tall:.1f}"/>'
        )
      low -= tall
  span = edges[-1] - edges[0]
  for bound in found["bounds"]:
    x = width * (bound - edges[0]) / span
    parts.append(f'<line x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{base}"/>')
  parts.append(f'<text x="0" y="{height - 4}">{edges[0]:.3g}</text>')
  parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">{edges[-1]:.3g}</text>')
  label = html.escape(f"{found['column']}, {found['threshold']}")
  return (
    f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
    f"{''.join(parts)}</svg>"
  )
