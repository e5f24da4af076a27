"""Our folders of converted weights: an Orbax checkpoint, and what is known of where it came from.

  FOLDER/weights.json       family, config, manifest: SHA-256 of every source tensor and file
  FOLDER/params/            an Orbax checkpoint of the tree of parameters
  FOLDER/kept.safetensors   tensors that are no parameters of ours, for the way back (if any)
  FOLDER/spiece.model ...   the tokenizer's file

Orbax writes a checkpoint from whole arrays, so that a matrix of all layers would have to be in
memory. Here its arrays are written layer by layer and chunk by chunk (`_Writer`, a type handler of
Orbax for parameters that are still to be read); its readers know no difference. Not here: what
comes in and goes out (`transfer.py`).
"""

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mgen_jax import schema
from mgen_jax.errors import UserError
from mgen_jax.parallel import rules as sharding_rules
from mgen_jax.weights import folders
from mgen_jax.weights import rules as rules_lib
from mgen_jax.weights.rules import Family, Rule

DESCRIPTION = "weights.json"
PARAMS_NAME = "params"
KEPT = "kept"
FORMAT = 2

# Of this, some nine times are in use while chunks are compressed; larger ones are no faster.
CHUNK_BYTES = 8 * 2**20
_TILE = (128, 128)
_IN_FLIGHT = 2  # chunks that are compressed and written at a time

Box = tuple[slice, ...]


# --------------------------------------------------------------------------------------------------
# Writing.


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter that is still to be read.

  Attributes:
    shape, dtype: as it is written.
    chunks: shape of the pieces that are stored, each compressed by itself.
    slices: yields (layer, array), or (None, array) for all of it, in any floating-point type.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunks: tuple[int, ...]
  slices: Callable[[], Iterator[tuple[int | None, np.ndarray]]]

  @property
  def size(self) -> int:
    """Values; Orbax before 0.12 asks for it."""
    return math.prod(self.shape)


def chunk_shape(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axes: Sequence[str | None],
  shape: Sequence[int],
  itemsize: int,
  layered: bool,
) -> tuple[int, ...]:
  """The pieces of an array that is stored: what one device of a mesh holds, of one layer, halved
  until it has no more than `CHUNK_BYTES`."""
  chunk = list(sharding_rules.sharding(mesh, axes, shape).shard_shape(tuple(shape)))
  if layered:
    chunk[0] = 1
  while math.prod(chunk) * itemsize > CHUNK_BYTES:
    axis = next(axis for axis, size in enumerate(chunk) if size > 1)
    chunk[axis] = math.ceil(chunk[axis] / 2)
  return tuple(chunk)


def grid(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Box]:
  """The boxes that cut an array into chunks, in order."""
  starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
  for corner in itertools.product(*starts):
    yield tuple(slice(a, min(a + c, s)) for a, c, s in zip(corner, chunk, shape, strict=True))


class _Writer(ocp.type_handlers.NumpyHandler):
  """Writes `Parameter`s one after the other; everything else is as Orbax does it for arrays."""

  async def serialize(self, values, infos, args=None):
    del args
    for value, info in zip(values, infos, strict=True):
      await _write(Path(info.path), value)
    return []


async def _write(path: Path, value: Parameter) -> None:
  store = await _written(path, ts.open(_spec(path, value), create=True))
  for layer, array in value.slices():
    chunk = value.chunks if layer is None else value.chunks[1:]
    pending: collections.deque = collections.deque()
    for box in grid(array.shape, chunk):
      if len(pending) == _IN_FLIGHT:
        await _written(path, pending.popleft())
      piece = np.empty(array[box].shape, value.dtype)
      _copy(array[box], piece)
      pending.append(store[box if layer is None else (layer, *box)].write(piece))
      del piece
    while pending:
      await _written(path, pending.popleft())
    del array  # before the next one is read


def _copy(array: np.ndarray, out: np.ndarray) -> None:
  """Fills `out`; where one of two matrices is transposed, in tiles that fit the cache: that is four
  times as fast as numpy's own way."""
  turned = array.ndim == 2 and (array.strides[0] < array.strides[1]) != (
    out.strides[0] < out.strides[1]
  )
  for box in grid(array.shape, _TILE if turned else array.shape):
    out[box] = array[box]


async def _written(path: Path, future: Awaitable) -> Any:
  try:
    return await future
  except ValueError as error:  # of TensorStore: the disk is full, the folder went away
    first_line = str(error).splitlines()[0][:200]
    raise UserError(f"{path} could not be written ({first_line}): make room.") from error


def _spec(path: Path, value: Parameter) -> dict[str, Any]:
  """A zarr array as Orbax lays it out: chunks that are zeros are written too, so that a missing
  one is an error."""
  dtype = "bfloat16" if value.dtype == jnp.bfloat16 else value.dtype.str
  return {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{path}/"},
    "metadata": {
      "shape": list(value.shape),
      "chunks": list(value.chunks),
      "dtype": dtype,
      "compressor": {"id": "zstd", "level": 1},
      "fill_value": None,
      "order": "C",
      "dimension_separator": ".",
    },
    "store_data_equal_to_fill_value": True,
  }


