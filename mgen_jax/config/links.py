"""Which stages an experiment's stages read from, and which data."""

from mgen_jax.config.stages import (
  AverageStage,
  DataConfig,
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
  if isinstance(stage, EncodeStage):
    return (*ingests_of(made, name), stage.autoencoder)
  if isinstance(stage, TrainStage):
    source = tuple(stage.parts()) or ingests_of(made, name)
    return source if stage.init_from is None else (*source, stage.init_from)
  if isinstance(stage, AverageStage):
    held_out = () if stage.validation is None else inputs_of(made, stage.validation)
    own = (*own_models(stage), *held_out)
    return tuple(dict.fromkeys(own))
  if isinstance(stage, ReconstructStage):
    return (*ingests_of(made, name), *stage.autoencoders)
  if isinstance(stage, EvaluateStage):
    latents = latents_of(made, stage.generator)
    return (*ingests_of(made, name), latents, stage.generator)
  return ()


def own_models(stage: AverageStage) -> tuple[str, ...]:
  """The stages of its own recipe that an average is made of."""
  return tuple(entry.partition("@")[0] for entry in stage.of if "/" not in entry)


def latents_of(made: Experiment, name: str) -> str:
  """The encode stage of the latents that a generator has learned; of several, the first.

  Raises:
    ConfigError: it is an average that does not say.
  """
  stage = made.stages[name]
  if isinstance(stage, AverageStage):
    if stage.latents is not None:
      return stage.latents
    if not own_models(stage):
      raise ConfigError(
        f"config.stages.{name}.latents is not set: name the encode stage of its latents."
      )
    return latents_of(made, own_models(stage)[0])
  return next(iter(stage.parts()))


def autoencoder_of(made: Experiment, name: str) -> str:
  """The stage that trained the autoencoder whose latents a generator has learned."""
  return made.stages[latents_of(made, name)].autoencoder


def ingests_of(made: Experiment, name: str) -> tuple[str, ...]:
  """The ingest stages whose clips a stage works on.

  Raises:
    ConfigError: the recipe has none.
  """
  stage = made.stages[name]
  if isinstance(stage, IngestStage):
    return (name,)
  if isinstance(stage, EncodeStage) and stage.ingest is not None:
    return (stage.ingest,)
  if isinstance(stage, TrainStage) and stage.parts():
    return tuple(dict.fromkeys(i for part in stage.parts() for i in ingests_of(made, part)))
  if isinstance(stage, EvaluateStage):
    return ingests_of(made, latents_of(made, stage.generator))
  for other in made.recipe:
    if isinstance(made.stages[other], IngestStage):
      return (other,)
  raise ConfigError(f'config.recipe {made.recipe} has no stage of kind "ingest": add one.')


def ingest_of(made: Experiment, name: str) -> str:
  """The stage that made the index of a stage's clips; of several, the first."""
  return ingests_of(made, name)[0]


def data_of(made: Experiment, name: str) -> DataConfig:
  """The data that a stage works on; of several, the first."""
  dataset = made.stages[ingest_of(made, name)].dataset
  return made.data if dataset is None else made.datasets[dataset]
