"""The report of a run: one HTML file that opens offline, and nothing that it has to fetch.

This file only shows: it is given figures, videos and the metrics of stages as plain values, and
gives them form. What is measured, and on what, is decided in `mgen_jax/evaluate.py`.
"""

import base64
import dataclasses
import html
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib import figure

from mgen_jax.data import media
from mgen_jax.data.files import write_text_atomic

_TEMPLATE = "report.html.jinja"
_SIZE_LIMIT = 4_000_000  # bytes of media in one report: beyond it samples are left out
_SMALL = 128  # pixels: smaller frames are doubled, so that each keeps its own colour in 4:2:0
_CURVE_POINTS = 400
_INK = "#010203"  # stands for the colour of the text, whichever mode the reader is in


@dataclasses.dataclass(frozen=True)
class Figure:
  """A headline: what, how much, and whether that is enough."""

  name: str
  value: str
  note: str = ""
  target: str = ""
  reached: bool | None = None  # None: there is no target


@dataclasses.dataclass(frozen=True)
class Medium:
  """A video or an image, ready to be embedded."""

  kind: str  # "video" or "image"
  uri: str
  width: int  # of the picture itself, before it is enlarged for the page
  height: int


@dataclasses.dataclass(frozen=True)
class Sample:
  """A generated video with its prompt; `checks`: (attribute, wanted, seen, right or None)."""

  prompt: str
  seed: int
  medium: Medium
  checks: Sequence[tuple[str, str | None, str | None, bool | None]] = ()


@dataclasses.dataclass(frozen=True)
class Pair:
  """An original with its reconstruction at its right, in one picture."""

  title: str
  note: str
  medium: Medium


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of the run; `lines`: of its metrics, as `training.metrics` writes them."""

  name: str
  kind: str
  seconds: float | None
  steps: int | None = None
  lines: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Content:
  """All that the report shows; tables are rows of texts."""

  name: str
  made: str  # when and where
  figures: Sequence[Figure]
  samples: Sequence[Sample]
  samples_note: str
  pairs: Sequence[Pair]
  pairs_note: str
  stages: Sequence[Stage]
  data: Sequence[tuple[str, str]]
  skipped: Sequence[tuple[str, str]]  # (file, reason)
  buckets: Sequence[tuple[str, int, int]]  # (bucket, examples to train on, held out)
  versions: Sequence[tuple[str, str]]
  command: str
  config: str


def write(path: Path, content: Content) -> int:
  """Writes the report, whole or not at all.

  Returns:
    How many of the samples are in it; those beyond a few megabytes are left out, with a note.

  Raises:
    UserError: the file cannot be written.
  """
  page, shown = render(content)
  write_text_atomic(path, page)
  return shown


def render(content: Content) -> tuple[str, int]:
  """The page, and how many of the samples are in it."""
  shown = _that_fit(content.samples, [pair.medium for pair in content.pairs])
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("mgen_jax.evaluation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template(_TEMPLATE).render(
    content=content,
    samples=shown,
    left_out=len(content.samples) - len(shown),
    curves=[(stage.name, curve) for stage in content.stages if (curve := loss_curve(stage))],
    stages=_without_empty([stage_row(stage) for stage in content.stages]),
  )
  return page, len(shown)


def medium(video: np.ndarray, fps: float) -> Medium:
  """Embeds uint8 [T, H, W, 3]: a PNG if it has one frame, else an H.264 mp4."""
  frames, height, width = video.shape[:3]
  if max(height, width) <= _SMALL:
    video = video.repeat(2, axis=1).repeat(2, axis=2)
  if frames > 1:
    data, kind, mime = media.encode_video(video, fps), "video", "video/mp4"
  else:
    data, kind, mime = _png(video[0]), "image", "image/png"
  uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
  return Medium(kind, uri, width, height)


def beside(original: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Two videos [T, H, W, 3] in one picture, a grey line between them: they play in step."""
  gap = np.full((*original.shape[:2], 2, 3), 128, np.uint8)
  return np.concatenate([original, gap, made], axis=2)


