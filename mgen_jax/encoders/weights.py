"""Weights of an encoder: from safetensors to our folders and back, tensor by tensor.

  FOLDER/encoder.json       family, config, manifest: SHA-256 of every source tensor and file
  FOLDER/params/PATH/       one Orbax checkpoint for each parameter, sharded, "/" written as "."
  FOLDER/spiece.model ...   the tokenizer's file

One checkpoint for each parameter, and not one for all, so that no more than one parameter (all
layers of a matrix) and one source tensor are in memory at a time: a model larger than the memory
can be converted, also on a CPU. Not here: the command (`mgen_jax/convert.py`).
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from mgen_jax import schema
from mgen_jax.data.files import sha256_file, write_text_atomic
from mgen_jax.encoders import families, files, tokenizers
from mgen_jax.encoders.families import FAMILIES, Rule
from mgen_jax.errors import UserError
from mgen_jax.models import clip
from mgen_jax.parallel import rules as sharding_rules

ENCODER_NAME = "encoder.json"
PARAMS_NAME = "params"
FORMAT = 1
COPIED = (
  *(*tokenizers.SENTENCEPIECE_FILES, tokenizers.TOKENIZER_FILE, "tokenizer_config.json"),
  *("special_tokens_map.json", "preprocessor_config.json", "generation_config.json"),
)

Progress = Callable[[int, int], None]


# --------------------------------------------------------------------------------------------------
# What belongs to what.


class Target(NamedTuple):
  """A parameter and the tensors that it is made of, layer by layer."""

  rule: Rule
  shape: tuple[int, ...]  # of the parameter
  axes: tuple[str | None, ...]  # logical names of its dimensions
  names: tuple[str, ...]  # in the files


@dataclasses.dataclass(frozen=True)
class Match:
  """How a folder and an encoder fit.

  Attributes:
    family, config: of the encoder.
    targets: every parameter for which all tensors are there.
    missing: canonical names that no file has.
    misshaped: what has another shape than the config says.
    unmapped: names in the files that the family does not know.
    ignored: names in the files that are of no use here (decoder, other tower, buffers).
  """

  family: str
  config: Any
  targets: tuple[Target, ...]
  missing: tuple[str, ...]
  misshaped: tuple[str, ...]
  unmapped: tuple[str, ...]
  ignored: tuple[str, ...]

  def complain(self, folder: Path) -> None:
    """Raises UserError that lists everything that does not fit."""
    lists = {"missing": self.missing, "misshaped": self.misshaped, "unmapped": self.unmapped}
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names]
    if found:
      raise UserError(
        f"the weights in {folder} do not fit {self.family} as its config.json describes it: "
        f"{'; '.join(found)}."
      )


def match(source: files.Source, family: str | None = None) -> Match:
  """Compares a folder with the encoder that its config.json describes.

  Args:
    source: the folder.
    family: which part of the model, where it has several (the towers of a CLIP).

  Raises:
    UserError: the model is of no family that is known here.
  """
  family = pick_family(source, family)
  made = FAMILIES[family]
  canonical = {name: made.canonical(name) for name in source.tensors}
  actual: dict[str, str] = {}
  ignored = [name for name, known in canonical.items() if known is None]
  for name, known in canonical.items():
    if known is None:
      continue
    if known in actual:  # an alias: the same tensor under a second name
      keep, drop = sorted((actual[known], name), key=lambda n: n != known)
      actual[known] = keep
      ignored.append(drop)
    else:
      actual[known] = name
  config = made.from_hf(source.config, actual.keys())
  return _compare(family, config, actual, source, ignored)


def pick_family(source: files.Source, family: str | None) -> str:
  """The family of a folder.

  Raises:
    UserError: it is not known, or there are two and none is named.
  """
  kind = str(source.config.get("model_type"))
  known = families.MODEL_TYPES.get(kind)
  if known is None:
    raise UserError(
      f"{source.folder / files.CONFIG_NAME} says model_type {kind!r}, which is not known: "
      f"{', '.join(families.MODEL_TYPES)} are."
    )
  towers = {"clip_text": "vision_model.", "clip_vision": "text_model."}
  if len(known) > 1 and family is None:
    # What holds nothing of the other tower is one tower.
    alone = [f for f in known if not any(n.startswith(towers[f]) for n in source.tensors)]
    known = tuple(alone) or known
  if family is None and len(known) > 1:
    raise UserError(f"{source.folder} holds {' and '.join(known)}: name one of them (--tower).")
  if family is not None and family not in known:
    raise UserError(f"{source.folder} holds {' and '.join(known)}, and no {family}.")
  return known[0] if family is None else family


def _compare(
  family: str, config: Any, actual: Mapping[str, str], source: files.Source, ignored: list[str]
) -> Match:
  targets, missing, misshaped, used = [], [], [], set()
  shapes = _boxes(family, config)
  for rule in FAMILIES[family].rules(config):
    box = shapes[rule.target]
    shape, axes = tuple(box.value.shape), tuple(box.names)
    one = families.their_shape(shape[1:] if rule.layered else shape, rule.transform)
    wanted = [rule.source.format(i=i) for i in range(shape[0])] if rule.layered else [rule.source]
    names = []
    for name in wanted:
      used.add(name)
      if name not in actual:
        missing.append(name)
      elif source.tensors[actual[name]].shape != one:
        found = source.tensors[actual[name]].shape
        misshaped.append(f"{actual[name]} {list(found)} instead of {list(one)}")
      else:
        names.append(actual[name])
    if len(names) == len(wanted):
      targets.append(Target(rule, shape, axes, tuple(names)))
  unmapped = [name for known, name in actual.items() if known not in used]
  if family == "llama" and config.tied:
    ignored = [*ignored, *(n for n in unmapped if n == "lm_head.weight")]
    unmapped = [n for n in unmapped if n != "lm_head.weight"]
  lists = (missing, misshaped, sorted(unmapped), sorted(ignored))
  return Match(family, config, tuple(targets), *map(tuple, lists))


def _boxes(family: str, config: Any) -> dict[str, nn.LogicallyPartitioned]:
  """Shapes of the parameters by path, in their boxes."""
  boxed = families.boxed_shapes(family, config)
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): box for path, box in leaves}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *folders, last = path.split("/")
    node = tree
    for name in folders:
      node = node.setdefault(name, {})
    node[last] = value
  return tree


# --------------------------------------------------------------------------------------------------
# Onto the devices.


def stream(
  source: files.Source, matched: Match, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> Iterator[tuple[Target, jax.Array, list[dict[str, Any]]]]:
  """Each parameter on the devices, sharded, with the manifest of its source tensors.

  Keep no reference to one beyond its turn: what is on the host then is one source tensor.

  Args:
    source: the folder.
    matched: from `match`.
    mesh: the devices.
    dtype: of the parameters; None: that of the files.
  """
  files.check_floats(
    source.folder, {n: source.tensors[n] for t in matched.targets for n in t.names}
  )
  for target in matched.targets:
    found = jnp.result_type(*(files.FLOATS[source.tensors[n].dtype] for n in target.names))
    kept = jnp.dtype(dtype) if dtype else jax.dtypes.canonicalize_dtype(found)
    layout = sharding_rules.sharding(mesh, target.axes, target.shape)
    facts: list[dict[str, Any]] = []
    layered = target.rule.layered
    array = _zeros(target.shape, kept, layout)() if layered else None
    for index, name in enumerate(target.names):
      tensor = source.read(name)
      facts.append(_fact(name, source.tensors[name], tensor))
      piece = _place(families.to_ours(tensor, target.rule.transform), target, mesh)
      del tensor
      if layered:
        array = _into(layout)(array, piece, index)
      else:
        array = _cast(kept, layout)(piece)
    yield target, array, facts
    array = piece = None  # before the next one is made


def _place(piece: np.ndarray, target: Target, mesh: jax.sharding.Mesh) -> jax.Array:
  axes = target.axes[1:] if target.rule.layered else target.axes
  layout = sharding_rules.sharding(mesh, axes, piece.shape)
  if piece.dtype == np.float64:  # JAX has none by default
    piece = piece.astype(np.float32)
  # Each device is given its part only, copied out of the file's pages.
  return jax.make_array_from_callback(
    piece.shape, layout, lambda index: np.ascontiguousarray(piece[index])
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


def _fact(name: str, tensor: files.Tensor, array: np.ndarray) -> dict[str, Any]:
  return {
    "name": name,
    "dtype": tensor.dtype,
    "shape": list(tensor.shape),
    "sha256": hashlib.sha256(files.raw(array)).hexdigest(),
  }


# --------------------------------------------------------------------------------------------------
# Our folders.


@dataclasses.dataclass(frozen=True)
class Stored:
  """What encoder.json of one of our folders says.

  Attributes:
    folder: where it is.
    family, config: of the encoder, in the dtype that it was stored in.
    tensors: {path: {"shape", "dtype", "sources"}}.
  """

  folder: Path
  family: str
  config: Any
  tensors: dict[str, Any]

  @property
  def digest(self) -> str:
    """Of all weights: what "the same encoder" means."""
    sums = [s["sha256"] for path in sorted(self.tensors) for s in self.tensors[path]["sources"]]
    dtypes = [self.tensors[path]["dtype"] for path in sorted(self.tensors)]
    return hashlib.sha256(repr((self.family, self.config, dtypes, sums)).encode()).hexdigest()[:16]


def is_stored(folder: Path | str) -> bool:
  """Whether a folder is one of ours."""
  return (Path(folder) / ENCODER_NAME).is_file()


def read_stored(folder: Path | str) -> Stored:
  """The description of one of our folders; no weight is read.

  Raises:
    UserError: it is none, or of another version.
  """
  folder = Path(folder)
  if not is_stored(folder):
    raise UserError(
      f"{folder} holds no converted encoder: make it with python -m mgen_jax.convert "
      f"--source=HF_FOLDER --out={folder}."
    )
  record = files.read_json(folder / ENCODER_NAME)
  if record.get("format") != FORMAT or record.get("family") not in FAMILIES:
    raise UserError(f"{folder / ENCODER_NAME} is of another version: convert the weights again.")
  family = record["family"]
  config = schema.build(FAMILIES[family].config, record["config"], f"{folder / ENCODER_NAME}")
  return Stored(folder, family, config, record["tensors"])


def save(
  source: files.Source,
  matched: Match,
  out: Path,
  mesh: jax.sharding.Mesh,
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
    mesh: the devices, over which each parameter is sharded while it is written.
    dtype: of the parameters; None: that of the files.
    positions: of a CLIP text tower: stretch its table to so many (see `clip.stretch_positions`).
    progress: called with (bytes done, bytes in all).

  Raises:
    UserError: `out` exists, the disk is full, or a tensor cannot be read.
  """
  if out.exists():
    raise UserError(f"{out} exists already: delete it, or name another folder.")
  config = matched.config
  if positions is not None:
    if matched.family != "clip_text":
      raise UserError(f"--positions is of text towers: {matched.family} has no such table.")
    config = dataclasses.replace(config, max_positions=positions)
  partial = out.with_name(f"{out.name}.partial")  # an earlier attempt's is of no use
  shutil.rmtree(partial, ignore_errors=True)
  total = sum(int(np.prod(t.shape)) for t in matched.targets)
  done, tensors = 0, {}
  try:
    (partial / PARAMS_NAME).mkdir(parents=True)
    for target, array, facts in stream(source, matched, mesh, dtype):
      if positions is not None and target.rule.target == "positions":
        array = clip.stretch_positions(array, positions)
      _save_one(partial, target.rule.target, array)
      tensors[target.rule.target] = {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "sources": facts,
      }
      del array
      done += int(np.prod(target.shape))
      if progress:
        progress(done, total)
    _write_description(source, matched.family, config, tensors, partial)
    partial.rename(out)
  except OSError as error:
    raise UserError(f"{out} could not be written ({error.strerror}): make room.") from error
  return read_stored(out)


