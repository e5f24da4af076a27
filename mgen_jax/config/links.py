"""Which stages an experiment's stages read from."""

from mgen_jax.config.stages import (
  EncodeStage,
  EvaluateStage,
  Experiment,
  IngestStage,
  ReconstructStage,
  TrainStage,
)
from mgen_jax.errors import ConfigError


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
