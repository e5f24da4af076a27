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
import statistics
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from mgen_jax import cli
from mgen_jax import config as config_lib
from mgen_jax.data import ingest, media
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.data.prompts import camera_motion
from mgen_jax.diffusion import gaussian, samplers
from mgen_jax.encoders import Prompt
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks import GENERATORS, AutoencoderTask, Latte, TextToVideo, text_to_video
from mgen_jax.tasks.latte import DiffusionSamplerConfig
from mgen_jax.tasks.text_inputs import FeatureTextConfig
from mgen_jax.tasks.text_to_video import SamplerConfig
from mgen_jax.training import runner
from mgen_jax.training import state as state_lib
from mgen_jax.workdir import Workdir, last_trained

_BATCH = 32
_ASPECT_TOLERANCE = 0.03  # 16:9 asks for a bucket of 7:4 too
_SHEET_ROWS, _SHEET_COLUMNS = 24, 8
_SHEET_SIDE = 160  # pixels that small frames are enlarged to
_LABEL = 120  # characters of a prompt under its row
_NAME = 100  # and in a file name

Progress = Callable[[int, int], None]
AnySampler = SamplerConfig | DiffusionSamplerConfig
Reader = Callable[[Sequence[Prompt]], dict[str, np.ndarray]]


class Generator:
  """A trained generator with the autoencoder of its latents, on the devices of this host.

  Attributes:
    stage: that trained it.
    task, params: the generator and its averaged parameters.
    autoencoder, autoencoder_params: what decodes its latents.
    trained: the shapes it has learned, with their weights.
    fps: of the videos it has learned from.
    camera: its motion in what is drawn, one of `prompts.CAMERA_MOTIONS`; "": left to the model.
  """

  def __init__(
    self,
    stage: str,
    generator: tuple[TextToVideo | Latte, Any],
    autoencoder: tuple[AutoencoderTask, Any],
    latents: Mapping[str, Sequence[float]],
    mesh: jax.sharding.Mesh,
    *,
    trained: Mapping[Bucket, float],
    fps: float,
    reader: Reader,
  ):
    """See `load`; `reader` makes of prompts what the generator reads; `latents` holds "mean" and
    "std" of each channel, with which it was trained."""
    self.stage = stage
    self.task, self.params = generator
    self.autoencoder, self.autoencoder_params = autoencoder
    self.trained = dict(trained)
    self.fps = fps
    self.camera = ""
    self.mesh = mesh
    self._axis = text_to_video.sample_axis(mesh)
    self._read = reader
    self._mean = np.asarray(latents["mean"], np.float32)
    self._std = np.asarray(latents["std"], np.float32)
    self._programs: dict[tuple[Bucket, AnySampler], Callable] = {}

  @classmethod
  def load(
    cls,
    work: Workdir,
    stage: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    mesh: mesh_lib.MeshConfig | None = None,
  ) -> "Generator":
    """Reads what a run has trained.

    Args:
      work: of the run.
      stage: a train stage; the last finished one of text to video by default. One that is still
        being trained is read from its newest checkpoint.
      devices: of this process; all of them by default.
      mesh: over them; `sampling_mesh` by default.

    Raises:
      UserError: there is no such stage, no checkpoint that can be used, or a mesh that does not
        fit the devices.
    """
    name = last_trained(work, *GENERATORS) if stage is None else _named_stage(work, stage)
    devices = devices or jax.local_devices()
    if mesh is None:
      sampler = work.experiment.stages[name].task.sampler
      mesh = text_to_video.sampling_mesh(sampler, len(devices))
    mesh = mesh_lib.make_mesh(mesh, devices)
    with mesh_lib.use(mesh):
      task, params, meta = runner.load_trained(work, name, mesh)
      coder = config_lib.autoencoder_of(work.experiment, name)
      autoencoder, autoencoder_params, _ = runner.load_trained(work, coder, mesh)
    return cls(
      name,
      (task, params),
      (autoencoder, autoencoder_params),
      meta["latents"],
      mesh,
      trained=trained_buckets(work, name, meta["buckets"]),
      fps=frame_rate(work, name),
      reader=task.reader(mesh),
    )

  def generate(
    self,
    prompts: Sequence[str],
    bucket: Bucket,
    seeds: Sequence[int],
    sampler: AnySampler | None = None,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
  ) -> np.ndarray:
    """Draws one video for each prompt.

    A video depends on its prompt, its seed, the bucket and the sampler. Where it stands and what is
    drawn beside it do not matter; another batch size is another compiled program, whose rounding
    may differ in the last bits.

    Args:
      prompts: texts; what exceeds the text encoders' length is cut, "" is drawn without text.
      bucket: the shape, one the model was trained on.
      seeds: one for each prompt, 0 to 2^31 - 1.
      sampler: solver, steps and guidance; those of the stage's config by default.
      batch: videos drawn at a time, rounded up to a multiple of the devices; the last batch is
        filled up, so that one program serves all. By default all at once, but at most 32.
      progress: called with (videos drawn, videos in all).

    Returns:
      uint8 [N, T, H, W, 3].

    Raises:
      UserError: the sampler cannot be used, or the samples are not finite.
    """
    count, parts = len(prompts), self.mesh.shape["fsdp"]
    batch = min(count, _BATCH) if batch is None else batch
    if count != len(seeds) or min(count, batch) < 1:
      raise ValueError(f"{count} prompts, {len(seeds)} seeds, batches of {batch}")
    size = math.ceil(batch / parts) * parts
    sampler = self.task.config.sampler if sampler is None else sampler
    if (bucket, sampler) not in self._programs:
      self._programs[bucket, sampler] = self._compile(bucket, sampler)
    program = self._programs[bucket, sampler]
    text = self._read([self.prompt(text, bucket) for text in prompts])
    numbers = np.asarray(seeds, np.int32)
    videos = []
    for start in range(0, count, size):
      rows = np.minimum(np.arange(start, start + size), count - 1)
      video, finite = self._run(program, {k: x[rows] for k, x in text.items()}, numbers[rows])
      if not finite:
        raise UserError(
          f"samples of stage {self.stage} with guidance {sampler.guidance:g} are not finite: lower "
          "--guidance, or train the stage again with a smaller optimizer.lr."
        )
      videos.append(video[: count - start])
      if progress is not None:
        progress(min(start + size, count), count)
    return np.concatenate(videos)

  def prompt(self, text: str, bucket: Bucket) -> Prompt:
    """A prompt with what stands before it in training: a video's frame rate and camera motion."""
    return Prompt(text) if bucket.is_image else Prompt(text, self.fps, self.camera)

  def ask_camera(self, motion: str, bucket: Bucket) -> None:
    """Sets `camera`.

    Raises:
      UserError: an image has no motion, or the model does not read what stands before a caption.
    """
    if bucket.is_image:
      raise UserError(f"--camera={motion} is of videos: leave it, or ask for more --frames.")
    if not isinstance(self.task.config.text, FeatureTextConfig):
      raise UserError(
        f"--camera={motion} is of models that read features of text encoders: {self.stage} reads "
        "bytes or classes; write it into the prompt."
      )
    self.camera = motion

  def _compile(self, bucket: Bucket, sampler: AnySampler) -> Callable:
    """(parameters of both, text [B, ...], seeds [B]) -> uint8 [B, T, H, W, 3], all finite?"""

    def program(params, autoencoder_params, text, seeds):
      keys = jax.vmap(lambda seed: state_lib.stream_key(seed, "sample", 0))(seeds)
      latents = self.task.sample(params, text, keys, bucket, sampler=sampler)
      latents = latents * self._std + self._mean
      video = self.autoencoder.decode(autoencoder_params, latents, bucket.frames)
      return video, jnp.isfinite(latents).all()

    return jax.jit(program)

  def _run(self, program: Callable, text: dict[str, np.ndarray], seeds: np.ndarray) -> tuple:
    def put(x):
      axes = (self._axis,) + (None,) * (x.ndim - 1)
      return jax.device_put(x, rules.sharding(self.mesh, axes))

    with mesh_lib.use(self.mesh):
      text, seeds = jax.tree.map(put, (text, seeds))
      return jax.device_get(program(self.params, self.autoencoder_params, text, seeds))


