"""Weights from safetensors to our folders or onto devices, and back, tensor by tensor.

What a process holds of the weights at a time is the pages of one source tensor, which are the
system's, and a few chunks of it (`stored.CHUNK_BYTES`); on the way back, one tensor and a chunk.
Models larger than the memory can be converted. Not here: the command (`mgen_jax/convert.py`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mgen_jax import schema
from mgen_jax.data.files import sha256_file, write_text_atomic
from mgen_jax.errors import UserError
from mgen_jax.models import clip
from mgen_jax.parallel import rules as sharding_rules
from mgen_jax.weights import folders, rules, stored
from mgen_jax.weights.folders import Source, ToWrite
from mgen_jax.weights.match import Match, Target
from mgen_jax.weights.stored import Parameter, Stored

# What else lies beside weights and is copied both ways: tokenizers and their settings.
COPIED = (
  *(*folders.SENTENCEPIECE_FILES, folders.TOKENIZER_FILE, "tokenizer_config.json"),
  *("special_tokens_map.json", "preprocessor_config.json", "generation_config.json"),
)

Progress = Callable[[int, int], None]


def save(
  source: Source,
  matched: Match,
  out: Path,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  *,
  dtype: str | None = None,
  positions: int | None = None,
  progress: Progress | None = None,
) -> Stored:
  """Converts a folder of safetensors to one of ours, which appears when it is whole.

  Args:
    source: the folder.
    matched: from `match`, without complaints.
    out: must not exist.
    mesh: whose shards are the pieces that are stored: each device of it then reads its own only.
    dtype: of the parameters; None: that of the files.
    positions: of a CLIP text tower: stretch its table to so many (see `clip.stretch_positions`).
    progress: called with (values done, values in all).

  Raises:
    UserError: `out` exists, the disk is full, or a tensor cannot be read.
  """
  if positions is not None and matched.family.name != "clip_text":
    raise UserError(f"--positions is of text towers: {matched.family.name} has no such table.")
  with _whole(out) as partial:
    check_floats(source, matched)
    saver = _Saver(source, matched, mesh, dtype, positions, progress)
    stored.write(partial, saver.parameters())
    saver.finish(partial)
  return stored.read(out, {matched.family.name: matched.family})


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
  """A folder beside `out` to write to: at the end it becomes `out`, and after a fault it is gone.

  Raises:
    UserError: `out` exists, or something could not be written.
  """
  if out.exists():
    raise UserError(f"{out} exists already: delete it, or name another folder.")
  partial = out.with_name(f"{out.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # that of a process that was killed is of no use
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)
  except OSError as error:
    raise UserError(
      f"{out} could not be written ({error.strerror}): check the folder, its permissions and the "
      "free space."
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


class _Saver:
  """One conversion: makes the parameters as they are asked for, and collects the manifest."""

  def __init__(self, source, matched, mesh, dtype, positions, progress):
    self._source, self._matched, self._mesh = source, matched, mesh
    self._dtype, self._positions = dtype, positions
    self._progress = progress or (lambda done, total: None)
    self._total = sum(int(np.prod(target.shape)) for target in matched.targets)
    self._done = 0
    self._sums: dict[str, str] = {}
    self._tensors: dict[str, Any] = {}

  def parameters(self) -> dict[str, Parameter]:
    return {target.rule.target: self._parameter(target) for target in self._matched.targets}

  def _parameter(self, target: Target) -> Parameter:
    shape, dtype = self._shape(target), kept_dtype(self._source, target, self._dtype)
    layered = target.rule.layered
    chunks = stored.chunk_shape(self._mesh, target.axes, shape, dtype.itemsize, layered)
    self._tensors[target.rule.target] = {
      "shape": list(shape), "dtype": str(dtype), "chunks": list(chunks), "sources": target.names,
    }  # fmt: skip
    return Parameter(shape, dtype, chunks, functools.partial(self._slices, target))

  def _stretched(self, target: Target) -> bool:
    return self._positions is not None and target.rule.target == "positions"

  def _shape(self, target: Target) -> tuple[int, ...]:
    return (self._positions, *target.shape[1:]) if self._stretched(target) else target.shape

  def _slices(self, target: Target) -> Iterator[tuple[int | None, np.ndarray]]:
    one = target.rule.their_shape(target.shape)
    for layer, name in enumerate(target.names):
      tensor = self._source.read(name)
      if name not in self._sums:  # a fused tensor is read for each of its parts
        self._sums[name] = hashlib.sha256(folders.raw(tensor)).hexdigest()
      piece = target.rule.to_ours(tensor.reshape(one))
      if self._stretched(target):
        piece = np.asarray(clip.stretch_positions(np.asarray(piece), self._positions))
      yield layer if target.rule.layered else None, piece
      del tensor, piece
      self._done += int(np.prod(target.shape)) // len(target.names)
      self._progress(self._done, self._total)

  def finish(self, folder: Path) -> None:
    """Writes everything but the parameters."""
    source, matched, config = self._source, self._matched, self._matched.config
    if self._positions is not None:
      config = dataclasses.replace(config, max_positions=self._positions)
    for name in COPIED:
      if (source.folder / name).is_file():
        shutil.copyfile(source.folder / name, folder / name)
    copied = [folder / name for name in COPIED if (folder / name).is_file()]
    if matched.kept:
      dtypes = {name: folders.FLOATS[source.tensors[name].dtype] for name in matched.kept}
      kept = [ToWrite(name, dtypes[name], source.tensors[name].shape) for name in matched.kept]
      arrays = (source.read(name) for name in matched.kept)
      folders.write_folder(folder, kept, arrays, stem=stored.KEPT)
    record = {
      "format": stored.FORMAT,
      "family": matched.family.name,
      "config": schema.to_plain(config),
      "source": {
        "config": source.config,
        "files": {path.name: sha256_file(path) for path in (*source.files, *copied)},
      },
      "tensors": self._tensors,
      "sources": {name: self._fact(name, digest) for name, digest in self._sums.items()},
      "kept": {
        name: self._fact(name, hashlib.sha256(folders.raw(source.read(name))).hexdigest())
        for name in matched.kept
      },
    }
    write_text_atomic(folder / stored.DESCRIPTION, json.dumps(record, indent=1) + "\n")

  def _fact(self, name: str, digest: str) -> dict[str, Any]:
    tensor = self._source.tensors[name]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": digest}


def kept_dtype(source: Source, target: Target, dtype: str | None) -> np.dtype:
  """The type that a parameter is stored in: `dtype`, or the widest of its tensors that JAX has."""
  found = jnp.result_type(*(folders.FLOATS[source.tensors[n].dtype] for n in target.names))
  return jnp.dtype(dtype) if dtype else jax.dtypes.canonicalize_dtype(found)


def check_floats(source: Source, matched: Match) -> None:
  """Raises UserError where something that is used is not of floating-point numbers."""
  names = (*matched.kept, *(name for target in matched.targets for name in target.names))
  folders.check_floats(source.folder, {name: source.tensors[name] for name in names})


# --------------------------------------------------------------------------------------------------
# Onto the devices, without a conversion.


def read_params(
  source: Source, matched: Match, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> Any:
  """All parameters of a folder of safetensors on the devices, sharded.

  Args:
    source: the folder.
    matched: from `match`.
    mesh: the devices.
    dtype: of the parameters; None: that of the files.
  """
  check_floats(source, matched)
  return rules.nest({t.rule.target: _placed(source, t, mesh, dtype) for t in matched.targets})


def _placed(
  source: Source, target: Target, mesh: jax.sharding.Mesh, dtype: str | None
) -> jax.Array:
  kept = kept_dtype(source, target, dtype)
  layout = sharding_rules.sharding(mesh, target.axes, target.shape)
  layered, one = target.rule.layered, target.rule.their_shape(target.shape)
  array = _zeros(target.shape, kept, layout)() if layered else None
  for index, name in enumerate(target.names):
    piece = _place(target.rule.to_ours(source.read(name).reshape(one)), target, mesh)
    array = _into(layout)(array, piece, index) if layered else _cast(kept, layout)(piece)
  return array


def _place(piece: np.ndarray, target: Target, mesh: jax.sharding.Mesh) -> jax.Array:
  axes = target.axes[1:] if target.rule.layered else target.axes
  layout = sharding_rules.sharding(mesh, axes, piece.shape)
  if piece.dtype == np.float64:  # JAX has none by default
    piece = piece.astype(np.float32)
  # Each device is given its part only, copied out of the file's pages.
  return jax.make_array_from_callback(
    piece.shape, layout, lambda index: np.array(piece[index], order="C")
  )


# One small program for each shape: kept, as layers and models share them.
@functools.lru_cache(maxsize=64)
def _zeros(shape, dtype, layout):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@functools.lru_cache(maxsize=64)
def _into(layout):
  def put(stack, piece, index):
    return jax.lax.dynamic_update_index_in_dim(stack, piece.astype(stack.dtype), index, 0)

  return jax.jit(put, donate_argnums=0, out_shardings=layout)


@functools.lru_cache(maxsize=64)
def _cast(dtype, layout):
  return jax.jit(lambda x: x.astype(dtype), out_shardings=layout)


# --------------------------------------------------------------------------------------------------
# Back.


def tensors(found: Stored) -> Iterator[tuple[ToWrite, Callable[[], np.ndarray]]]:
  """What a folder of ours was made of, under the names that it came with: (tensor, its reader).

  The readers raise UserError where something is damaged.
  """
  for name, pieces in found.pieces().items():
    fact = found.sources[name]
    first = found.tensors[pieces[0].rule.target]
    shape = pieces[0].rule.their_shape(tuple(first["shape"]))
    # A layer that was stored in a wider type than it came in, because others were, narrows again.
    came, kept = folders.FLOATS[fact["dtype"]], _dtype(first["dtype"])
    dtype = came if came.itemsize < kept.itemsize else kept
    if int(np.prod(shape)) == int(np.prod(fact["shape"])):
      to_write = ToWrite(name, dtype, tuple(fact["shape"]))
    else:  # positions that were stretched
      to_write = ToWrite(name, dtype, shape)
    yield to_write, functools.partial(_assemble, found, pieces, to_write, shape)
  if found.kept:
    kept = Source(found.folder / f"{stored.KEPT}.safetensors")
    for name, tensor in kept.tensors.items():
      to_write = ToWrite(name, folders.FLOATS[tensor.dtype], tensor.shape)
      yield to_write, functools.partial(kept.read, name)


def _dtype(name: str) -> np.dtype:
  return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _assemble(found: Stored, pieces, tensor: ToWrite, shape: tuple[int, ...]) -> np.ndarray:
  """One tensor: each of its parts is read into its place."""
  out = np.empty(shape, tensor.dtype)
  for piece in pieces:
    view = piece.rule.to_ours(out)
    found.read_into(piece, view)
    if not np.may_share_memory(view, out):  # patches, which are small, have no such view
      out[...] = piece.rule.to_theirs(view)
  return out.reshape(tensor.shape)


def export(
  found: Stored,
  out: Path,
  *,
  shard_bytes: int = 10 * 2**30,
  progress: Progress | None = None,
) -> tuple[list[Path], int, int]:
  """Writes a folder of ours as safetensors under the names that they came with; it appears
  when it is whole.

  Returns:
    The files; how many tensors have the very bits that they came with; how many there are.

  Raises:
    UserError: `out` exists, the disk is full, or a parameter is damaged.
  """
  listed = list(tensors(found))
  facts = found.sources | found.kept
  same = 0

  def arrays() -> Iterator[np.ndarray]:
    nonlocal same
    for tensor, reader in listed:
      array = reader()
      same += hashlib.sha256(folders.raw(array)).hexdigest() == facts[tensor.name]["sha256"]
      yield array
      del array  # before the next one is made

  with _whole(out) as partial:
    written = folders.write_folder(
      partial, [tensor for tensor, _ in listed], arrays(),
      stem=found.family.file, shard_bytes=shard_bytes, progress=progress,
    )  # fmt: skip
    config = found.family.to_hf(found.config)
    if found.family.verbatim:
      config |= found.source_config
    write_text_atomic(partial / folders.CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    for name in COPIED:
      if (found.folder / name).is_file():
        shutil.copyfile(found.folder / name, partial / name)
    manifest = {path.name: sha256_file(path) for path in written}
    write_text_atomic(partial / "SHA256.json", json.dumps(manifest, indent=2) + "\n")
  return [out / path.name for path in written], same, len(listed)
