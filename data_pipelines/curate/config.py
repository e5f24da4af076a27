"""All settings of a run of curation: a field for each stage, in the order in which they run.

A config file has `get_config()`, which returns `complete(...)`: a ConfigDict with every key, so
that a flag can override any (`--config.text.max_score=0.5`). `resolve` makes the typed form of it.
Not here: what the settings mean (the stages), and the paper's numbers (`configs`).
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from data_pipelines.curate import decode
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stage import Stage
from data_pipelines.curate.stages.aesthetics import Aesthetics
from data_pipelines.curate.stages.aspect import Aspect, AspectMix
from data_pipelines.curate.stages.border import Border
from data_pipelines.curate.stages.buckets import Buckets
from data_pipelines.curate.stages.camera import Camera
from data_pipelines.curate.stages.captions import Captions, Prompts
from data_pipelines.curate.stages.concepts import Concepts
from data_pipelines.curate.stages.copies import Copies
from data_pipelines.curate.stages.embedding import Embedding
from data_pipelines.curate.stages.hashes import Hashes
from data_pipelines.curate.stages.humans import Faces, Humans, HumanShare
from data_pipelines.curate.stages.jitter import Jitter
from data_pipelines.curate.stages.motion import Motion
from data_pipelines.curate.stages.packets import Packets
from data_pipelines.curate.stages.probe import Probe
from data_pipelines.curate.stages.resolution import Resolution
from data_pipelines.curate.stages.scan import Scan
from data_pipelines.curate.stages.sidecar import Sidecar
from data_pipelines.curate.stages.slideshow import Slideshow
from data_pipelines.curate.stages.split import Split
from data_pipelines.curate.stages.static import Static
from data_pipelines.curate.stages.text import Text
from data_pipelines.curate.stages.vectors import Vectors
from mgen_jax import schema
from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """How kept clips are written.

  Attributes:
    crf: quality of H.264, less is better and larger (18 shows no loss).
    preset: of the encoder.
    sound: keep the first sound track.
    shards: write the clips a second time, as shards of records by bucket (see `shards`).
    shard_bytes: of one shard, about.
    held_out: share of the clips in shards that training does not see.
  """

  crf: int = 18
  preset: str = "veryfast"
  sound: bool = True
  shards: bool = True
  shard_bytes: int = 512 << 20
  held_out: float = 0.05

  def __post_init__(self):
    if self.shard_bytes < 1 or not 0 <= self.held_out < 1:
      raise ConfigError(
        f"export.shard_bytes is {self.shard_bytes} and export.held_out {self.held_out}: give a"
        " size, and a share below 1."
      )


@dataclasses.dataclass(frozen=True)
class CurateConfig:
  """Everything but the folders.

  Attributes:
    name: of the set; an output folder belongs to one.
    seed: of every choice; it replaces the `seed` of each stage.
    partitions: into how many units the sources are dealt. More of them are lost less when a machine
      dies, and shared out more evenly.
    off: stages that are left out.
    gated: dear stages, which only score clips that no rule before them rejects.
    gate_sources: do not decode sources that a rule about their header rejects.
    limits: what one file may cost before it is given up.
    export: how kept clips are written.
    The rest are the stages, in order.
  """

  name: str = "curate"
  seed: int = 0
  partitions: int = 64
  off: tuple[str, ...] = ()
  gated: tuple[str, ...] = ("text", "captions")
  gate_sources: bool = True
  limits: decode.Limits = decode.Limits()
  export: ExportConfig = ExportConfig()

  probe: Probe = Probe()
  resolution: Resolution = Resolution()
  aspect: Aspect = Aspect()
  packets: Packets = Packets()
  sidecar: Sidecar = Sidecar()
  scan: Scan = Scan()
  slideshow: Slideshow = Slideshow()
  split: Split = Split()
  border: Border = Border()
  static: Static = Static()
  motion: Motion = Motion()
  vectors: Vectors = Vectors()
  jitter: Jitter = Jitter()
  camera: Camera = Camera()
  aesthetics: Aesthetics = Aesthetics()
  hashes: Hashes = Hashes()
  embedding: Embedding = Embedding()
  faces: Faces = Faces()
  humans: Humans = Humans()
  buckets: Buckets = Buckets()
  text: Text = Text()
  copies: Copies = Copies()
  concepts: Concepts = Concepts()
  human_share: HumanShare = HumanShare()
  aspect_mix: AspectMix = AspectMix()
  captions: Captions = Captions()
  prompts: Prompts = Prompts()

  def stages(self) -> tuple[Stage, ...]:
    """Those that run, in order, with the run's seed."""
    known = [value for value in _values(self) if isinstance(value, Stage)]
    names = [stage.name for stage in known]
    for name in self.off:
      if name not in names:
        raise ConfigError(f"config.off names {name!r}: {schema.suggest(name, names)}")
    return tuple(_seeded(stage, self.seed) for stage in known if stage.name not in self.off)

  def recipe(self) -> Recipe:
    """What `run` needs to know. Raises ConfigError if a stage lacks one that is off."""
    return Recipe(
      self.stages(),
      self.seed,
      self.partitions,
      tuple(name for name in self.gated if name not in self.off),
      self.gate_sources,
    )


