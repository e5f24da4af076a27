"""What an experiment may say: the config of the data and of each kind of stage, with its defaults.

The configs of models and tasks stand beside their code; they meet here. Not here: how a stage is
optimized (see `recipes.py`), the checks across stages (see `checks.py`) and the machine that checks
types and spelling (see `schema.py`).
"""

import dataclasses
import re
from typing import Any, Literal

from mgen_jax import schema, tasks
from mgen_jax.config.recipes import LoraConfig, OptimizerConfig, PartConfig, check_changes
from mgen_jax.data import shares
from mgen_jax.data.buckets import Bucket, Rate, parse_bucket
from mgen_jax.data.marbles import WorldConfig
from mgen_jax.encoders import StackConfig
from mgen_jax.errors import ConfigError, UserError, check_ranges
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

  def __post_init__(self):
    check_ranges(self, positive=("clips", "sizes", "frames", "fps"))
    if not self.sizes or not self.frames:
      raise ConfigError("sizes and frames must name one or more each.")


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
  min_seconds: float | None = None  # videos shorter than this are left out; None: none are
  max_seconds: float | None = None  # and those of this length or more
  # Of tables and JSON files: the column or key of the caption; None: the first that is usual.
  caption_key: str | None = None

  def __post_init__(self):
    check_ranges(self, positive=("fps", "fps_range"), natural=("min_seconds",), share=("max_crop",))
    if not 0 <= self.held_out < 1:
      raise ConfigError(f"held_out is {self.held_out}: it must lie in [0, 1).")
    shortest = 0.0 if self.min_seconds is None else self.min_seconds
    if self.max_seconds is not None and self.max_seconds <= shortest:
      raise ConfigError(f"max_seconds is {self.max_seconds}: it must be above {shortest}.")
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
class BucketConfig:
  """How one bucket takes part in a stage."""

  batch: int = 0  # examples in one global batch; 0: what tokens_per_step holds, or 8 without it
  weight: float = 1.0  # its share of the steps is weight / sum of weights (see `mix`)


@dataclasses.dataclass(frozen=True)
class IngestStage:
  """Renders Marbles if asked to, probes all media, and writes the index of good clips."""

  kind: str = "ingest"
  dataset: str | None = None  # one of config.datasets; None: config.data
  workers: int = 0  # 0: one for each core

  def __post_init__(self):
    check_ranges(self, natural=("workers",))


