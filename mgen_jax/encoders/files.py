"""Folders of safetensors as Hugging Face lays them out: read tensor by tensor, and written so.

Nothing here trusts a file: an index may not point outside its folder, a file that is cut short or
brings another type than floats is named, and pickled weights, which can run code when they are
read, are refused. Not here: what the tensors mean (`families.py`).
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mgen_jax.data.files import publish, temporary_beside, write_text_atomic
from mgen_jax.errors import UserError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Of safetensors; other types are no weights, or are packed in a way that only their writer knows.
FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class Tensor(NamedTuple):
  """What is known of a tensor before it is read."""

  file: str
  dtype: str  # as safetensors names it
  shape: tuple[int, ...]


class Source:
  """The tensors of a folder; use it in a `with`. Files stay open and are mapped, not loaded.

  Attributes:
    folder: of the files.
    config: config.json.
    tensors: by name.

  Raises:
    UserError: there are no safetensors, or a file or the index cannot be used.
  """

  def __init__(self, folder: Path | str):
    self.folder = Path(folder)
    if not self.folder.is_dir():
      raise UserError(f"{folder} is not a folder: name one with config.json and safetensors.")
    self.config = read_json(self.folder / CONFIG_NAME)
    self._stack = contextlib.ExitStack()
    self._files: dict[str, Any] = {}
    self.tensors: dict[str, Tensor] = {}
    try:
      index = self._index()
      names = sorted(set(index.values())) if index else [SINGLE_NAME]
      for name in names:
        self._open(name)
      lost = sorted(set(index) - set(self.tensors))
      if lost:
        raise UserError(
          f"{self.folder / INDEX_NAME} names {lost[0]} and {len(lost) - 1} more that are in none "
          "of its files: get the folder anew."
        )
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Source":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._stack.close()
    self._files = {}

  def read(self, name: str) -> np.ndarray:
    """One tensor.

    Raises:
      UserError: it cannot be read.
    """
    import safetensors  # a shared library: loaded where it is used

    tensor = self.tensors[name]
    try:
      return self._files[tensor.file].get_tensor(name)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      raise UserError(f"{self.folder / tensor.file}: {name} cannot be read ({error}).") from error

  @property
  def files(self) -> tuple[Path, ...]:
    """The safetensors files."""
    return tuple(self.folder / name for name in self._files)

  def _index(self) -> dict[str, str]:
    path = self.folder / INDEX_NAME
    if not path.exists():
      if not (self.folder / SINGLE_NAME).exists():
        raise UserError(_nothing(self.folder))
      return {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
      raise UserError(f"{path} has no weight_map from names to files: get the folder anew.")
    for name in index.values():
      if os.path.basename(name) != name or name in ("", ".", ".."):
        raise UserError(f"{path} points to {name!r}, outside its folder: do not use these weights.")
      if not (self.folder / name).is_file():
        raise UserError(f"{path} names {name}, which is missing: get the folder anew.")
    return index

  def _open(self, name: str) -> None:
    path = self.folder / name
    if path.suffix != ".safetensors":
      raise UserError(f"{path} is not a safetensors file. {_how(path)}")
    import safetensors

    try:
      file = self._stack.enter_context(safetensors.safe_open(path, framework="np"))
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(
        f"{path} is cut short or is not a safetensors file ({error}): get it anew."
      ) from error
    self._files[name] = file
    for key in file.keys():  # noqa: SIM118 (not a mapping)
      part = file.get_slice(key)
      if key in self.tensors:
        raise UserError(f"{key} is in {self.tensors[key].file} and in {name} of {self.folder}.")
      self.tensors[key] = Tensor(name, part.get_dtype(), tuple(part.get_shape()))


def check_floats(folder: Path, tensors: Mapping[str, Tensor]) -> None:
  """Raises UserError where a tensor is not of floating-point numbers."""
  wrong = {name: t for name, t in tensors.items() if t.dtype not in FLOATS}
  if wrong:
    name, tensor = next(iter(wrong.items()))
    raise UserError(
      f"{folder / tensor.file}: {name} has dtype {tensor.dtype} ({len(wrong)} tensors in all): "
      f"weights are one of {', '.join(FLOATS)}; get them unquantised."
    )


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    UserError: there is none.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{path} is missing: name a folder that has it.") from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}): get it anew.") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} is not a JSON object: get it anew.")
  return value


def _nothing(folder: Path) -> str:
  pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
  if pickled:
    return f"{folder} holds pickled weights only ({pickled[0].name}). {_how(pickled[0])}"
  return f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}: name a folder that does."


def _how(path: Path) -> str:
  return (
    "A pickle can run code when it is read, so it is not: where you trust it, convert it with "
    "torch (from safetensors.torch import save_file; "
    f"save_file(torch.load({path.name!r}, weights_only=True), 'model.safetensors')), or get the "
    "safetensors of the same model."
  )


# --------------------------------------------------------------------------------------------------
# Writing.


class ToWrite(NamedTuple):
  """A tensor that is still to be made."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_folder(
  folder: Path,
  tensors: list[ToWrite],
  arrays: Iterable[np.ndarray],
  *,
  shard_bytes: int = 10 * 2**30,
  progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
  """Writes safetensors of up to `shard_bytes` each, one tensor in memory at a time, and an index.

  The library writes a file from all of its tensors at once; so the header (eight bytes of its
  length, JSON, offsets) is written here, and the result opened with the library.

  Args:
    folder: exists.
    tensors: what will come, in this order.
    arrays: the arrays, in the same order.
    shard_bytes: after which a new file begins.
    progress: called with (bytes written, bytes in all).

  Returns:
    The files.

  Raises:
    UserError: the disk is full, or something else keeps a file from being written.
  """
  import safetensors

  parts: list[list[ToWrite]] = [[]]
  for tensor in tensors:
    if parts[-1] and sum(t.bytes for t in parts[-1]) + tensor.bytes > shard_bytes:
      parts.append([])
    parts[-1].append(tensor)
  names = [SINGLE_NAME]
  if len(parts) > 1:
    count = len(parts)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
  total, done, stream = sum(t.bytes for t in tensors), 0, iter(arrays)
  for name, part in zip(names, parts, strict=True):
    for written in _write(folder / name, part, stream):
      done += written
      if progress:
        progress(done, total)
    with safetensors.safe_open(folder / name, framework="np") as file:
      if set(file.keys()) != {tensor.name for tensor in part}:
        raise UserError(f"{folder / name} was not written as it should be: check the disk.")
  if len(parts) > 1:
    index = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
    record = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    write_text_atomic(folder / INDEX_NAME, json.dumps(record, indent=2) + "\n")
  return [folder / name for name in names]


def _write(path: Path, tensors: list[ToWrite], arrays: Iterator[np.ndarray]) -> Iterator[int]:
  """Writes one file; yields the bytes of each tensor when they are written."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for tensor in tensors:
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [offset, offset + tensor.bytes],
    }
    offset += tensor.bytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  temporary = temporary_beside(path)
  try:
    with temporary.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for tensor in tensors:
        array = next(arrays)
        if array.shape != tensor.shape or array.dtype != tensor.dtype:
          raise ValueError(f"{tensor}: got {array.dtype} {array.shape}")
        file.write(raw(array))
        yield tensor.bytes
    publish(temporary, path)
  except OSError as error:
    raise UserError(f"{path} could not be written ({error.strerror}): make room.") from error
  finally:
    temporary.unlink(missing_ok=True)


def raw(array: np.ndarray) -> memoryview:
  """The bytes of an array, in C order, without a copy where it has that order."""
  return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