def _write_description(
  source: files.Source, family: str, config: Any, tensors: dict[str, Any], folder: Path
) -> None:
  for name in COPIED:
    if (source.folder / name).is_file():
      shutil.copyfile(source.folder / name, folder / name)
  copied = [folder / name for name in COPIED if (folder / name).is_file()]
  record = {
    "format": FORMAT,
    "family": family,
    "config": schema.to_plain(config),
    "source": {
      "config": source.config,
      "files": {path.name: sha256_file(path) for path in (*source.files, *copied)},
    },
    "tensors": tensors,
  }
  write_text_atomic(folder / ENCODER_NAME, json.dumps(record, indent=1) + "\n")


def _item(folder: Path, path: str) -> Path:
  return (folder / PARAMS_NAME / path.replace("/", ".")).absolute()


def _save_one(folder: Path, path: str, array: jax.Array) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(_item(folder, path), {"value": array})


def restore_one(stored: Stored, path: str, layout: Any, dtype: Any = None) -> jax.Array:
  """One parameter, laid out and cast.

  Raises:
    UserError: it is missing or damaged.
  """
  entry = stored.tensors[path]
  shape = jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype or entry["dtype"], sharding=layout)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(_item(stored.folder, path), {"value": shape})["value"]
  except Exception as error:  # Orbax and TensorStore raise several types, plain ones among them
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
      f"{_item(stored.folder, path)} is damaged ({first_line}): convert the weights again."
    ) from error


