"""What an experiment may say: the config of the data and of each kind of stage, with its defaults.

The configs of models and tasks stand beside their code; they meet here. Not here: the checks across
stages (see `checks.py`) and the machine that checks types and spelling (see `schema.py`).
"""

import dataclasses
from typing import Any, Literal

from mgen_jax import schema, tasks
from mgen_jax.data import shares
from mgen_jax.data.buckets import Bucket, Rate, parse_bucket
from mgen_jax.data.marbles import WorldConfig
from mgen_jax.encoders import StackConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.parallel.mesh import MeshConfig

_BATCH = 8  # of a bucket, where nothing says how many


@dataclasses.dataclass(frozen=True)
class MarblesConfig:
  """The clips that are rendered where no folder of videos is given (see data/marbles)."""

  clips: int = 1600
  sizes: tuple[tuple[int, int], ...] = ((64, 64), (48, 80))  # (height, width), in turn
  frames: tuple[int, ...] = (16, 24)  # in turn
  fps: float = 8.0
  sound: bool = True
  world: WorldConfig = WorldConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the media come from."""

  videos: str | None = None  # a folder with captions (README, "Your own videos"); None: Marbles
  marbles: MarblesConfig = MarblesConfig()
  held_out: float = 0.05  # share of the clips that no stage trains on
  fps: float | None = None  # sample clips at this rate; None: at their own
  # (low, high): a whole clip becomes the frames of its bucket, at a rate in this range; one that is
  # too long for that gives a window at the low rate. Movie Gen's Table 2: (16.0, 32.0).
  fps_range: tuple[float, float] | None = None
  max_crop: float = 0.2  # share of the picture that fitting a clip to a bucket may lose
  # Of tables and JSON files: the column or key of the caption; None: the first that is usual.
  caption_key: str | None = None

  def __post_init__(self):
    if self.fps_range is not None:
      if self.fps is not None:
        raise ConfigError("fps and fps_range are both set: unset one.")
      if not 0 < self.fps_range[0] <= self.fps_range[1]:
        raise ConfigError(f"fps_range is {self.fps_range}: give a lowest and a highest rate.")

  @property
  def rate(self) -> Rate:
    """Frames per second to sample clips at."""
    return self.fps if self.fps_range is None else self.fps_range


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with a clipped gradient and a schedule.

  The papers state learning rates (movie_gen 4.4) and neither betas, weight decay nor clipping:
  the defaults are what the field uses for transformers of this kind.
  """

  # "muon" orthogonalises the updates of matrices and leaves the rest to Adam.
  name: Literal["adamw", "muon"] = "adamw"
  lr: float = 1e-4  # peak learning rate
  muon_lr: float = 0.02  # of the matrices under muon, on the same schedule
  schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
  warmup_steps: int = 0  # linear, from 0
  end_factor: float = 0.0  # the schedule ends at lr * end_factor (cosine and linear)
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0  # decoupled; for matrices only (not norms, biases, tables of vectors)
  clip_norm: float = 1.0  # global norm of the gradient; 0 switches clipping off
  clip_from: int = 0  # the first step whose gradient is clipped

  def __post_init__(self):
    for name in (
      *("lr", "muon_lr", "warmup_steps", "end_factor", "eps", "weight_decay"),
      *("clip_norm", "clip_from"),
    ):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name} is {getattr(self, name)}: it cannot be negative.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}: it must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class BucketConfig:
  """How one bucket takes part in a stage."""

  batch: int = 0  # examples in one global batch; 0: what tokens_per_step holds, or 8 without it
  weight: float = 1.0  # its share of the steps is weight / sum of weights (see `mix`)


@dataclasses.dataclass(frozen=True)
class IngestStage:
  """Renders Marbles if asked to, probes all media, and writes the index of good clips."""

  kind: str = "ingest"
  workers: int = 0  # 0: one for each core


