"""Makes videos (or images) from text with a model that a run has trained.

  python -m mgen_jax.sample --workdir=runs/quickstart --prompt="a large red circle moves left"
  python -m mgen_jax.sample --workdir=runs/quickstart --prompt="a large blue star moves up" \\
      --prompt="a small green cross moves right" --samples=3 --seed=7
  python -m mgen_jax.sample --workdir=runs/quickstart --prompts_file=prompts.txt --aspect=5:3 \\
      --frames=24 --sampler=midpoint --num_steps=25 --guidance=4 --out=my_samples
  python -m mgen_jax.sample --workdir=runs/quickstart --prompt="a large red square" --frames=1
  python -m mgen_jax.sample --workdir=runs/latte_marbles --class="red circle moves left"

Writes one H.264 mp4 for each sample (a PNG where there is one frame) and one contact sheet, prints
their paths, and replaces files of the same name. The same seed, prompt and options make the same
video, whatever else is drawn beside it. An empty --prompt="" draws without text.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags, logging

from mgen_jax import cli
from mgen_jax.data import files, media
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.prompts import camera_motion
from mgen_jax.diffusion import gaussian, samplers
from mgen_jax.errors import UserError
from mgen_jax.generator import AnySampler, Generator, choose_bucket, parse_aspect, stage_of
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.latte import DiffusionSamplerConfig
from mgen_jax.tasks.text_to_video import SamplerConfig
from mgen_jax.workdir import Workdir

_SHEET_ROWS, _SHEET_COLUMNS = 24, 8
_SHEET_SIDE = 160  # pixels that small frames are enlarged to
_LABEL = 120  # characters of a prompt under its row
_NAME = 100  # and in a file name


class Drawn(NamedTuple):
  """What `draw` has written."""

  samples: list[Path]
  sheet: Path


def draw(
  generator: Generator,
  prompts: Sequence[str],
  out: Path,
  *,
  bucket: Bucket,
  sampler: AnySampler | None = None,
  seed: int = 0,
  samples: int = 1,
) -> Drawn:
  """Draws `samples` videos for each prompt, with seeds from `seed` on, and writes them to `out`.

  Raises:
    UserError: they cannot be drawn or written.
  """
  for prompt in prompts:
    for words in generator.task.too_long(generator.prompt(prompt, bucket)):
      logging.warning("%s of the prompt %r", words, prompt[:60])
  texts = [prompt for prompt in prompts for _ in range(samples)]
  seeds = [seed + number for _ in prompts for number in range(samples)]

  def progress(done: int, total: int) -> None:
    if total > done:
      logging.info("%d of %d", done, total)

  files.make_folder(out, f"--out={out}")
  videos = generator.generate(texts, bucket, seeds, sampler, progress=progress)
  if generator.camera:
    texts = [f"{generator.camera}. {text}" for text in texts]
  paths = [
    write_sample(out, video, text, number, generator.fps)
    for video, text, number in zip(videos, texts, seeds, strict=True)
  ]
  sheet = out / f"{paths[0].stem}_sheet.png"
  unnamed = "seed" if generator.unconditional else "(no text)"
  labels = [f"{text or unnamed} [{n}]" for text, n in zip(texts, seeds, strict=True)]
  media.write_image(sheet, _sheet(videos[:_SHEET_ROWS], labels[:_SHEET_ROWS]))
  return Drawn(paths, sheet)


def write_sample(folder: Path, video: np.ndarray, prompt: str, seed: int, fps: float) -> Path:
  """Writes one sample as mp4, or as PNG if it has one frame; the name tells seed and prompt."""
  path = folder / f"{file_stem(prompt, seed)}{'.png' if len(video) == 1 else '.mp4'}"
  if len(video) == 1:
    media.write_image(path, video[0])
  else:
    media.write_video(path, video, fps)
  return path


def file_stem(prompt: str, seed: int) -> str:
  """A file name of plain letters; prompts that differ get names that differ."""
  slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
  if slug.replace("-", " ") != prompt or len(slug) > _NAME:  # the slug does not say it all
    digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:6]
    slug = f"{slug[:_NAME].rstrip('-') or 'prompt'}-{digest}"
  return f"seed{seed}_{slug}" if slug else f"seed{seed}"


def _sheet(videos: np.ndarray, labels: Sequence[str]) -> np.ndarray:
  """Evenly spaced frames of each video in a row, the label below the first; images in a grid."""
  labels = [label if len(label) <= _LABEL else label[: _LABEL - 3] + "..." for label in labels]
  scale = max(1, round(_SHEET_SIDE / max(videos.shape[2:4])))
  length = videos.shape[1]
  if length == 1:
    return media.contact_sheet(videos[:, 0], columns=6, labels=labels, scale=scale)
  columns = min(length, _SHEET_COLUMNS)
  times = np.linspace(0, length - 1, columns).round().astype(int)
  cells = videos[:, times].reshape(-1, *videos.shape[2:])
  texts = [text for label in labels for text in [label] + [""] * (columns - 1)]
  return media.contact_sheet(cells, columns=columns, labels=texts, scale=scale)


# --------------------------------------------------------------------------------------------------
# The command.


def define_sampler_flags(values: flags.FlagValues) -> None:
  """The flags that `sampler_from_flags` reads; where they are not given, the stage's config."""
  to = {"flag_values": values}
  flags.DEFINE_integer("num_steps", None, "Solver steps: more are slower and finer.", **to)
  flags.DEFINE_float("guidance", None, "How strongly to follow the text; 1: not helped.", **to)
  solvers = [*samplers.SOLVERS, *gaussian.SAMPLERS]
  flags.DEFINE_enum("sampler", None, solvers, "Solver; the last three are those of Latte.", **to)
  flags.DEFINE_enum("grid", None, ["linear", "quadratic", "linear_quadratic"], "Times.", **to)