def layouts(family: str, config: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Where each parameter lies, by path: as the rules table says."""
  return {
    path: sharding_rules.sharding(mesh, box.names, box.value.shape)
    for path, box in _boxes(family, config).items()
  }


def restore(stored: Stored, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Any:
  """All parameters of a folder of ours on the devices.

  Raises:
    UserError: something is missing or damaged.
  """
  wanted = layouts(stored.family, stored.config, mesh)
  lost = sorted(set(wanted) - set(stored.tensors))
  if lost:
    raise UserError(f"{stored.folder / ENCODER_NAME} lacks {', '.join(lost)}: convert it again.")
  kept = jnp.dtype(dtype) if dtype else None
  return _nest({path: restore_one(stored, path, wanted[path], kept) for path in wanted})


def read_params(
  source: files.Source, matched: Match, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> Any:
  """All parameters of a folder of safetensors on the devices, without a conversion."""
  loaded = stream(source, matched, mesh, dtype)
  return _nest({target.rule.target: array for target, array, _ in loaded})


# --------------------------------------------------------------------------------------------------
# Back.


def export(
  stored: Stored,
  out: Path,
  mesh: jax.sharding.Mesh,
  *,
  shard_bytes: int = 10 * 2**30,
  progress: Progress | None = None,
) -> tuple[list[Path], int, int]:
  """Writes a folder of ours as safetensors under the names that they came with.

  Returns:
    The files; how many tensors have the very bits that they came with; how many there are.

  Raises:
    UserError: `out` exists, the disk is full, or a parameter is damaged.
  """
  if out.exists():
    raise UserError(f"{out} exists already: delete it, or name another folder.")
  transforms = {
    rule.target: rule.transform for rule in FAMILIES[stored.family].rules(stored.config)
  }
  listed = []  # (path, layer or None, tensor, sha256 of the source)
  for path, entry in stored.tensors.items():
    kept = np.dtype(entry["dtype"]) if entry["dtype"] != "bfloat16" else ml_dtypes.bfloat16
    layered = path.startswith("layers/")
    shape = tuple(entry["shape"])[1:] if layered else tuple(entry["shape"])
    theirs = families.their_shape(shape, transforms[path])
    for index, fact in enumerate(entry["sources"]):
      # A layer that was stored in a wider type than it came in, because others were, narrows again.
      came = files.FLOATS[fact["dtype"]]
      dtype = came if came.itemsize < np.dtype(kept).itemsize else np.dtype(kept)
      tensor = files.ToWrite(fact["name"], dtype, theirs)
      listed.append((path, index if layered else None, tensor, fact["sha256"]))
  same = 0

  def arrays() -> Iterator[np.ndarray]:
    nonlocal same
    held, value = None, None
    where = layouts(stored.family, stored.config, mesh)
    for path, index, tensor, digest in listed:
      if path != held:
        held, value = path, None  # let the one before go first
        value = restore_one(stored, path, where[path])
      piece = np.asarray(value if index is None else value[index])
      piece = np.ascontiguousarray(families.to_theirs(piece, transforms[path]).astype(tensor.dtype))
      same += hashlib.sha256(files.raw(piece)).hexdigest() == digest
      yield piece

  out.mkdir(parents=True)
  tensors = [tensor for _, _, tensor, _ in listed]
  written = files.write_folder(out, tensors, arrays(), shard_bytes=shard_bytes, progress=progress)
  config = FAMILIES[stored.family].to_hf(stored.config)
  write_text_atomic(out / files.CONFIG_NAME, json.dumps(config, indent=2) + "\n")
  for name in COPIED:
    if (stored.folder / name).is_file():
      shutil.copyfile(stored.folder / name, out / name)
  manifest = {path.name: sha256_file(path) for path in written}
  write_text_atomic(out / "SHA256.json", json.dumps(manifest, indent=2) + "\n")
  return written, same, len(listed)