def _values(config: CurateConfig) -> list[Any]:
  return [getattr(config, field.name) for field in dataclasses.fields(config)]


def _seeded(stage: Stage, seed: int) -> Stage:
  if any(field.name == "seed" for field in dataclasses.fields(stage)):
    return dataclasses.replace(stage, seed=seed)
  return stage


def complete(**values: Any) -> config_dict.ConfigDict:
  """A ConfigDict with every key; those not given have their defaults.

  Raises ConfigError for an unknown key or a value that cannot be.
  """
  return schema.to_config_dict(schema.build(CurateConfig, values))


def resolve(values: Mapping[str, Any] | config_dict.ConfigDict) -> CurateConfig:
  """The typed form. Raises ConfigError."""
  config = schema.build(CurateConfig, values)
  config.recipe()
  return config


def what_if(recipe: Recipe, changes: Sequence[str]) -> Recipe:
  """The recipe with other thresholds, from "stage.key=value".

  Raises ConfigError: no such stage or key, a key that changes scores, or a value that cannot be.
  """
  stages = {stage.name: stage for stage in recipe.stages}
  for change in changes:
    key, sign, value = change.partition("=")
    name, dot, field = key.partition(".")
    if not sign or not dot:
      raise ConfigError(f"--what-if={change}: write stage.key=value, like motion.min_at_30=1.5.")
    if name not in stages:
      raise ConfigError(f"--what-if={change}: no stage is called {name!r}: "
                        f"{schema.suggest(name, list(stages))}")  # fmt: skip
    fields = {f.name: f for f in dataclasses.fields(stages[name])}
    known = [f for f in fields if fields[f].metadata.get("threshold")]
    if field not in known:
      if field in fields:
        raise ConfigError(
          f"--what-if={change}: {key} changes scores, so it takes a run; thresholds of {name}:"
          f" {', '.join(known) or 'none'}."
        )
      near = difflib.get_close_matches(field, known, n=1, cutoff=0.4)
      hint = f'did you mean "{near[0]}"?' if near else f"it has {', '.join(known) or 'none'}."
      raise ConfigError(f"--what-if={change}: {name} has no threshold {field!r}; {hint}")
    plain = {f: getattr(stages[name], f) for f in fields}
    plain[field] = _number(change, value)
    stages[name] = schema.build(type(stages[name]), plain, name)
  return dataclasses.replace(recipe, stages=tuple(stages.values()))


def _number(change: str, text: str) -> float | int | None:
  if text == "None":
    return None
  try:
    number = float(text)
  except ValueError as error:
    raise ConfigError(f"--what-if={change}: {text!r} is not a number.") from error
  return int(number) if number.is_integer() else number