def trained_buckets(work: Workdir, name: str, buckets: Sequence[str]) -> dict[Bucket, float]:
  """The buckets that the model of a stage has seen, with their weights there (1 if not known)."""
  stage = work.experiment.stages[name]
  while isinstance(stage, config_lib.AverageStage) and config_lib.own_models(stage):
    stage = work.experiment.stages[config_lib.own_models(stage)[0]]
  known = stage.batches() if isinstance(stage, config_lib.TrainStage) else {}
  seen = [parse_bucket(text) for text in buckets]
  return {bucket: known[bucket].weight if bucket in known else 1.0 for bucket in seen}


def frame_rate(work: Workdir, name: str) -> float:
  """Frames per second of the videos that a stage learns from (of several sets of data, those of the
  first by name; of that, the median; of a range of rates, the lowest)."""
  data = config_lib.data_of(work.experiment, config_lib.latents_of(work.experiment, name))
  if data.rate is not None:
    return data.rate[0] if isinstance(data.rate, tuple) else data.rate
  if data.videos is None:
    return data.marbles.fps
  latents = config_lib.latents_of(work.experiment, name)
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment, latents)))
  rates = [clip.fps for clip in index.clips if clip.kind == "video"]
  return statistics.median_low(rates) if rates else 1.0  # images only: nothing moves


