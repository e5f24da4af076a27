"""Folders of safetensors as Hugging Face lays them out: read tensor by tensor, and written so.

Nothing here trusts a file: an index may not point outside its folder, a file that is cut short or
brings another type than floats is named, and pickled weights, which can run code when they are
read, are refused. Not here: what the tensors mean (`rules.py`).
"""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mgen_jax.data.files import publish, temporary_beside, write_text_atomic
from mgen_jax.errors import UserError

CONFIG_NAME = "config.json"
# How the files of transformers and of diffusers are called, before ".safetensors".
STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".safetensors.index.json"
# Names of a vocabulary beside weights, in the order in which they are looked for.
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILE = "tokenizer.json"
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
  offset: int  # of its bytes in the file


class Source:
  """The tensors of a folder of safetensors, or of one file.

  Attributes:
    folder: of the files.
    config: config.json; {} where there is none.
    tensors: by name.

  Raises:
    UserError: there are no safetensors, or a file or the index cannot be used.
  """

  def __init__(self, path: Path | str):
    self.path = path = Path(path)
    if path.is_file():
      self.folder, names = path.parent, [path.name]
    elif path.is_dir():
      self.folder, names = path, None
    else:
      raise UserError(
        f"{path} is not a folder with config.json and safetensors, nor one such file: name one."
      )
    config = self.folder / CONFIG_NAME
    self.config = read_json(config) if config.exists() else {}
    self.tensors: dict[str, Tensor] = {}
    index = {} if names else self._index()
    for name in names or sorted(set(index.values())) or [self._single()]:
      self._open(name)
    lost = sorted(set(index) - set(self.tensors))
    if lost:
      raise UserError(
        f"the index of {self.folder} names {lost[0]} and {len(lost) - 1} more that are in none "
        "of its files: get the folder anew."
      )

  def read(self, name: str) -> np.ndarray:
    """One tensor, read-only: a view of the file's pages, which take no memory of the process.

    Raises:
      UserError: it cannot be read.
    """
    tensor = self.tensors[name]
    dtype, path = FLOATS[tensor.dtype], self.folder / tensor.file
    if 0 in tensor.shape:
      return np.empty(tensor.shape, dtype)
    try:
      # A new mapping for each tensor: what was read before is given back with its array.
      return np.memmap(path, dtype, "r", tensor.offset, tensor.shape or (1,)).reshape(tensor.shape)
    except (OSError, ValueError) as error:
      raise UserError(f"{path}: {name} cannot be read ({error}).") from error

  @property
  def files(self) -> tuple[Path, ...]:
    """The safetensors files."""
    return tuple(self.folder / name for name in sorted({t.file for t in self.tensors.values()}))

  def _single(self) -> str:
    found = [f"{stem}.safetensors" for stem in STEMS]
    found = [name for name in found if (self.folder / name).exists()]
    if not found:
      raise UserError(_nothing(self.folder))
    return found[0]

  def _index(self) -> dict[str, str]:
    paths = (self.folder / f"{stem}{_INDEX}" for stem in STEMS)
    path = next(filter(Path.exists, paths), None)
    if path is None:
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
      raise UserError(
        f"{path} is a pickle. {no_pickle([path], path.with_suffix('.safetensors'))}"
        if path.suffix in PICKLED
        else f"{path} is not a safetensors file: name one, or a folder with its config.json."
      )
    import safetensors  # a shared library: loaded where it is used

    try:
      with safetensors.safe_open(path, framework="np"):  # checks the header against the file
        pass
      with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(
        f"{path} is cut short or is not a safetensors file ({error}): get it anew."
      ) from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
      if key in self.tensors:
        raise UserError(f"{key} is in {self.tensors[key].file} and in {name} of {self.folder}.")
      offset = 8 + size + entry["data_offsets"][0]
      self.tensors[key] = Tensor(name, entry["dtype"], tuple(entry["shape"]), offset)


def check_floats(folder: Path, tensors: Mapping[str, Tensor]) -> None:
  """Raises UserError where a tensor is not of floating-point numbers."""
  wrong = {name: t for name, t in tensors.items() if t.dtype not in FLOATS}
  if wrong:
    name, tensor = next(iter(wrong.items()))
    raise UserError(
      f"{folder / tensor.file}: {name} has dtype {tensor.dtype} ({len(wrong)} such): "
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
    stem = STEMS[1] if pickled[0].name.startswith(STEMS[1]) else STEMS[0]
    how = no_pickle(pickled, folder / f"{stem}.safetensors")
    return f"{folder} holds pickled weights only ({pickled[0].name}). {how}"
  return f"{folder} holds no model.safetensors and no model{_INDEX}: name a folder that does."


def no_pickle(paths: Sequence[Path], out: Path) -> str:
  """Why pickles are not read, and a command that makes one file of safetensors of them where torch
  is at hand: of dictionaries of tensors, or of ones that lie in a checkpoint."""
  keys = "('ema', 'state_dict', 'model', 'module')"
  lines = (
    "import argparse, sys, torch; from safetensors.torch import save_file; "
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    "found = [torch.load(p, map_location='cpu', weights_only=True) for p in sys.argv[2:]]; "
    f"found = [next((x[k] for k in {keys} if isinstance(x.get(k), dict)), x) for x in found]; "
    "save_file({k: v.contiguous().clone() for x in found for k, v in x.items() "
    "if torch.is_tensor(v)}, sys.argv[1])"
  )
  names = " ".join(shlex.quote(str(path)) for path in (out, *paths))
  return (
    "A pickle can run code when it is read, so it is not: get the safetensors of the same model, "
    f'or, where you trust it, make them with torch: python -c "{lines}" {names}'
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
  stem: str = STEMS[0],
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
    stem: name of a single file, without its ending.
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
  names = [f"{stem}.safetensors"]
  if len(parts) > 1:
    count = len(parts)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
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
    write_text_atomic(folder / f"{stem}{_INDEX}", json.dumps(record, indent=2) + "\n")
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
        del array  # before the next one is made
        yield tensor.bytes
    publish(temporary, path)
  except OSError as error:
    raise UserError(f"{path} could not be written ({error.strerror}): make room.") from error
  finally:
    temporary.unlink(missing_ok=True)


def raw(array: np.ndarray) -> memoryview:
  """The bytes of an array, in C order, without a copy where it has that order."""
  return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
