"""An experiment as JSON, and where two of them differ."""

import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

from mgen_jax import schema
from mgen_jax.config.checks import resolve
from mgen_jax.config.stages import Experiment
from mgen_jax.errors import ConfigError, UserError


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
  try:
    with open(path, encoding="utf-8") as file:
      return resolve(json.load(file))
  except (OSError, ValueError, ConfigError) as error:  # ValueError: neither UTF-8 nor JSON
    raise UserError(
      f"{path} is not an experiment of this version of mgen_jax ({error}): use the version that "
      "wrote it, or start a new --workdir."
    ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Keys (dotted) whose values differ, with both values; None stands for absent."""
  a, b = schema.flatten(old), schema.flatten(new)
  keys = sorted(set(itertools.chain(a, b)))
  return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}
