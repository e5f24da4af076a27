"""Weight files of others: safetensors in and out, and nothing that could run code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mgen_jax.weights import folders, stored, transfer
from mgen_jax.weights.checks import WeightsError
from mgen_jax.weights.families import FAMILIES


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
  """All tensors of weights of others as fp32, by the names that they have there.

  Args:
    path: a safetensors file, a folder of them as diffusers lays it out, or one that
      `python -m mgen_jax.convert` made of either.

  Raises:
    UserError: no such file, another format, or damaged.
  """
  path = Path(path)
  if path.is_dir() and stored.is_stored(path):
    found = transfer.tensors(stored.read(path, FAMILIES))
    return {tensor.name: read().astype(np.float32) for tensor, read in found}
  if path.is_dir():
    read = [_read_file(file) for file in folders.Source(path).files]
    return {name: array for tensors in read for name, array in tensors.items()}
  if path.suffix in folders.PICKLED:
    how = folders.no_pickle([path], path.with_suffix(".safetensors"))
    raise WeightsError(f"{path} is a pickle. {how}")
  return _read_file(path)


def _read_file(path: Path) -> dict[str, np.ndarray]:
  try:
    with safetensors.safe_open(str(path), framework="np") as file:
      return {name: _as_float(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
  except (OSError, safetensors.SafetensorError) as error:
    raise WeightsError(
      f"{path} cannot be read as safetensors ({error}): name a whole .safetensors file."
    ) from error


def _as_float(file: Any, name: str) -> np.ndarray:
  return file.get_tensor(name).astype(np.float32)


def read_json(path: Path | str) -> dict[str, Any]:
  """The `config.json` beside weights. Raises WeightsError."""
  try:
    return json.loads(Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise WeightsError(
      f"{path} cannot be read ({error}): copy it from the model's page."
    ) from error


def write_tensors(path: Path | str, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file. Raises WeightsError if the disk refuses."""
  path = Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, str(path))
  except (OSError, safetensors.SafetensorError) as error:
    raise WeightsError(f"{path} could not be written ({error}).") from error
