"""Weight files of others: safetensors in and out, and nothing that could run code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mgen_jax.errors import UserError

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LISTED = 200  # names in one message; a file of another model has thousands


class WeightsError(UserError):
  """A file of weights that cannot be used."""


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file as fp32, by name.

  Raises:
    WeightsError: no such file, another format, or damaged.
  """
  path = Path(path)
  if path.suffix in _UNSAFE:
    raise WeightsError(
      f"{path} is a pickle, which can run code: convert it with safetensors.torch.save_file first."
    )
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


def check_names(
  found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
  """Compares names and shapes, and lists every difference at once.

  Args:
    found: shapes by name in the file.
    wanted: shapes by name that the model has.
    what: the file, for the message.

  Raises:
    WeightsError: they differ.
  """
  faults = [f"missing: {name} {wanted[name]}" for name in sorted(set(wanted) - set(found))]
  faults += [f"extra: {name} {found[name]}" for name in sorted(set(found) - set(wanted))]
  faults += [
    f"shape: {name} is {found[name]} instead of {wanted[name]}"
    for name in sorted(set(found) & set(wanted))
    if tuple(found[name]) != tuple(wanted[name])
  ]
  if faults:
    more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    raise WeightsError(
      f"{what} does not fit the model in {len(faults)} tensors; give the model the file's channels,"
      " levels and latent channels, or name another file:\n  "
      + "\n  ".join(faults[:_LISTED])
      + more
    )