def sampler_from_flags(values: flags.FlagValues, base: AnySampler) -> AnySampler:
  """`base` with what the flags change.

  Raises:
    UserError: a value that cannot be used.
  """
  given = {
    key: values[flag].value
    for key, flag in (
      ("num_steps", "num_steps"),
      ("guidance", "guidance"),
      ("method", "sampler"),
      ("grid", "grid"),
    )
    if values[flag].value is not None
  }
  if isinstance(base, DiffusionSamplerConfig) and "grid" in given:
    raise UserError("--grid is of flow matching, and this model is sampled by diffusion: leave it.")
  steps, guidance = given.get("num_steps", 1), given.get("guidance", 0.0)
  if steps < 1:
    raise UserError(f"--num_steps={steps} is too few: use 1 or more, like 25.")
  if not (math.isfinite(guidance) and guidance >= 0):
    raise UserError(f"--guidance={guidance} cannot be used: use 0 or more, like 4.")
  made = dataclasses.replace(base, **given)
  if isinstance(made, DiffusionSamplerConfig):
    return made
  # The grid stands for at least as many linear steps as it has of its own.
  return dataclasses.replace(made, linear_steps=max(made.linear_steps, made.num_steps))


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command (not at import: other commands have flags of the same names)."""
  to = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "Folder of the run, like runs/quickstart.", **to)
  flags.DEFINE_multi_string("prompt", [], "What to show; repeat the flag for several.", **to)
  flags.DEFINE_multi_string("class", [], "Name of a class, for a model of classes.", **to)
  flags.DEFINE_string("prompts_file", None, "A text file with one prompt on each line.", **to)
  flags.DEFINE_string("stage", None, "Default: the last stage that was trained.", **to)
  flags.DEFINE_string("out", None, "Folder to write to; default: WORKDIR/samples.", **to)
  flags.DEFINE_integer("seed", 0, "Which noise to start from, 0 to 2^31 - 1.", **to)
  flags.DEFINE_integer("samples", 1, "For each prompt, with seeds from --seed on.", **to)
  flags.DEFINE_string("aspect", None, "Width:height, like 5:3, one that was trained.", **to)
  flags.DEFINE_integer("frames", None, "Length, one that was trained; 1: an image.", **to)
  flags.DEFINE_float("fps", None, "Frames per second to draw at; default: the data's.", 0.0, **to)
  flags.DEFINE_string("camera", None, "Its motion, like 'zoom in', one of 16.", **to)
  flags.DEFINE_string("mesh", None, "Like context=4,tensor=2; default: a sample a device.", **to)
  define_sampler_flags(values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Reads the flags, draws, and prints the paths."""
  del argv
  if values.workdir is None:
    raise UserError("--workdir is missing: name the folder of a run, like runs/quickstart.")
  prompts = [*values.prompt, *values["class"].value, *_prompts_of_file(values.prompts_file)]
  work = Workdir.open(values.workdir)
  if values["class"].value and _condition(work, values.stage) != "class":
    raise UserError(
      f"--class={values['class'].value[0]} is of a model of classes, and this one has none: use "
      "--prompt."
    )
  if not prompts and _condition(work, values.stage) == "none":
    prompts = [""]
  if not prompts:
    raise UserError(
      'no prompt is given: add --prompt="..." or --prompts_file=FILE, or --class=NAME for a model '
      "of classes."
    )
  if values.samples < 1:
    raise UserError(f"--samples={values.samples} is too few: use 1 or more.")
  if not 0 <= values.seed <= 2**31 - values.samples:
    raise UserError(f"--seed={values.seed} cannot be used: use a number from 0 to 2147483647.")
  if values.fps is not None and not 0 < values.fps < math.inf:
    raise UserError(f"--fps={values.fps} cannot be used: use a rate above 0, like 16.")
  if values.aspect is not None:
    parse_aspect(values.aspect)
  camera = None if values.camera is None else camera_motion(values.camera, "--camera")
  sampler_from_flags(values, SamplerConfig())  # faults before the model is read
  mesh = None if values.mesh is None else mesh_lib.parse(values.mesh)
  generator = Generator.load(work, values.stage, mesh=mesh)
  generator.fps = values.fps or generator.fps
  bucket = choose_bucket(generator.trained, values.frames, values.aspect)
  if camera is not None:
    generator.ask_camera(camera, bucket)
  sampler = sampler_from_flags(values, generator.task.config.sampler)
  logging.info(
    "drawing %d of %d frames of %dx%d (width x height) from stage %s: %d %s steps, guidance %g",
    *(len(prompts) * values.samples, bucket.frames, bucket.width, bucket.height, generator.stage),
    *(sampler.num_steps, sampler.method, sampler.guidance),
  )
  drawn = draw(
    generator,
    prompts,
    Path(values.out) if values.out else work.root / "samples",
    bucket=bucket,
    sampler=sampler,
    seed=values.seed,
    samples=values.samples,
  )
  for path in [*drawn.samples, drawn.sheet]:
    print(path)


def _condition(work: Workdir, stage: str | None) -> str:
  """What the model to be sampled is told: "class", "text" or "none"."""
  task = work.experiment.stages[stage_of(work, stage)].task
  return task.condition if task.name == "latte" else "text"


def _prompts_of_file(path: str | None) -> list[str]:
  """The lines of a file that are not empty."""
  if path is None:
    return []
  try:
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"--prompts_file={path} cannot be read ({error}): name a UTF-8 text file."
    ) from error
  prompts = [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise UserError(f"--prompts_file={path} is empty: write one prompt on each line.")
  return prompts


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