@dataclasses.dataclass(frozen=True)
class EncodeStage:
  """Turns media into cached latents, one ArrayRecord folder for each bucket."""

  kind: str = "encode"
  ingest: str | None = None  # the stage whose index is read; None: the recipe's first
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
    check_ranges(self, positive=("batch", "shard_examples", "latent_scale"))
    if self.folder is not None and self.latent_scale is not None:
      raise ConfigError(
        "latent_scale and folder are both set: the latents in a folder keep the scale that they "
        "were written with, so give --latent_scale to the command that writes them."
      )


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
  """What is watched while a stage trains, beside the metrics that every stage writes."""

  strict_compiles: bool = False  # stop when something compiles after the warm-up
  profile_from: int = 0  # the first step, from 1, that JAX's profiler records; 0: none
  profile_steps: int = 3  # how many it records
  wandb: str | None = None  # also log to this project of Weights & Biases (the extra "wandb")

  def __post_init__(self):
    if self.profile_from < 0 or self.profile_steps < 1:
      raise ConfigError(
        f"profile_from is {self.profile_from} and profile_steps {self.profile_steps}: they must be "
        "0 or more, and 1 or more."
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
    check_ranges(self, natural=("spike", "back", "most"))


@dataclasses.dataclass(frozen=True)
class TrainStage:
  """Trains a task for a number of steps."""

  kind: str = "train"
  task: Any = schema.one_of("name", lambda: tasks.CONFIGS)
  steps: int = 1000
  # Of the order of its data, its noise and its times; None: the run's. Stages that are averaged
  # want each its own: drawn alike, their errors are alike, and stay in the average.
  seed: int | None = None
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
  # Several sets of data, each an encode stage (of media: an ingest stage), in place of `latents`.
  mixture: dict[str, PartConfig] = dataclasses.field(default_factory=dict)
  # ((step, factor), ...): from there on the batches are `factor` times those of `buckets`.
  batch_changes: tuple[tuple[int, float], ...] = ()
  posterior: Literal["mean", "sample"] = "mean"  # of the autoencoder's distribution of latents
  init_from: str | None = None  # the stage whose averaged parameters this one starts from
  # Or safetensors of others (Latte: DiT, PixArt, Latte): a file, a folder, or one converted.
  init_weights: str | None = None
  optimizer: OptimizerConfig = OptimizerConfig()
  # Of parts of the parameters that are optimized apart, by top-level name ("discriminator").
  optimizers: dict[str, OptimizerConfig] = dataclasses.field(default_factory=dict)
  # Parameters that keep their values: paths, as in the log of a start, * stands for anything and a
  # path stands for all that is below it.
  frozen: tuple[str, ...] = ()
  lora: LoraConfig = LoraConfig()
  # The moving average of the parameters, which is what is validated, sampled and started from:
  # "warmup" has decay min(ema_decay, (1 + step) / (10 + step)), "constant" ema_decay, "power"
  # (1 - 1 / (1 + step)) ** (1 + ema_gamma), a fixed share of the run (Karras et al., 2023); "off"
  # keeps none, and the parameters themselves are used.
  ema: Literal["warmup", "constant", "power", "off"] = "warmup"
  ema_decay: float = 0.999
  ema_gamma: float = 6.94
  # Passes of batch / accumulate examples for each optimizer step; -1: as many as leave one example
  # to each shard of the batch, whatever the number of devices (the least memory).
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()
  log_every: int = 50
  validate_every: int = 0  # steps; 0: never
  validate_batches: int = 4  # for each bucket
  # Times (noise levels) that validation looks at, evenly spaced, each on its share of the examples;
  # 0: times drawn as in training.
  validate_bins: int = 8
  checkpoint_every: int = 500
  keep: int = 2  # checkpoints
  fall_back: bool = False  # go on from an older checkpoint where the newest one is damaged
  guard: GuardConfig = GuardConfig()
  threads: int = 4  # that read and decode, on each host
  workers: int = 0  # processes that read and decode, on each host; 0: threads only
  observe: ObserveConfig = ObserveConfig()

  def __post_init__(self):
    if self.accumulate < 1 and self.accumulate != -1:
      raise ConfigError(f"accumulate is {self.accumulate}: it must be 1 or more, or -1.")
    check_ranges(
      self,
      positive=(
        *("steps", "log_every", "checkpoint_every", "keep", "threads", "batch_multiple"),
        *("images_to_videos", "validate_batches"),
      ),
      natural=("workers", "tokens_per_step", "ema_gamma", "validate_bins", "validate_every"),
    )
    _check_seed(self.seed)
    if not 0 <= self.ema_decay < 1:
      raise ConfigError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1).")
    check_changes("batch_changes", self.batch_changes)
    if self.latents is not None and self.mixture:
      raise ConfigError("latents and mixture are both set: name all sets of data in mixture.")
    if self.optimizer.schedule == "plateau" and not self.validate_every:
      raise ConfigError(
        'optimizer.schedule is "plateau" and validate_every is 0: the rate follows the validation '
        "loss, so set how often that is measured."
      )
    for name, optimizer in self.optimizers.items():
      if optimizer.schedule == "plateau":
        raise ConfigError(
          f'optimizers.{name}.schedule is "plateau": the plateau of `optimizer` lowers the rate of '
          "all parts."
        )
    if self.lora.rank and (self.frozen or self.optimizers):
      raise ConfigError(
        "lora is on, which trains its adapters only: leave frozen and optimizers empty."
      )
    for name, entry in self.buckets.items():
      batch = entry.batch or (self.batch_multiple if self.tokens_per_step else _BATCH)
      for step, factor in self.batch_changes:
        if batch * factor != round(batch * factor):
          raise ConfigError(
            f"batch_changes makes the batch of {name} {batch * factor:g} from step {step} on: it "
            "must be a whole number."
          )

  def seeded(self, seed: int) -> int:
    """The seed of what is drawn in training, in a run with this seed."""
    return seed if self.seed is None else self.seed

  def passes(self, examples: int, shards: int) -> int:
    """Passes over a batch of so many examples on so many shards of it."""
    return examples // shards if self.accumulate == -1 else self.accumulate

  def batches(self, step: int = 0) -> dict[Bucket, BucketConfig]:
    """The buckets, parsed, in a fixed order, with the batches of a step, every one a number.

    Raises:
      ConfigError: tokens_per_step does not hold a batch.
    """
    factor = ([1.0] + [f for first, f in self.batch_changes if first <= step])[-1]
    buckets = {parse_key(name): self.buckets[name] for name in sorted(self.buckets)}
    return {
      bucket: dataclasses.replace(entry, batch=round((entry.batch or self._batch(bucket)) * factor))
      for bucket, entry in buckets.items()
    }

  def at_step(self, step: int) -> "TrainStage":
    """The stage as if all of it were like this step: its batches as numbers, and no changes."""
    buckets = {f"b{bucket.name}": entry for bucket, entry in self.batches(step).items()}
    return dataclasses.replace(self, buckets=buckets, batch_changes=())

  def _batch(self, bucket: Bucket) -> int:
    if not self.tokens_per_step:
      return _BATCH
    tokens = tasks.make(self.task).tokens(bucket)
    try:
      return shares.batch_for(bucket, tokens, self.tokens_per_step, self.batch_multiple)
    except UserError as error:
      raise ConfigError(str(error)) from error

  def parts(self) -> dict[str, PartConfig]:
    """The sets of data by stage; {} for media of the recipe's first ingest stage."""
    return dict(self.mixture) or ({} if self.latents is None else {self.latents: PartConfig()})

  def phases(self) -> tuple[int, ...]:
    """The steps at which batches or sets of data change, from 0 on."""
    steps = {0, *(step for step, _ in self.batch_changes)}
    for part in self.parts().values():
      steps |= {part.from_step} | ({part.until_step} - {None})
    return tuple(sorted(step for step in steps if step == 0 or step < self.steps))


