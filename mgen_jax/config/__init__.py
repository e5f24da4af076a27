"""The experiment: every allowed key, its default, and the checks across keys.

An experiment file returns `experiment(name=..., data=..., stages=...)`: nested dicts with the keys
that matter, in, a complete ConfigDict, out. `resolve` turns that (after overrides by flags) into
frozen dataclasses. `stages.py` has the keys, `presets.py` what an experiment file calls,
`checks.py` the checks across stages, `links.py` who reads whose results, `files.py` the JSON.
"""

from mgen_jax.config.checks import check_devices, resolve
from mgen_jax.config.files import differences, from_json, to_json
from mgen_jax.config.links import autoencoder_of, ingest_of, inputs_of
from mgen_jax.config.presets import backbone, encoded_text, experiment, latte, text_stack
from mgen_jax.config.stages import (
  STAGES,
  BucketConfig,
  DataConfig,
  EncodeStage,
  EvaluateStage,
  Experiment,
  GuardConfig,
  IngestStage,
  MarblesConfig,
  OptimizerConfig,
  ReconstructStage,
  TargetsConfig,
  TrainStage,
  parse_key,
)
from mgen_jax.errors import ConfigError  # what an experiment file raises

__all__ = [
  "STAGES",
  "BucketConfig",
  "ConfigError",
  "DataConfig",
  "EncodeStage",
  "EvaluateStage",
  "Experiment",
  "GuardConfig",
  "IngestStage",
  "MarblesConfig",
  "OptimizerConfig",
  "ReconstructStage",
  "TargetsConfig",
  "TrainStage",
  "autoencoder_of",
  "backbone",
  "check_devices",
  "differences",
  "encoded_text",
  "experiment",
  "from_json",
  "ingest_of",
  "inputs_of",
  "latte",
  "parse_key",
  "resolve",
  "text_stack",
  "to_json",
]
