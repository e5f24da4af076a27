"""A trained generator, ready to draw: it is found in a run, its shapes and rates are known.

Not here: the command, flags and files (`sample.py`), and what judges the samples (`evaluate.py`).
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mgen_jax import config as config_lib
from mgen_jax.data import ingest
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.encoders import Prompt
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks import GENERATORS, AutoencoderTask, Latte, TextToVideo, text_to_video
from mgen_jax.tasks.latte import DiffusionSamplerConfig, LatteTaskConfig
from mgen_jax.tasks.text_inputs import FeatureTextConfig
from mgen_jax.tasks.text_to_video import SamplerConfig
from mgen_jax.training import runner
from mgen_jax.training import state as state_lib
from mgen_jax.workdir import Workdir, last_trained

_BATCH = 32
_ASPECT_TOLERANCE = 0.03  # 16:9 asks for a bucket of 7:4 too

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
    name = stage_of(work, stage)
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

  @property
  def unconditional(self) -> bool:
    """Whether it knows neither text nor classes: its only prompt is ""."""
    config = self.task.config
    return isinstance(config, LatteTaskConfig) and config.condition == "none"

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


def stage_of(work: Workdir, stage: str | None = None) -> str:
  """The stage of a run that is to draw: the one that is named, or the last finished one.

  Raises:
    UserError: there is no such stage, or it makes no videos.
  """
  if stage is None:
    return last_trained(work, *GENERATORS)
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