def loss_curve(stage: Stage) -> str | None:
  """The training loss of a stage (raw and smoothed) and its validation loss, as inline SVG."""
  train = _series(stage.lines, "loss")
  validation = _series(stage.lines, "validation_loss")
  if not len(train) and not len(validation):
    return None
  # Text stays text, and ids are the stage's own: several figures share one page.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stage.name}):
    canvas = figure.Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = canvas.add_subplot()
    for values, look in (
      (train, {"color": "#4c8bf5", "linewidth": 0.8, "alpha": 0.45}),
      (_smooth(train), {"color": "#4c8bf5", "linewidth": 1.8, "label": "training"}),
      (validation, {"color": "#e8710a", "marker": "o", "markersize": 3.5, "label": "held out"}),
    ):
      if len(values):
        axes.plot(values[:, 0], values[:, 1], **look)
    every = np.concatenate([values[:, 1] for values in (train, validation) if len(values)])
    if every.min() > 0 and every.max() > 10 * every.min():
      axes.set_yscale("log")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(True, color=_INK, alpha=0.12)
    axes.legend(frameon=False, labelcolor=_INK)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
  return _inline(buffer.getvalue(), f"loss of stage {stage.name}")


def stage_row(stage: Stage) -> dict[str, str]:
  """The cells of a stage in the table, as texts; "" for what it does not have."""

  def of(name: str, form: str, combine=np.median) -> str:
    values = [line[name] for line in stage.lines if line.get(name) is not None]
    return form.format(float(combine(values))) if values else ""

  return {
    "stage": stage.name,
    "kind": stage.kind,
    "time": duration(stage.seconds) if stage.seconds is not None else "",
    "steps": f"{stage.steps:,}" if stage.steps else "",
    "loss": of("loss", "{:.4g}", lambda values: values[-1]),
    "held-out loss": of("validation_loss", "{:.4g}", lambda values: values[-1]),
    "examples/s": of("examples_per_second", "{:,.1f}"),
    "tokens/s": of("tokens_per_second", "{:,.0f}"),
    "MFU": of("mfu", "{:.1%}"),
    "data wait": of("data_wait", "{:.0%}", np.mean),
    "compiling": of("compile_seconds", "{:.0f} s", np.sum),
    "peak memory": of("peak_memory_gib", "{:.1f} GiB", np.max),
  }


def _without_empty(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
  """Leaves out columns that say nothing in any row."""
  kept = [head for head in rows[0] if any(row[head] for row in rows)]
  return [{head: row[head] for head in kept} for row in rows]


def duration(seconds: float) -> str:
  """ "8 min 20 s"."""
  if seconds < 60:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _that_fit(samples: Sequence[Sample], before: Sequence[Medium]) -> list[Sample]:
  """The first samples, as many as the page should carry."""
  size, kept = sum(len(item.uri) for item in before), []
  for sample in samples:
    size += len(sample.medium.uri)
    if size > _SIZE_LIMIT:
      break
    kept.append(sample)
  return kept


def _png(image: np.ndarray) -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "image.png"
    media.write_image(path, image)
    return path.read_bytes()


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
  """(step, value) [n, 2] of a metric, thinned out where a curve would not show more."""
  points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
  points = points[:: max(1, len(points) // _CURVE_POINTS)]
  return np.asarray(points, np.float64).reshape(-1, 2)


def _smooth(points: np.ndarray) -> np.ndarray:
  """A running mean over a tenth of the curve, over what there is of it at the ends."""
  half = len(points) // 20
  means = [points[max(0, i - half) : i + half + 1, 1].mean() for i in range(len(points))]
  return np.stack([points[:, 0], means], axis=1) if len(points) else points


def _inline(svg: str, title: str) -> str:
  """An SVG file as an element of a page, in the colour of its text."""
  element = svg[svg.index("<svg") :].replace(_INK, "currentColor")
  head, body = element.split(">", 1)
  words = [word for word in head.split() if not word.startswith(("xmlns", "width=", "height="))]
  return f'{" ".join(words)} role="img" aria-label="{html.escape(title)}">{body}'
