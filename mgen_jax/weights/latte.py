"""Latte, DiT and PixArt: their names and shapes against the parameters of `models.latte`.

  released Latte (variant 1)         from_latte, to_latte
  its text-to-video model            from_text_latte, to_text_latte   (names of diffusers)
  DiT, to start from                 from_dit      all blocks in turn; its class table is left out
  PixArt-alpha, to start from        from_pixart   the spatial blocks; temporal ones start anew

All functions take and give numpy arrays; parameters are trees as `Latte.init` makes them, without
boxes. The same rules, as families, are what `python -m mgen_jax.convert` goes by.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import UserError
from mgen_jax.models import latte
from mgen_jax.models.latte import LatteConfig
from mgen_jax.weights import rules as rules_lib
from mgen_jax.weights.checks import WeightsError
from mgen_jax.weights.rules import Family, Rule, Shape

Flat = Mapping[str, np.ndarray]
Tree = dict[str, Any]

_CLASSES = "y_embedder.embedding_table.weight"
# Computed, not learned: in the files of others, and nothing is read of them.
_TABLES = ("pos_embed", "temp_embed", "pos_embed.pos_embed", "temp_pos_embed")
# Of PixArt's model for 1024 px, which is told sizes.
_SIZES = ("adaln_single.emb.resolution_embedder.", "adaln_single.emb.aspect_ratio_embedder.")


# --------------------------------------------------------------------------------------------------
# Rules.


def _dense(ours: str, theirs: str, **how: Any) -> tuple[Rule, Rule]:
  return (
    Rule(f"{ours}/kernel", f"{theirs}.weight", "transpose", **how),
    Rule(f"{ours}/bias", f"{theirs}.bias", **how),
  )


def _patches(theirs: str, config: LatteConfig) -> tuple[Rule, Rule]:
  return (
    Rule("patch_in/kernel", f"{theirs}.weight", "patches", patch=config.patch),
    Rule("patch_in/bias", f"{theirs}.bias"),
  )


def _stacks(config: LatteConfig) -> tuple[tuple[str, int, int], ...]:
  """(path, first block, step) of each stack that the layers are scanned over."""
  if config.variant == 1:
    return ("layers/spatial", 0, 2), ("layers/temporal", 1, 2)
  half = config.layers // 2
  return ("spatial_layers/block", 0, 1), ("temporal_layers/block", half, 1)


def _released_rules(config: LatteConfig) -> tuple[Rule, ...]:
  made = [
    *_patches("x_embedder.proj", config),
    *_dense("time/in", "t_embedder.mlp.0"),
    *_dense("time/out", "t_embedder.mlp.2"),
  ]
  if config.classes:
    made.append(Rule("classes", _CLASSES))
  for stack, first, step in _stacks(config):
    blocks = {"first": first, "step": step}
    for part, name in enumerate(("query", "key", "value")):
      fused = {**blocks, "part": (part, 3)}
      made += _dense(f"{stack}/attention/{name}", "blocks.{i}.attn.qkv", **fused)
    made += _dense(f"{stack}/attention/out", "blocks.{i}.attn.proj", **blocks)
    made += _dense(f"{stack}/mlp/up", "blocks.{i}.mlp.fc1", **blocks)
    made += _dense(f"{stack}/mlp/down", "blocks.{i}.mlp.fc2", **blocks)
    made += _dense(f"{stack}/modulation", "blocks.{i}.adaLN_modulation.1", **blocks)
  made += _dense("head_modulation", "final_layer.adaLN_modulation.1")
  made += _dense("head", "final_layer.linear")
  return tuple(made)


_HEADS = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}


def _text_rules(config: LatteConfig) -> tuple[Rule, ...]:
  return (*_pixart_rules(config), *_text_blocks("temporal", "temporal_transformer_blocks", ("1",)))


def _pixart_rules(config: LatteConfig) -> tuple[Rule, ...]:
  """All but the temporal blocks."""
  time = "adaln_single.emb.timestep_embedder"
  return (
    *_patches("pos_embed.proj", config),
    *_dense("time/in", f"{time}.linear_1"),
    *_dense("time/out", f"{time}.linear_2"),
    *_dense("modulation", "adaln_single.linear"),
    *_dense("context_0_in", "caption_projection.linear_1"),
    *_dense("context_0_out", "caption_projection.linear_2"),
    *_text_blocks("spatial", "transformer_blocks", ("1", "2")),
    Rule("head_modulation", "scale_shift_table"),
    *_dense("head", "proj_out"),
  )


def _text_blocks(ours: str, theirs: str, attentions: tuple[str, ...]) -> Iterator[Rule]:
  stack, block = f"layers/{ours}", theirs + ".{i}"
  yield Rule(f"{stack}/modulation", f"{block}.scale_shift_table")
  for number in attentions:
    name = "attention" if number == "1" else "cross_attention"
    for mine, their in _HEADS.items():
      yield from _dense(f"{stack}/{name}/{mine}", f"{block}.attn{number}.{their}")
  yield from _dense(f"{stack}/mlp/up", f"{block}.ff.net.0.proj")
  yield from _dense(f"{stack}/mlp/down", f"{block}.ff.net.2")


# --------------------------------------------------------------------------------------------------
# Their configs.


def _released_config(hf: Mapping[str, Any], shapes: Mapping[str, Shape]) -> LatteConfig:
  """From the shapes: the released files have no config.json. Ours says how many heads there are,
  which no shape does; the published sizes are known by their width."""
  wanted = {"x_embedder.proj.weight": 4, "final_layer.linear.bias": 1, "blocks.0.mlp.fc1.bias": 1}
  lost = [name for name, axes in wanted.items() if len(shapes.get(name, ())) != axes]
  if lost:
    raise UserError(f"the weights lack {', '.join(lost)}, by which their size is known.")
  width, channels, patch, _ = shapes["x_embedder.proj.weight"]
  heads = hf.get("num_heads", latte.HEADS.get(width))
  if heads is None:
    raise UserError(
      f"the weights have a width of {width}, which is no published size: write how many heads they "
      'have into a config.json beside them, like {"num_heads": 16}.'
    )
  numbers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
  return LatteConfig(
    layers=len(numbers),
    width=width,
    heads=heads,
    mlp_ratio=shapes["blocks.0.mlp.fc1.bias"][0] // width,
    patch=patch,
    in_channels=channels,
    learn_variance=shapes["final_layer.linear.bias"][0] == 2 * channels * patch**2,
    classes=shapes[_CLASSES][0] - 1 if _CLASSES in shapes else 0,
  )


def _released_hf(kind: str):
  return lambda config: {"model_type": kind, "num_heads": config.heads}


def _text_config(hf: Mapping[str, Any], shapes: Mapping[str, Shape]) -> LatteConfig:
  lost = [key for key in ("num_attention_heads", "num_layers") if key not in hf]
  if lost:
    raise UserError(f"config.json has no {' and no '.join(lost)}: get it with the weights.")
  width = hf["num_attention_heads"] * hf.get("attention_head_dim", 72)
  hidden = shapes.get("transformer_blocks.0.ff.net.0.proj.bias", (4 * width,))[0]
  channels = hf.get("in_channels", 4)
  return LatteConfig(
    layers=2 * hf["num_layers"],
    width=width,
    heads=hf["num_attention_heads"],
    mlp_ratio=hidden // width,
    patch=hf.get("patch_size", 2),
    in_channels=channels,
    learn_variance=(hf.get("out_channels") or 2 * channels) == 2 * channels,
    conditioning="adaln_single",
    max_frames=hf.get("video_length", 16),
    position_scale=max((hf.get("sample_size") or 64) // 64, 1),
    context_widths=(hf.get("caption_channels", 4096),),
  )


def _text_hf(kind: str):
  def to_hf(config: LatteConfig) -> dict[str, Any]:
    return {
      "_class_name": kind,
      "num_attention_heads": config.heads,
      "attention_head_dim": config.head_dim,
      "num_layers": config.layers // 2,
      "in_channels": config.in_channels,
      "out_channels": config.out_channels,
      "patch_size": config.patch,
      "caption_channels": config.context_widths[0],
      "cross_attention_dim": config.width,
      "attention_bias": True,
      "activation_fn": "gelu-approximate",
      "norm_type": "ada_norm_single",
      "norm_elementwise_affine": False,
      "norm_eps": config.norm_eps,
      **({"video_length": config.max_frames} if kind.startswith("Latte") else {}),
    }

  return to_hf


# --------------------------------------------------------------------------------------------------
# Families.


def _inputs(config: LatteConfig) -> tuple:
  latents = jnp.zeros((1, config.frame_stride, config.patch, config.patch, config.in_channels))
  labels = jnp.zeros(1, jnp.int32) if config.classes else None
  context = [jnp.zeros((1, 1, width)) for width in config.context_widths] or None
  return latents, jnp.zeros(1), labels, context


def _unread(*more: str):
  """Whether a name is of nothing that is read: computed tables, and `more` names or prefixes."""
  return lambda name: _plain(name) in _TABLES or bool(more and _plain(name).startswith(more))


def _plain(name: str) -> str:
  return name.removeprefix("module.")  # what training on several devices puts before it


_DIFFUSERS = "diffusion_pytorch_model"
_SPATIAL = "transformer_blocks.0.scale_shift_table"
_TEMPORAL = f"temporal_{_SPATIAL}"


def _family(name, rules, from_hf, to_hf, kinds, marks, unread, file="model") -> Family:
  return Family(
    *(name, LatteConfig, latte.Latte, _inputs, rules),
    *(lambda name: None if unread(name) else _plain(name), from_hf, to_hf),
    *(kinds, marks),
    kept=unread,
    file=file,
    verbatim=True,
  )


LATTE = _family(
  *("latte", _released_rules, _released_config, _released_hf("latte"), ("latte",)),
  marks=("temp_embed", "x_embedder.proj.weight"),
  unread=_unread(),
)
DIT = _family(
  *("dit", _released_rules, _released_config, _released_hf("dit"), ("dit",)),
  marks=("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "!temp_embed"),
  unread=_unread("y_embedder."),
)
TEXT_LATTE = _family(
  *("latte_text", _text_rules, _text_config, _text_hf("LatteTransformer3DModel")),
  *(("LatteTransformer3DModel",), (_SPATIAL, _TEMPORAL)),
  *(_unread(), _DIFFUSERS),
)
PIXART = _family(
  *("pixart", _pixart_rules, _text_config, _text_hf("PixArtTransformer2DModel")),
  *(("PixArtTransformer2DModel", "Transformer2DModel"), (_SPATIAL, f"!{_TEMPORAL}")),
  *(_unread(*_SIZES), _DIFFUSERS),
)


# --------------------------------------------------------------------------------------------------
# In.


def from_latte(flat: Flat, config: LatteConfig) -> Tree:
  """Parameters of variant 1 from the released names.

  Variant 2 has the same names and shapes, so it is refused here: its blocks would be those of other
  places. Of a model with rotary time likewise, whose weights have seen no positions.

  Raises:
    WeightsError: names are missing or too many, or shapes differ (all are listed): another size,
      another variant, another number of classes.
  """
  _need(config, "s_adaln", "the released Latte", encodings=("sincos",))
  return _assemble(flat, LATTE, config, "a Latte checkpoint")


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
  _need(config, "s_adaln", "a model that starts from DiT", (1, 2))
  made = _assemble(flat, DIT, dataclasses.replace(config, classes=0), "a DiT checkpoint")
  if config.classes:
    made["classes"] = np.asarray(fresh["classes"])
  return made


def from_text_latte(flat: Flat, config: LatteConfig) -> Tree:
  """Parameters of the text-to-video model (variant 1, adaLN-single) from the names of diffusers.

  Raises:
    WeightsError: see `from_latte`.
  """
  _need(config, "adaln_single", "the released text-to-video model", encodings=("sincos",))
  return _assemble(flat, TEXT_LATTE, config, "a LatteTransformer3DModel")


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
  _need(config, "adaln_single", "a model that starts from PixArt")
  made = _assemble(flat, PIXART, config, "a PixArtTransformer2DModel")
  temporal = jax.tree.map(np.asarray, fresh["layers"]["temporal"])
  return {**made, "layers": {**made["layers"], "temporal": temporal}}


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


def _assemble(flat: Flat, family: Family, config: LatteConfig, what: str) -> Tree:
  """The parameters that the rules of a family make of a file's arrays, as fp32."""
  plain = {_plain(name): array for name, array in flat.items() if not family.kept(name)}
  shapes = rules_lib.boxes(family, config)
  made: dict[str, np.ndarray] = {}
  missing, misshaped, used = {}, {}, set()
  for rule in family.rules(config):
    shape, pieces = tuple(shapes[rule.target].value.shape), []
    for name in rule.names(shape):
      used.add(name)
      if name not in plain:
        missing[name] = None
      elif plain[name].shape != (wanted := rule.their_shape(shape)):
        misshaped[f"{name} {list(plain[name].shape)} instead of {list(wanted)}"] = None
      else:
        pieces.append(rule.to_ours(np.asarray(plain[name], np.float32)))
    if pieces:
      made[rule.target] = np.stack(pieces) if rule.layered else pieces[0]
  lists = {"missing": missing, "misshaped": misshaped, "unmapped": sorted(set(plain) - used)}
  found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names]
  if found:
    raise WeightsError(
      f"these weights are not {what} of a model of variant {config.variant}, {config.layers} "
      f"layers, width {config.width}, patch {config.patch}, {config.classes} classes "
      f"({'; '.join(found)}): give the size, the variant and the classes that they were trained "
      "with."
    )
  return rules_lib.nest(made)