@dataclasses.dataclass(frozen=True)
class EncodeStage:
  """Turns media into cached latents, one ArrayRecord folder for each bucket."""

  kind: str = "encode"
  autoencoder: str = "autoencoder"  # the stage that trained it
  text: StackConfig = StackConfig()  # frozen encoders of the captions; no names: no text features
  buckets: tuple[str, ...] = ()
  batch: int = 16
  shard_examples: int = 512  # records of one file
  # Latents are multiplied by it when they are read (Stable Diffusion's: 0.18215). None: each
  # channel is brought to mean 0 and std 1.
  latent_scale: float | None = None
  # "moments": mean and log-variance of each latent; "sample": one draw from that normal.
  keep: Literal["moments", "sample"] = "moments"
  # What `python -m mgen_jax.encode` has written: taken as it is, if of the same autoencoder.
  folder: str | None = None

  def __post_init__(self):
    if self.latent_scale is not None and self.latent_scale <= 0:
      raise ConfigError(f"latent_scale is {self.latent_scale}: it must be more than 0.")
    if self.folder is not None and self.latent_scale is not None:
      raise ConfigError(
        "latent_scale and folder are both set: the latents in a folder keep the scale that they "
        "were written with, so give --latent_scale to the command that writes them."
      )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What becomes of a step whose loss or gradient is not finite, or is a spike.

  Such a step never changes the state. The examples of its batch are logged (docs/reliability.md).
  """

  # "skip": go on after it; "roll_back": go back to a checkpoint and on with the data after it.
  action: Literal["stop", "skip", "roll_back"] = "stop"
  # A loss or gradient norm so many robust standard deviations above the median of the last 128 good
  # steps is a spike; 0: only what is not finite is bad.
  spike: float = 0.0
  back: int = 0  # roll_back: to the newest checkpoint that is so many steps older
  most: int = 10  # skipped steps in a row, or roll-backs of the stage, that stop the run

  def __post_init__(self):
    for name in ("spike", "back", "most"):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name} is {getattr(self, name)}: it cannot be negative.")


@dataclasses.dataclass(frozen=True)
class TrainStage:
  """Trains a task for a number of steps."""

  kind: str = "train"
  task: Any = schema.one_of("name", lambda: tasks.CONFIGS)
  steps: int = 1000
  # By "b16x64x64": frames x height x width; the letter makes it a name that a flag can spell.
  buckets: dict[str, BucketConfig] = dataclasses.field(default_factory=dict)
  tokens_per_step: int = 0  # buckets whose batch is 0 get as large a one as this holds
  batch_multiple: int = 8  # and divisible by this: hosts x batch shards x accumulation passes
  # "weight": steps in proportion to the weights; "examples": to weight x examples / batch, so that
  # with equal weights every example is drawn equally often.
  mix: Literal["weight", "examples"] = "weight"
  images_to_videos: float | None = None  # steps on images for one on videos (paper: 0.1)
  # With fewer examples than a batch: refuse to start, repeat examples within a batch (and leave
  # empty buckets out), or leave the bucket out.
  small_buckets: Literal["error", "repeat", "leave_out"] = "error"
  images_from_videos: bool = True  # frames of videos fill image buckets as well
  latents: str | None = None  # the encode stage whose latents are read; None: media, decoded
  posterior: Literal["mean", "sample"] = "mean"  # of the autoencoder's distribution of latents
  init_from: str | None = None  # the stage whose averaged parameters this one starts from
  init_weights: str | None = None  # or a safetensors file of others (Latte: DiT, PixArt, Latte)
  optimizer: OptimizerConfig = OptimizerConfig()
  # Of parts of the parameters that are optimized apart, by top-level name ("discriminator").
  optimizers: dict[str, OptimizerConfig] = dataclasses.field(default_factory=dict)
  ema_decay: float = 0.999
  # Passes of batch / accumulate examples for each optimizer step; -1: as many as leave one example
  # to each shard of the batch, whatever the number of devices (the least memory).
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()
  log_every: int = 50
  validate_every: int = 0  # steps; 0: never
  validate_batches: int = 4  # for each bucket
  checkpoint_every: int = 500
  keep: int = 2  # checkpoints
  fall_back: bool = False  # go on from an older checkpoint where the newest one is damaged
  guard: GuardConfig = GuardConfig()
  threads: int = 4  # that read and decode, on each host
  workers: int = 0  # processes that read and decode, on each host; 0: threads only

  def __post_init__(self):
    if self.accumulate < 1 and self.accumulate != -1:
      raise ConfigError(f"accumulate is {self.accumulate}: it must be 1 or more, or -1.")
    for name in ("steps", "log_every", "checkpoint_every", "keep", "threads", "batch_multiple"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}: it must be 1 or more.")
    for name in ("workers", "tokens_per_step"):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name} is {getattr(self, name)}: it cannot be negative.")
    if self.images_to_videos is not None and self.images_to_videos <= 0:
      raise ConfigError(f"images_to_videos is {self.images_to_videos}: it must be above 0.")
    if not 0 <= self.ema_decay < 1:
      raise ConfigError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1).")

  def passes(self, examples: int, shards: int) -> int:
    """Passes over a batch of so many examples on so many shards of it."""
    return examples // shards if self.accumulate == -1 else self.accumulate

  def batches(self) -> dict[Bucket, BucketConfig]:
    """The buckets, parsed, in a fixed order, every batch a number.

    Raises:
      ConfigError: tokens_per_step does not hold a batch.
    """
    buckets = {parse_key(name): self.buckets[name] for name in sorted(self.buckets)}
    return {
      bucket: dataclasses.replace(entry, batch=entry.batch or self._batch(bucket))
      for bucket, entry in buckets.items()
    }

  def _batch(self, bucket: Bucket) -> int:
    if not self.tokens_per_step:
      return _BATCH
    tokens = tasks.make(self.task).tokens(bucket)
    try:
      return shares.batch_for(bucket, tokens, self.tokens_per_step, self.batch_multiple)
    except UserError as error:
      raise ConfigError(str(error)) from error


def parse_key(name: str) -> Bucket:
  """The bucket of a key like "b16x64x64".

  Raises:
    UserError: it is not one.
  """
  if not name.startswith("b"):
    raise ConfigError(f'its key must be "b" and frames x height x width: write "b{name}".')
  return parse_bucket(name[1:])


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
  """What a run is expected to reach; the report says whether it does. None: nothing expected."""

  colour: float | None = None  # share of the judged samples that are right, at least
  shape: float | None = None
  direction: float | None = None
  psnr: float | None = None  # dB of held-out clips, images and odd lengths, at least
  seconds: float | None = None  # of all stages, at most
  peak_memory_gib: float | None = None  # at most


@dataclasses.dataclass(frozen=True)
class EvaluateStage:
  """Samples held-out prompts, judges them, measures reconstruction, writes the report."""

  kind: str = "evaluate"
  generator: str = "t2v"  # the stage whose model is sampled
  bucket: str = "16x64x64"  # shape of the samples
  prompts: int = 96
  batch: int = 32
  clips: int = 48  # held-out clips for reconstruction
  show: int = 24  # samples in the report
  targets: TargetsConfig = TargetsConfig()


@dataclasses.dataclass(frozen=True)
class ReconstructStage:
  """Measures autoencoders on held-out clips, side by side."""

  kind: str = "reconstruct"
  autoencoders: tuple[str, ...] = ()  # the stages that trained them
  buckets: tuple[str, ...] = ()
  clips: int = 48  # held-out clips of each bucket, at most
  batch: int = 8
  lpips_weights: tuple[str, ...] = ()  # safetensors of VGG16 and LPIPS; none: LPIPS is left out


STAGES = {
  "ingest": IngestStage,
  "train": TrainStage,
  "encode": EncodeStage,
  "evaluate": EvaluateStage,
  "reconstruct": ReconstructStage,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A recipe of stages over one set of data."""

  name: str
  seed: int = 0
  recipe: tuple[str, ...] = ()  # the order of the stages (a ConfigDict sorts its keys)
  data: DataConfig = DataConfig()
  stages: dict[str, Any] = schema.one_of("kind", lambda: STAGES, each=True)
