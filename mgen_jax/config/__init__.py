"""The experiment: every allowed key, its default, and the checks across keys.

An experiment file returns `experiment(name=..., data=..., stages=...)`: nested dicts with the keys
that matter, in, a complete ConfigDict, out. `resolve` turns that (after overrides by flags) into
frozen dataclasses. `stages.py` and `recipes.py` have the keys, `presets.py` what an experiment
calls, `checks.py` the checks across stages, `links.py` who reads whose results, `files.py` JSON.
"""

from mgen_jax.config.checks import check_devices, resolve
from mgen_jax.config.files import differences, from_json, to_json
from mgen_jax.config.links import (
  autoencoder_of,
  data_of,
  ingest_of,
  ingests_of,
  inputs_of,
  latents_of,
  own_models,
)
from mgen_jax.config.presets import backbone, encoded_text, experiment, latte, text_stack
from mgen_jax.config.recipes import LoraConfig, OptimizerConfig, PartConfig, PlateauConfig
from mgen_jax.config.stages import (
  STAGES,
  AverageStage,
  BucketConfig,
  DataConfig,
  EncodeStage,
  EvaluateStage,
  Experiment,
  GuardConfig,
  IngestStage,
  MarblesConfig,
  ObserveConfig,
  ReconstructStage,
  TargetsConfig,
  TrainStage,
  parse_key,
)
from mgen_jax.errors import ConfigError  # what an experiment file raises

__all__ = [
  "STAGES",
  "AverageStage",
  "BucketConfig",
  "ConfigError",
  "DataConfig",
  "EncodeStage",
  "EvaluateStage",
  "Experiment",
  "GuardConfig",
  "IngestStage",
  "LoraConfig",
  "MarblesConfig",
  "ObserveConfig",
  "OptimizerConfig",
  "PartConfig",
  "PlateauConfig",
  "ReconstructStage",
  "TargetsConfig",
  "TrainStage",
  "autoencoder_of",
  "backbone",
  "check_devices",
  "data_of",
  "differences",
  "encoded_text",
  "experiment",
  "from_json",
  "ingest_of",
  "ingests_of",
  "inputs_of",
  "latents_of",
  "latte",
  "own_models",
  "parse_key",
  "resolve",
  "text_stack",
  "to_json",
]