def choose_bucket(
  trained: Mapping[Bucket, float], frames: int | None = None, aspect: str | None = None
) -> Bucket:
  """The shape with these frames and this aspect ratio that was trained most, a video if possible.

  Args:
    trained: weights of the shapes that the model was trained on.
    frames: how many; None for any.
    aspect: width to height, like "5:3"; None for any.

  Raises:
    UserError: there is none; names the nearest.
  """
  kept = [bucket for bucket in trained if frames is None or bucket.frames == frames]
  if not kept:
    nearest = min(trained, key=lambda bucket: abs(bucket.frames - frames))
    raise UserError(
      f"--frames={frames} is not a length that the model was trained on "
      f"({_shapes(trained)}): the nearest is --frames={nearest.frames}."
    )
  if aspect is not None:
    ratio = parse_aspect(aspect)
    distance = {bucket: abs(math.log(bucket.aspect / ratio)) for bucket in kept}
    kept = [bucket for bucket in kept if distance[bucket] <= _ASPECT_TOLERANCE]
    if not kept:
      nearest = min(distance, key=distance.__getitem__)
      with_frames = "" if frames is None else f" with --frames={frames}"
      raise UserError(
        f"--aspect={aspect}{with_frames} is not a shape that the model was trained on "
        f"({_shapes(trained)}): the nearest is --aspect={aspect_name(nearest)}."
      )
  return max(kept, key=lambda bucket: (not bucket.is_image, trained[bucket], bucket))


def parse_aspect(text: str) -> float:
  """Reads "5:3" as width over height; raises UserError for anything else."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)[:x/](\d+(?:\.\d+)?)", text.strip())
  if match is None or min(map(float, match.groups())) <= 0:
    raise UserError(f"--aspect={text} is not width:height: write it like 1:1 or 16:9.")
  return float(match.group(1)) / float(match.group(2))


def aspect_name(bucket: Bucket) -> str:
  """ "5:3"."""
  ratio = Fraction(bucket.width, bucket.height)
  return f"{ratio.numerator}:{ratio.denominator}"


def _shapes(trained: Mapping[Bucket, float]) -> str:
  named = [f"{bucket.frames} at {aspect_name(bucket)}" for bucket in sorted(trained)]
  return "frames and aspects: " + ", ".join(dict.fromkeys(named))


def _named_stage(work: Workdir, stage: str) -> str:
  """Checks that a stage of the run makes videos from text."""
  known = [
    name
    for name, config in work.experiment.stages.items()
    if isinstance(config, config_lib.TrainStage | config_lib.AverageStage)
    and config.task.name in GENERATORS
  ]
  if stage not in known:
    raise UserError(
      f"--stage={stage} is not a stage of {work.root} that makes videos from text: "
      f"{suggest(stage, known)}"
    )
  if work.done_record(stage) is None:
    logging.warning("stage %s is not finished: its newest checkpoint is sampled", stage)
  return stage


# --------------------------------------------------------------------------------------------------
# Files.


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

  videos = generator.generate(texts, bucket, seeds, sampler, progress=progress)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--out={out} cannot be made ({error.strerror}): name another folder."
    ) from error
  if generator.camera:
    texts = [f"{generator.camera}. {text}" for text in texts]
  paths = [
    write_sample(out, video, text, number, generator.fps)
    for video, text, number in zip(videos, texts, seeds, strict=True)
  ]
  sheet = out / f"{paths[0].stem}_sheet.png"
  labels = [f"{text or '(no text)'} [{n}]" for text, n in zip(texts, seeds, strict=True)]
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
  return f"seed{seed}_{slug}"


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
  made = dataclasses.replace(base, **given)
  if made.num_steps < 1:
    raise UserError(f"--num_steps={made.num_steps} is too few: use 1 or more, like 25.")
  if not (math.isfinite(made.guidance) and made.guidance >= 0):
    raise UserError(f"--guidance={made.guidance} cannot be used: use 0 or more, like 4.")
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
  if not prompts and _is_unconditional(work, values.stage):
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


def _is_unconditional(work: Workdir, stage: str | None) -> bool:
  """Whether the model to be sampled knows neither text nor classes."""
  name = last_trained(work, *GENERATORS) if stage is None else _named_stage(work, stage)
  task = work.experiment.stages[name].task
  return task.name == "latte" and task.condition == "none"


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
