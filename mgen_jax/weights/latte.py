"""Latte, DiT and PixArt: their names and shapes against the parameters of `models.latte`.

  released Latte (variant 1)         from_latte, to_latte
  its text-to-video model            from_text_latte, to_text_latte   (names of diffusers)
  DiT, to start from                 from_dit      all blocks in turn; its class table is left out
  PixArt-alpha, to start from        from_pixart   the spatial blocks; temporal ones start anew

All functions take and give numpy arrays; parameters are trees as `Latte.init` makes them, without
boxes. Linear maps of PyTorch are [out, in], ours [in, out]; convolutions of patches are flattened.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mgen_jax.models import latte
from mgen_jax.models.latte import LatteConfig
from mgen_jax.weights.files import WeightsError

Flat = Mapping[str, np.ndarray]
Tree = dict[str, Any]

# Computed, not learned: in the files of others, and checked rather than read.
_FIXED = ("pos_embed", "temp_embed", "pos_embed.pos_embed", "temp_pos_embed")


# --------------------------------------------------------------------------------------------------
# The released Latte, and DiT.


def from_latte(flat: Flat, config: LatteConfig) -> Tree:
  """Parameters of variant 1 (or 2, its blocks in order) from the released names.

  Raises:
    WeightsError: a name is missing or too many, or a shape differs: another size, another variant,
      another number of classes.
  """
  _need(config, "s_adaln", "the released Latte")
  reader = _Reader(flat, "a Latte checkpoint", config)
  blocks = [_read_block(reader, f"blocks.{i}", config.width) for i in range(config.layers)]
  params = {
    **_stacks(blocks, config),
    "patch_in": reader.patches("x_embedder.proj", config),
    "time": _read_time(reader, "t_embedder.mlp.0", "t_embedder.mlp.2", config),
    "head_modulation": reader.linear(
      "final_layer.adaLN_modulation.1", config.width, 2 * config.width
    ),
    "head": reader.linear("final_layer.linear", config.width, _head_values(config)),
  }
  if config.classes:
    params["classes"] = reader.take(
      "y_embedder.embedding_table.weight", (config.classes + 1, config.width)
    )
  reader.finish()
  return params


def to_latte(params: Tree, config: LatteConfig, rows: int = 0, frames: int = 16) -> dict:
  """The released names from parameters of variant 1: what `from_latte` reads.

  Args:
    params: of the model; config: its config.
    rows: patches along a side of the (square) picture, for the fixed table "pos_embed" that the
      released code keeps in its files; 0: those of 32 latents.
    frames: likewise, of "temp_embed".

  Raises:
    WeightsError: the model is none that the released code has.
  """
  if config.variant != 1:
    raise WeightsError(
      f"variant {config.variant} has no released code that could read it: only variant 1 can be "
      "exported."
    )
  _need(config, "s_adaln", "the released Latte")
  writer: dict[str, np.ndarray] = {}
  rows = rows or 32 // config.patch
  writer["pos_embed"] = latte.patch_positions(config, rows, rows)[None]
  writer["temp_embed"] = latte.sincos(config.width, tuple(range(frames)))[None]
  _write_patches(writer, "x_embedder.proj", params["patch_in"], config)
  _write_linear(writer, "t_embedder.mlp.0", params["time"]["in"])
  _write_linear(writer, "t_embedder.mlp.2", params["time"]["out"])
  for index, block in enumerate(_unstack(params, config)):
    _write_block(writer, f"blocks.{index}", block)
  _write_linear(writer, "final_layer.adaLN_modulation.1", params["head_modulation"])
  _write_linear(writer, "final_layer.linear", params["head"])
  if config.classes:
    writer["y_embedder.embedding_table.weight"] = np.asarray(params["classes"])
  return writer


def from_dit(flat: Flat, config: LatteConfig, fresh: Tree) -> Tree:
  """Parameters that start from DiT: all its blocks in turn, spatial and temporal alike.

  The released code copies every tensor whose name it knows. DiT's table of 1000 classes is left
  out; this model's own classes are those of `fresh`.

  Args:
    flat: a DiT of the same size ("DiT-XL/2" for "XL/2").
    config: of the model.
    fresh: its parameters at the start.

  Raises:
    WeightsError: it is no DiT of this size.
  """
  plain = {name: a for name, a in flat.items() if not name.startswith("y_embedder.")}
  made = from_latte(plain, dataclasses.replace(config, classes=0))
  if config.classes:
    made["classes"] = np.asarray(fresh["classes"])
  return made


# --------------------------------------------------------------------------------------------------
# Text to video, and PixArt.


def from_text_latte(flat: Flat, config: LatteConfig) -> Tree:
  """Parameters of the text-to-video model (variant 1, adaLN-single) from the names of diffusers.

  Raises:
    WeightsError: see `from_latte`.
  """
  _need(config, "adaln_single", "the released text-to-video model")
  reader = _Reader(flat, "a LatteTransformer3DModel", config)
  half = config.layers // 2
  spatial = [_read_text_block(reader, f"transformer_blocks.{i}", config, True) for i in range(half)]
  temporal = [
    _read_text_block(reader, f"temporal_transformer_blocks.{i}", config, False) for i in range(half)
  ]
  params = _stacks([b for pair in zip(spatial, temporal, strict=True) for b in pair], config)
  params |= _read_text_frame(reader, config)
  reader.finish()
  return params


def from_pixart(flat: Flat, config: LatteConfig, fresh: Tree) -> Tree:
  """Parameters that start from PixArt-alpha: its blocks become the spatial ones.

  Temporal blocks are those of `fresh`. Size conditions, which the 1024 px model has, are left out.

  Args:
    flat: a PixArtTransformer2DModel in the names of diffusers.
    config: of a text-to-video model with half as many spatial blocks as it has layers.
    fresh: its parameters at the start.

  Raises:
    WeightsError: it is no PixArt of this size.
  """
  _need(config, "adaln_single", "PixArt")
  unused = ("adaln_single.emb.resolution_embedder.", "adaln_single.emb.aspect_ratio_embedder.")
  plain = {name: a for name, a in flat.items() if not name.startswith(unused)}
  reader = _Reader(plain, "a PixArtTransformer2DModel", config)
  half = config.layers // 2
  spatial = [_read_text_block(reader, f"transformer_blocks.{i}", config, True) for i in range(half)]
  temporal = _unstack(jax.tree.map(np.asarray, fresh), config)[1::2]
  params = _stacks([b for pair in zip(spatial, temporal, strict=True) for b in pair], config)
  params |= _read_text_frame(reader, config)
  reader.finish()
  return params


def to_text_latte(params: Tree, config: LatteConfig) -> dict[str, np.ndarray]:
  """The names of diffusers from parameters of a text-to-video model of variant 1.

  Raises:
    WeightsError: the model is none that diffusers has.
  """
  _need(config, "adaln_single", "the released text-to-video model")
  if config.variant != 1:
    raise WeightsError(
      f"variant {config.variant} has no released code that could read it: only variant 1 can be "
      "exported."
    )
  writer: dict[str, np.ndarray] = {}
  _write_patches(writer, "pos_embed.proj", params["patch_in"], config)
  time = "adaln_single.emb.timestep_embedder"
  _write_linear(writer, f"{time}.linear_1", params["time"]["in"])
  _write_linear(writer, f"{time}.linear_2", params["time"]["out"])
  _write_linear(writer, "adaln_single.linear", params["modulation"])
  _write_linear(writer, "caption_projection.linear_1", params["context_0_in"])
  _write_linear(writer, "caption_projection.linear_2", params["context_0_out"])
  for index, block in enumerate(_unstack(params, config)):
    kind = "temporal_transformer_blocks" if index % 2 else "transformer_blocks"
    prefix = f"{kind}.{index // 2}"
    writer[f"{prefix}.scale_shift_table"] = np.asarray(block["modulation"])
    parts = {"attn1": block["attention"]}
    if index % 2 == 0:
      parts["attn2"] = block["cross_attention"]
    for name, attention in parts.items():
      for theirs, ours in _HEADS.items():
        _write_linear(writer, f"{prefix}.{name}.{theirs}", attention[ours])
    _write_linear(writer, f"{prefix}.ff.net.0.proj", block["mlp"]["up"])
    _write_linear(writer, f"{prefix}.ff.net.2", block["mlp"]["down"])
  writer["scale_shift_table"] = np.asarray(params["head_modulation"])
  _write_linear(writer, "proj_out", params["head"])
  return writer


_HEADS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}


def _read_text_block(reader: "_Reader", prefix: str, config: LatteConfig, cross: bool) -> Tree:
  width, hidden = config.width, config.mlp_width
  block = {
    "modulation": reader.take(f"{prefix}.scale_shift_table", (6, width)),
    "mlp": {
      "up": reader.linear(f"{prefix}.ff.net.0.proj", width, hidden),
      "down": reader.linear(f"{prefix}.ff.net.2", hidden, width),
    },
  }
  names = {"attention": "attn1", "cross_attention": "attn2"} if cross else {"attention": "attn1"}
  for ours, theirs in names.items():
    block[ours] = {
      name: reader.linear(f"{prefix}.{theirs}.{key}", width, width) for key, name in _HEADS.items()
    }
  return block


def _read_text_frame(reader: "_Reader", config: LatteConfig) -> Tree:
  """All but the blocks."""
  time, width = "adaln_single.emb.timestep_embedder", config.width
  caption = "caption_projection.linear"
  return {
    "patch_in": reader.patches("pos_embed.proj", config),
    "time": _read_time(reader, f"{time}.linear_1", f"{time}.linear_2", config),
    "modulation": reader.linear("adaln_single.linear", width, 6 * width),
    "context_0_in": reader.linear(f"{caption}_1", config.context_widths[0], width),
    "context_0_out": reader.linear(f"{caption}_2", width, width),
    "head_modulation": reader.take("scale_shift_table", (2, width)),
    "head": reader.linear("proj_out", width, _head_values(config)),
  }


# --------------------------------------------------------------------------------------------------
# Pieces.


class _Reader:
  """Takes arrays out of a flat dict, checks their shapes, and knows what was not taken."""

  def __init__(self, flat: Flat, what: str, config: LatteConfig):
    self._flat = {name.removeprefix("module."): array for name, array in flat.items()}
    self._left = set(self._flat)
    self._what = what
    self._config = config

  def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in self._flat:
      raise WeightsError(
        f"these weights have no {name!r}, so they are not {self._what} of {self._described()}: "
        "give the size, the variant and the classes that they were trained with."
      )
    array = np.asarray(self._flat[name], np.float32)
    self._left.discard(name)
    if array.shape != shape:
      raise WeightsError(
        f"{name!r} has the shape {array.shape} and {self._described()} needs {shape}: give the "
        "size, the variant and the classes that the weights were trained with."
      )
    return array

  def linear(self, name: str, inputs: int, outputs: int) -> Tree:
    return {
      "kernel": self.take(f"{name}.weight", (outputs, inputs)).T,
      "bias": self.take(f"{name}.bias", (outputs,)),
    }

  def patches(self, name: str, config: LatteConfig) -> Tree:
    """A convolution [D, C, p, p] as a map of flattened patches (row, column, channel)."""
    p, channels, width = config.patch, config.in_channels, config.width
    kernel = self.take(f"{name}.weight", (width, channels, p, p))
    return {
      "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, width),
      "bias": self.take(f"{name}.bias", (width,)),
    }

  def finish(self) -> None:
    left = sorted(self._left - set(_FIXED))
    if left:
      raise WeightsError(
        f"these weights have {len(left)} arrays that {self._described()} does not, like "
        f"{left[0]!r}: give the size, the variant and the classes that they were trained with."
      )

  def _described(self) -> str:
    c = self._config
    return (
      f"a model of variant {c.variant}, {c.layers} layers, width {c.width}, patch {c.patch}, "
      f"{c.classes} classes"
    )


def _need(config: LatteConfig, conditioning: str, what: str) -> None:
  separate = config.variant in (1, 2) and config.embedding == "uniform"
  if not separate or config.conditioning != conditioning:
    raise WeightsError(
      f"{what} has variant 1, embedding 'uniform' and conditioning {conditioning!r}: a model of "
      f"variant {config.variant}, {config.embedding!r} and {config.conditioning!r} cannot take its "
      "weights."
    )


def _head_values(config: LatteConfig) -> int:
  return config.patch**2 * config.out_channels


def _read_time(reader: _Reader, first: str, second: str, config: LatteConfig) -> Tree:
  return {
    "in": reader.linear(first, latte.TIME_FREQUENCIES, config.width),
    "out": reader.linear(second, config.width, config.width),
  }


def _read_block(reader: _Reader, prefix: str, width: int) -> Tree:
  fused = reader.linear(f"{prefix}.attn.qkv", width, 3 * width)
  kernels, biases = np.split(fused["kernel"], 3, 1), np.split(fused["bias"], 3)
  attention = {
    name: {"kernel": kernel, "bias": bias}
    for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
  }
  attention["out"] = reader.linear(f"{prefix}.attn.proj", width, width)
  return {
    "attention": attention,
    "mlp": {
      "up": reader.linear(f"{prefix}.mlp.fc1", width, 4 * width),
      "down": reader.linear(f"{prefix}.mlp.fc2", 4 * width, width),
    },
    "modulation": reader.linear(f"{prefix}.adaLN_modulation.1", width, 6 * width),
  }


def _write_block(writer: dict, prefix: str, block: Tree) -> None:
  attention = [block["attention"][name] for name in ("query", "key", "value")]
  fused = {
    "kernel": np.concatenate([part["kernel"] for part in attention], 1),
    "bias": np.concatenate([part["bias"] for part in attention]),
  }
  _write_linear(writer, f"{prefix}.attn.qkv", fused)
  _write_linear(writer, f"{prefix}.attn.proj", block["attention"]["out"])
  _write_linear(writer, f"{prefix}.mlp.fc1", block["mlp"]["up"])
  _write_linear(writer, f"{prefix}.mlp.fc2", block["mlp"]["down"])
  _write_linear(writer, f"{prefix}.adaLN_modulation.1", block["modulation"])


def _write_linear(writer: dict, name: str, params: Tree) -> None:
  writer[f"{name}.weight"] = np.ascontiguousarray(np.asarray(params["kernel"]).T)
  writer[f"{name}.bias"] = np.asarray(params["bias"])


def _write_patches(writer: dict, name: str, params: Tree, config: LatteConfig) -> None:
  p, channels = config.patch, config.in_channels
  kernel = np.asarray(params["kernel"]).reshape(p, p, channels, config.width)
  writer[f"{name}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
  writer[f"{name}.bias"] = np.asarray(params["bias"])


def _stacks(blocks: list[Tree], config: LatteConfig) -> Tree:
  """Blocks in order -> the stacks that the layers are scanned over."""
  if config.variant == 1:
    return {"layers": {"spatial": _stack(blocks[0::2]), "temporal": _stack(blocks[1::2])}}
  half = config.layers // 2
  return {
    "spatial_layers": {"block": _stack(blocks[:half])},
    "temporal_layers": {"block": _stack(blocks[half:])},
  }


def _stack(trees: Iterable[Tree]) -> Tree:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _unstack(params: Tree, config: LatteConfig) -> list[Tree]:
  """The blocks of variant 1 in order."""

  def pick(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)

  kinds = ("spatial", "temporal")
  pairs = range(config.layers // 2)
  return [pick(params["layers"][kind], index) for index in pairs for kind in kinds]


def start_from(flat: Flat, config: LatteConfig, fresh: Tree) -> Tree:
  """Parameters of a model that starts from whatever `flat` is: Latte, DiT, PixArt.

  Raises:
    WeightsError: none of these, or of another size or variant.
  """
  names = {name.removeprefix("module.") for name in flat}
  if "temporal_transformer_blocks.0.scale_shift_table" in names:
    return from_text_latte(flat, config)
  if "transformer_blocks.0.scale_shift_table" in names:
    return from_pixart(flat, config, fresh)
  if "temp_embed" in names:
    return from_latte(flat, config)
  if "x_embedder.proj.weight" in names:
    return from_dit(flat, config, fresh)
  few = ", ".join(sorted(names)[:3])
  raise WeightsError(
    f"these weights ({len(names)} arrays, like {few}) are neither Latte, DiT nor PixArt in the "
    "names of their released files or of diffusers."
  )