def _check_seed(seed: int | None) -> None:
  """Raises ConfigError for a seed that keys of 32 bits cannot tell from another one."""
  if seed is not None and not 0 <= seed < 2**32:
    raise ConfigError(f"seed is {seed}: it must lie in [0, 2^32).")


def parse_key(name: str) -> Bucket:
  """The bucket of a key like "b16x64x64".

  Raises:
    UserError: it is not one.
  """
  if not name.startswith("b"):
    raise ConfigError(f'its key must be "b" and frames x height x width: write "b{name}".')
  return parse_bucket(name[1:])


@dataclasses.dataclass(frozen=True)
class AverageStage:
  """One model out of the averaged parameters of several (movie_gen 6.4), or of one.

  It is used like a train stage: sampled, started from, evaluated, encoded with. With one model of
  another run it is how an experiment takes over what that run has trained.
  """

  kind: str = "average"
  task: Any = schema.one_of("name", lambda: tasks.CONFIGS)  # that all of them have learned
  # Stages of this recipe, or folders of stages of other runs (with a slash: runs/quickstart/t2v).
  of: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()  # of each; none: all the same
  # "greedy": from the best one on, each next one is taken into the (unweighted) average if the
  # validation loss does not rise (Wortsman et al., 2022).
  method: Literal["weighted", "greedy"] = "weighted"
  validation: str | None = None  # greedy: the train stage whose held-out data and times are used
  latents: str | None = None  # the encode stage of its latents; None: as the first stage in `of`

  def __post_init__(self):
    if not self.of:
      raise ConfigError("of is empty: name the stages to average, or folders of them.")
    if self.weights and len(self.weights) != len(self.of):
      raise ConfigError(f"weights has {len(self.weights)} entries for {len(self.of)} models in of.")
    if self.weights and not sum(self.weights) > 0:
      raise ConfigError(f"weights sum to {sum(self.weights):g}: the sum must be more than 0.")
    if self.weights and self.method == "greedy":
      raise ConfigError('weights are set and method is "greedy", which has none: unset one.')
    if self.method == "greedy" and self.validation is None:
      raise ConfigError('method is "greedy": name the train stage whose held-out data is used.')


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
  """What a run is expected to reach; the report says whether it does. None: nothing expected."""

  colour: float | None = None  # share of the judged samples that are right, at least
  shape: float | None = None
  direction: float | None = None
  # Share of samples that show a colour, a shape and a direction of the world, whatever was asked:
  # of models without condition, at least.
  of_world: float | None = None
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

  def __post_init__(self):
    check_ranges(self, positive=("prompts", "batch", "clips"), natural=("show",))


@dataclasses.dataclass(frozen=True)
class ReconstructStage:
  """Measures autoencoders on held-out clips, side by side."""

  kind: str = "reconstruct"
  autoencoders: tuple[str, ...] = ()  # the stages that trained them
  buckets: tuple[str, ...] = ()
  clips: int = 48  # held-out clips of each bucket, at most
  batch: int = 8
  lpips_weights: tuple[str, ...] = ()  # safetensors of VGG16 and LPIPS; none: LPIPS is left out

  def __post_init__(self):
    check_ranges(self, positive=("clips", "batch"))


STAGES = {
  "ingest": IngestStage,
  "train": TrainStage,
  "average": AverageStage,
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
  datasets: dict[str, DataConfig] = dataclasses.field(default_factory=dict)  # further ones, by name
  stages: dict[str, Any] = schema.one_of("kind", lambda: STAGES, each=True)

  def __post_init__(self):
    if not re.fullmatch(r"\w[\w.+-]*", self.name):  # it names a folder below runs/
      raise ConfigError(f"name is {self.name!r}: use letters, digits, _, -, + and dots within.")
    _check_seed(self.seed)
