"""The experiment schema: every allowed key, its default, and the checks across keys.

An experiment file returns `experiment(name=..., data=..., stages=...)`: nested dicts with the keys
that matter, in, a complete ConfigDict, out. `resolve` turns that (after overrides by flags) into
frozen dataclasses. The configs of models and tasks stand beside their code; they meet here.
Not here: the machine that checks types and spelling (see `schema.py`).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ml_collections import config_dict

from mgen_jax import schema, tasks
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.data.marbles import WorldConfig
from mgen_jax.encoders import StackConfig
from mgen_jax.encoders import sizes as encoder_sizes
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import backbone as backbone_lib
from mgen_jax.models import latte as latte_lib
from mgen_jax.parallel.mesh import MeshConfig


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
  max_crop: float = 0.2  # share of the picture that fitting a clip to a bucket may lose


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

  batch: int = 8  # examples in one global batch
  weight: float = 1.0  # its share of the steps is weight / sum of weights


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
class TrainStage:
  """Trains a task for a number of steps."""

  kind: str = "train"
  task: Any = schema.one_of("name", lambda: tasks.CONFIGS)
  steps: int = 1000
  # By "b16x64x64": frames x height x width; the letter makes it a name that a flag can spell.
  buckets: dict[str, BucketConfig] = dataclasses.field(default_factory=dict)
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
  threads: int = 4  # that read and decode, on each host
  workers: int = 0  # processes that read and decode, on each host; 0: threads only

  def __post_init__(self):
    if self.accumulate < 1 and self.accumulate != -1:
      raise ConfigError(f"accumulate is {self.accumulate}: it must be 1 or more, or -1.")
    for name in ("steps", "log_every", "checkpoint_every", "keep", "threads"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}: it must be 1 or more.")
    if not 0 <= self.ema_decay < 1:
      raise ConfigError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1).")

  def passes(self, examples: int, shards: int) -> int:
    """Passes over a batch of so many examples on so many shards of it."""
    return examples // shards if self.accumulate == -1 else self.accumulate

  def batches(self) -> dict[Bucket, BucketConfig]:
    """The buckets, parsed, in a fixed order."""
    return {parse_key(name): self.buckets[name] for name in sorted(self.buckets)}


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


def backbone(size: str, *, dit: bool = False, **changes: Any) -> dict[str, Any]:
  """The "model" of a generator: a named size of the backbone, every key written out.

  Args:
    size: "30B", "17B", "9B", "7B", "5B", "1B" or "toy".
    dit: the DiT arm of the paper's ablation instead of the LLaMa3-like one.
    **changes: keys of BackboneConfig that differ.

  Raises:
    ConfigError: there is no such size.
  """
  if size not in backbone_lib.SIZES:
    raise ConfigError(f"unknown size {size!r}: {schema.suggest(size, list(backbone_lib.SIZES))}")
  model = backbone_lib.SIZES[size]
  model = backbone_lib.dit_arm(model) if dit else model
  return {**schema.to_plain(model), **changes}


def latte(size: str, *, variant: int = 1, **changes: Any) -> dict[str, Any]:
  """The "model" of a Latte: a named size, every key written out.

  Args:
    size: "S/2" to "XL/8".
    variant: 1 to 4; 3 has fewer layers, so that all have about as many parameters.
    **changes: keys of LatteConfig that differ.

  Raises:
    ConfigError: there is no such size.
  """
  if size not in latte_lib.SIZES:
    raise ConfigError(f"unknown size {size!r}: {schema.suggest(size, list(latte_lib.SIZES))}")
  return schema.to_plain(latte_lib.size(size, variant=variant, **changes))


def text_stack(**changes: Any) -> dict[str, Any]:
  """The "text" of a generator: Movie Gen's three frozen encoders, their features cached.

  The paper gives the widths of the features, from which the encoders follow, and MetaCLIP's 256
  tokens; 300 and 100 are those of mindone's re-implementation. Weights: made by mgen_jax.convert.

  Args:
    **changes: keys of FeatureTextConfig that differ.
  """
  encoders = ("ul2", "metaclip-bigg-text-256", "byt5-small")
  return {
    "kind": "features",
    "names": ("ul2", "metaclip", "byt5"),
    "encoders": encoders,
    "weights": tuple(f"weights/{name}" for name in encoders),
    "reads": ("prompt", "prompt", "quoted"),
    "widths": tuple(encoder_sizes.named(name).config.output_width for name in encoders),
    "lengths": (300, 256, 100),
    **changes,
  }


def encoded_text(text: Mapping[str, Any]) -> dict[str, Any]:
  """The "text" of the encode stage that writes the features a generator with `text` reads."""
  keys = {field.name for field in dataclasses.fields(StackConfig)}
  return {key: value for key, value in text.items() if key in keys}


def experiment(*, name: str, stages: Mapping[str, Any], **values: Any) -> config_dict.ConfigDict:
  """A complete experiment from the keys that differ from the defaults.

  Args:
    name: of the experiment.
    stages: by name, in the order in which they run; each a dict with a "kind".
    **values: further keys of `Experiment`.

  Returns:
    A ConfigDict with every key, so that a flag can override any of them.

  Raises:
    ConfigError: an unknown key or a value of the wrong type.
  """
  values = {"name": name, "stages": stages, "recipe": tuple(stages), **values}
  return schema.to_config_dict(schema.build(Experiment, values))


def resolve(values: Mapping[str, Any] | config_dict.ConfigDict) -> Experiment:
  """The typed experiment, checked as far as is possible without devices.

  Raises:
    ConfigError: a key or value that cannot be used, with its path and the fix.
  """
  made = schema.build(Experiment, values)
  if set(made.recipe) != set(made.stages) or len(made.recipe) != len(made.stages):
    raise ConfigError(
      f"config.recipe {made.recipe} must name every stage once: {', '.join(sorted(made.stages))}."
    )
  for index, name in enumerate(made.recipe):
    stage = made.stages[name]
    if isinstance(stage, TrainStage):
      _check_train(made, name, stage, made.recipe[:index])
    elif isinstance(stage, EncodeStage):
      _earlier(made, name, "autoencoder", stage.autoencoder, made.recipe[:index], "train")
    elif isinstance(stage, EvaluateStage):
      _earlier(made, name, "generator", stage.generator, made.recipe[:index], "train")
      generator = made.stages[stage.generator]
      _check_bucket(f"config.stages.{name}.bucket", generator, stage.bucket, parse_bucket)
    elif isinstance(stage, ReconstructStage):
      _check_reconstruct(made, name, stage, made.recipe[:index])
  return made


def check_devices(
  made: Experiment, devices: int, processes: int, stages: Sequence[str] | None = None
) -> None:
  """The checks that need the number of devices and hosts.

  Args:
    made: the experiment.
    devices: of all hosts.
    processes: hosts.
    stages: those that will run on them; None: all. A recipe may need other numbers later on.

  Raises:
    ConfigError: a mesh that does not fit the devices, a batch that does not divide.
  """
  for name in made.recipe if stages is None else stages:
    stage = made.stages[name]
    if not isinstance(stage, TrainStage):
      continue
    path = f"config.stages.{name}"
    try:
      replica, fsdp, *_ = stage.mesh.sizes(devices)
    except ConfigError as error:
      raise ConfigError(f"{path}.mesh: {error}") from error
    for bucket, entry in stage.batches().items():
      passes = max(1, stage.passes(entry.batch, replica * fsdp))
      parts = replica * fsdp * passes
      if entry.batch % parts or entry.batch % processes:
        nearest = max(parts, round(entry.batch / parts) * parts)
        raise ConfigError(
          f"{path}.buckets.b{bucket.name}.batch is {entry.batch}, which does not divide into "
          f"{replica * fsdp} batch shards x {passes} accumulation passes on {devices} "
          f"devices: set it to {nearest}."
        )


def to_json(made: Experiment) -> str:
  """The resolved experiment, every key written out."""
  return json.dumps(schema.to_plain(made), indent=2) + "\n"


def from_json(path: str) -> Experiment:
  """Reads what `to_json` wrote.

  Raises:
    UserError: the file is missing or is not an experiment of this version.
  """
  if not os.path.exists(path):
    raise UserError(f"{path} does not exist: name the --workdir of a run that was started.")
  with open(path, encoding="utf-8") as file:
    try:
      return resolve(json.load(file))
    except (json.JSONDecodeError, ConfigError) as error:
      raise UserError(
        f"{path} is not an experiment of this version of mgen_jax ({error}): use the version that "
        "wrote it, or start a new --workdir."
      ) from error


def _earlier(
  made: Experiment, stage: str, key: str, target: str, before: tuple[str, ...], kind: str
) -> Any:
  """The stage that a key points to, which must come earlier and be of a kind."""
  path = f"config.stages.{stage}.{key}"
  candidates = [name for name in before if made.stages[name].kind == kind]
  if target not in candidates:
    raise ConfigError(
      f'{path} is "{target}", which is not an earlier stage of kind "{kind}": '
      f"{schema.suggest(target, candidates)}"
    )
  return made.stages[target]


def _check_train(made: Experiment, name: str, stage: TrainStage, before: tuple[str, ...]) -> None:
  path = f"config.stages.{name}"
  if not stage.buckets:
    raise ConfigError(f'{path}.buckets is empty: name at least one, like {{"b16x64x64": ...}}.')
  for bucket, entry in stage.buckets.items():
    if entry.batch < 1 or entry.weight <= 0:
      raise ConfigError(f"{path}.buckets.{bucket}: batch and weight must be above 0.")
    _check_bucket(f"{path}.buckets", stage, bucket, parse_key)
  if stage.init_from is not None:
    origin = _earlier(made, name, "init_from", stage.init_from, before, "train")
    if type(origin.task) is not type(stage.task):
      raise ConfigError(
        f'{path}.init_from is "{stage.init_from}", which trains {origin.task.name}: it must train '
        f"{stage.task.name}."
      )
    stage.task.check_origin(origin.task, path)
  if stage.init_weights is not None:
    if stage.init_from is not None:
      raise ConfigError(f"{path}.init_from and {path}.init_weights are both set: unset one.")
    if not hasattr(tasks.TASKS[stage.task.name], "from_weights"):
      raise ConfigError(
        f"{path}.init_weights is set, but {stage.task.name} starts from no weights of others: "
        "unset it."
      )
  source = tasks.TASKS[stage.task.name].source
  if source == "latents":
    if stage.latents is None:
      raise ConfigError(f"{path}.latents is not set: name the encode stage it reads from.")
    encode = _earlier(made, name, "latents", stage.latents, before, "encode")
    wanted = set(stage.batches())
    if stage.task.name == "latte" and stage.task.images:  # beside each clip
      wanted |= {dataclasses.replace(bucket, frames=1) for bucket in wanted}
    missing = {bucket.name for bucket in wanted} - set(encode.buckets)
    if missing:
      raise ConfigError(
        f"{path}.buckets has {', '.join(sorted(missing))}, which stage {stage.latents} does not "
        f"encode: add it to config.stages.{stage.latents}.buckets."
      )
    autoencoder = made.stages[encode.autoencoder].task
    stage.task.check_latents(autoencoder.model, path)
    if hasattr(stage.task, "check_text"):
      stage.task.check_text(encode.text, path, stage.latents)
  elif stage.latents is not None:
    raise ConfigError(f"{path}.latents is set, but {stage.task.name} learns from media: unset it.")


def _check_reconstruct(
  made: Experiment, name: str, stage: ReconstructStage, before: tuple[str, ...]
) -> None:
  path = f"config.stages.{name}"
  if not stage.autoencoders or not stage.buckets:
    raise ConfigError(f"{path}.autoencoders and .buckets must name one or more each.")
  for coder in stage.autoencoders:
    trained = _earlier(made, name, "autoencoders", coder, before, "train")
    if tasks.TASKS[trained.task.name].source != "media":
      raise ConfigError(f"{path}.autoencoders has {coder}, which trains {trained.task.name}.")
    for bucket in stage.buckets:
      _check_bucket(f"{path}.buckets", trained, bucket, parse_bucket)


def _check_bucket(path: str, stage: TrainStage, name: str, parse: Callable[[str], Bucket]) -> None:
  try:
    stage.task.check_bucket(parse(name))
  except UserError as error:
    raise ConfigError(f"{path}: bucket {name}: {error}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Keys (dotted) whose values differ, with both values; None stands for absent."""
  a, b = schema.flatten(old), schema.flatten(new)
  keys = sorted(set(itertools.chain(a, b)))
  return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def inputs_of(made: Experiment, name: str) -> tuple[str, ...]:
  """The stages whose results a stage reads."""
  stage = made.stages[name]
  ingest = tuple(n for n in made.recipe if made.stages[n].kind == "ingest")
  if isinstance(stage, EncodeStage):
    return (*ingest, stage.autoencoder)
  if isinstance(stage, TrainStage):
    source = ingest if stage.latents is None else (stage.latents,)
    return source if stage.init_from is None else (*source, stage.init_from)
  if isinstance(stage, ReconstructStage):
    return (*ingest, *stage.autoencoders)
  if isinstance(stage, EvaluateStage):
    generator = made.stages[stage.generator]
    return (*ingest, generator.latents, stage.generator)
  return ()


def autoencoder_of(made: Experiment, name: str) -> str:
  """The stage that trained the autoencoder whose latents a train stage reads."""
  return made.stages[made.stages[name].latents].autoencoder


def ingest_of(made: Experiment) -> str:
  """The stage that made the index of clips.

  Raises:
    ConfigError: there is none.
  """
  for name in made.recipe:
    if isinstance(made.stages[name], IngestStage):
      return name
  raise ConfigError(f'config.recipe {made.recipe} has no stage of kind "ingest": add one.')