def _need(
  config: LatteConfig,
  conditioning: str,
  what: str,
  variants: tuple[int, ...] = (1,),
  encodings: tuple[str, ...] = ("sincos", "rotary"),
) -> None:
  """Raises WeightsError where a model is none that the weights are of."""
  wanted = {
    "variant": variants,
    "embedding": ("uniform",),
    "conditioning": (conditioning,),
    "time_encoding": encodings,
  }
  found = {key: getattr(config, key) for key in wanted}
  wrong = [key for key in wanted if found[key] not in wanted[key]]
  if wrong:
    has = ", ".join(f"{key} {' or '.join(map(str, wanted[key]))}" for key in wrong)
    is_ = ", ".join(f"{key} {found[key]}" for key in wrong)
    raise WeightsError(f"{what} has {has}: a model of {is_} cannot exchange weights with it.")


# --------------------------------------------------------------------------------------------------
# Out.


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
  _check_variant(config)
  _need(config, "s_adaln", "the released Latte", encodings=("sincos",))
  rows = rows or 32 // config.patch
  return {
    "pos_embed": latte.patch_positions(config, rows, rows)[None],
    "temp_embed": latte.frame_positions(config, frames)[None],
    **_take_apart(params, _released_rules(config)),
  }


def to_text_latte(params: Tree, config: LatteConfig) -> dict[str, np.ndarray]:
  """The names of diffusers from parameters of a text-to-video model of variant 1.

  Raises:
    WeightsError: the model is none that diffusers has.
  """
  _check_variant(config)
  _need(config, "adaln_single", "the released text-to-video model", encodings=("sincos",))
  if config.time_scale != 1:
    raise WeightsError(
      f"time_scale={config.time_scale:g} cannot be exported: diffusers computes the positions of "
      "frames itself, without a scale."
    )
  return _take_apart(params, _text_rules(config))


def _check_variant(config: LatteConfig) -> None:
  if config.variant != 1:
    raise WeightsError(
      f"variant {config.variant} has no released code that could read it: only variant 1 can be "
      "exported."
    )


def _take_apart(params: Tree, rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  parts: dict[str, list[np.ndarray]] = {}  # of a fused tensor in their order, as the rules have it
  for rule in rules:
    value = np.asarray(flat[rule.target])
    for index, name in enumerate(rule.names(value.shape)):
      piece = rule.to_theirs(value[index] if rule.layered else value)
      parts.setdefault(name, []).append(np.ascontiguousarray(piece))
  return {name: pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
          for name, pieces in parts.items()}  # fmt: skip