def write(folder: Path, parameters: Mapping[str, Parameter]) -> None:
  """Writes the checkpoint of a folder of ours: parameters by path, each slice read when it is due.

  Raises:
    UserError: the disk refuses, or whatever reading a slice raises.
  """
  # Orbax looks for the handler of arrays as well.
  registry = ocp.type_handlers.create_type_handler_registry(
    (Parameter, _Writer()), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
  with ocp.Checkpointer(handler) as checkpointer:
    tree = ocp.args.PyTreeSave(rules_lib.nest(parameters))
    checkpointer.save((folder / PARAMS_NAME).absolute(), args=tree)


# --------------------------------------------------------------------------------------------------
# Reading.


class Piece(NamedTuple):
  """A parameter, or one layer of it, as part of a tensor of the source."""

  rule: Rule
  layer: int | None


@dataclasses.dataclass(frozen=True)
class Stored:
  """What the description of one of our folders says.

  Attributes:
    folder: where it is.
    family, config: of the model, in the dtype that it was stored in.
    tensors: {path: {"shape", "dtype", "chunks", "sources": names}}.
    sources: {name: {"dtype", "shape", "sha256"}}, of the tensors that it was made of.
    kept: likewise, of those that were kept as they are.
    source_config: the config.json that came with it.
  """

  folder: Path
  family: Family
  config: Any
  tensors: dict[str, Any]
  sources: dict[str, Any]
  kept: dict[str, Any]
  source_config: dict[str, Any]

  @property
  def digest(self) -> str:
    """Of all weights: what "the same model" means."""
    sums = sorted((name, fact["sha256"]) for name, fact in self.sources.items())
    dtypes = [self.tensors[path]["dtype"] for path in sorted(self.tensors)]
    named = repr((self.family.name, self.config, dtypes, sums))
    return hashlib.sha256(named.encode()).hexdigest()[:16]

  def pieces(self) -> dict[str, list[Piece]]:
    """The tensors of the source in the order of the manifest, and what each is put together of."""
    rules = {rule.target: rule for rule in self.family.rules(self.config)}
    found: dict[str, list[Piece]] = {name: [] for name in self.sources}
    for path, entry in self.tensors.items():
      layered = rules[path].layered
      for layer, name in enumerate(entry["sources"]):
        found[name].append(Piece(rules[path], layer if layered else None))
    return found

  def read_into(self, piece: Piece, out: np.ndarray) -> None:
    """Fills `out`, which lies as with us, chunk by chunk.

    Raises:
      UserError: a chunk is missing or damaged.
    """
    entry, path = self.tensors[piece.rule.target], self.path_of(piece.rule.target)
    chunk = entry["chunks"] if piece.layer is None else entry["chunks"][1:]
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    try:
      store = ts.open(spec, open=True).result()
      for box in grid(out.shape, chunk):
        index = box if piece.layer is None else (piece.layer, *box)
        _copy(store[index].read().result(), out[box])
    except ValueError as error:
      raise _damaged(path, error) from error

  def path_of(self, target: str) -> Path:
    """The folder of one parameter."""
    return (self.folder / PARAMS_NAME / target.replace("/", ".")).absolute()


def is_stored(folder: Path | str) -> bool:
  """Whether a folder is one of ours."""
  return (Path(folder) / DESCRIPTION).is_file()


def read(folder: Path | str, families: Mapping[str, Family]) -> Stored:
  """The description of one of our folders; no weight is read.

  Args:
    folder: the folder.
    families: that it may be of.

  Raises:
    UserError: it is none, of another version, or of another kind of model.
  """
  folder = Path(folder)
  if not is_stored(folder):
    raise UserError(
      f"{folder} holds no converted weights: make it with python -m mgen_jax.convert "
      f"--source=HF_FOLDER --out={folder}."
    )
  path = folder / DESCRIPTION
  record = folders.read_json(path)
  if record.get("format") != FORMAT:
    raise UserError(f"{path} is of another version: convert the weights again.")
  if record.get("family") not in families:
    raise UserError(
      f"{path} describes a {record.get('family')}, and one of {', '.join(families)} is needed."
    )
  family = families[record["family"]]
  config = schema.build(family.config, record["config"], f"{path}")
  parts = (record[key] for key in ("tensors", "sources", "kept"))
  return Stored(folder, family, config, *parts, record["source"]["config"])


def layouts(family: Family, config: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Where each parameter lies, by path: as the rules table says."""
  return {
    path: sharding_rules.sharding(mesh, box.names, box.value.shape)
    for path, box in rules_lib.boxes(family, config).items()
  }


def restore(stored: Stored, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Any:
  """All parameters of a folder of ours on the devices, one after the other.

  Raises:
    UserError: something is missing or damaged.
  """
  wanted = layouts(stored.family, stored.config, mesh)
  lost = sorted(set(wanted) - set(stored.tensors))
  if lost:
    raise UserError(f"{stored.folder / DESCRIPTION} lacks {', '.join(lost)}: convert it again.")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return rules_lib.nest(
      {path: _restore_one(checkpointer, stored, path, wanted[path], dtype) for path in wanted}
    )


def _restore_one(
  checkpointer: ocp.Checkpointer, stored: Stored, path: str, layout: Any, dtype: str | None
) -> jax.Array:
  entry = stored.tensors[path]
  shape = jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype or entry["dtype"], sharding=layout)
  item = rules_lib.nest({path: shape})
  how = ocp.args.PyTreeRestore(
    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
  )
  try:
    made = checkpointer.restore((stored.folder / PARAMS_NAME).absolute(), args=how)
  except Exception as error:  # Orbax and TensorStore raise several types, plain ones among them
    raise _damaged(stored.path_of(path), error) from error
  return jax.tree.leaves(made)[0]


def _damaged(path: Path, error: Exception) -> UserError:
  first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
  return UserError(f"{path} is damaged ({first_line}): convert the weights again.")
