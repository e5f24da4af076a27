"""Stable-Diffusion-family image autoencoders (diffusers' `AutoencoderKL`) in and out.

Stable Diffusion 1.x and 2.x (4 channels, 1x1 convolutions around the latents) and 3, FLUX (16
channels, none). A file fills the frame-wise model, or the spatial half of an inflated one, whose
temporal half then starts as the identity (Movie Gen, section 3.1.1). All functions are of flat
dicts: names of ours join the levels of the tree with slashes ("encoder/conv_in/spatial/kernel").
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mgen_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from mgen_jax.weights import checks
from mgen_jax.weights import rules as rules_lib
from mgen_jax.weights.checks import WeightsError
from mgen_jax.weights.rules import Family, Rule, Transform

Flat = Mapping[str, np.ndarray]

# Attention as it was called before diffusers 0.15 (the files of Stable Diffusion 1 still are).
_OLD_NAMES = {
  r"\.attentions\.0\.query\.": ".attentions.0.to_q.",
  r"\.attentions\.0\.key\.": ".attentions.0.to_k.",
  r"\.attentions\.0\.value\.": ".attentions.0.to_v.",
  r"\.attentions\.0\.proj_attn\.": ".attentions.0.to_out.0.",
}


def model_config(values: Mapping[str, Any]) -> AutoencoderConfig:
  """The frame-wise model that a diffusers `config.json` describes.

  Raises:
    WeightsError: it is of another class, or has parts that this model lacks.
  """
  if values.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
    raise WeightsError(
      f"the config is of {values['_class_name']}: only AutoencoderKL can be imported."
    )
  widths = values["block_out_channels"]
  levels, blocks = len(widths), values["layers_per_block"]
  expected = {
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
  }
  for key, value in expected.items():
    if key in values and values[key] != value:
      raise WeightsError(f"the config has {key} {values[key]}: only {value} can be imported.")
  quant = {values.get(f"use_{side}quant_conv", True) for side in ("", "post_")}
  if len(quant) > 1 or any(width % widths[0] for width in widths):
    raise WeightsError(
      f"the config has block_out_channels {widths} and one of use_quant_conv and"
      " use_post_quant_conv only, perhaps: neither can be imported."
    )
  return AutoencoderConfig(
    channels=widths[0],
    multipliers=tuple(width // widths[0] for width in widths),
    res_blocks=blocks,
    decoder_res_blocks=blocks + 1,
    latent_channels=values["latent_channels"],
    space_down=tuple(range(levels - 1)),
    time_down=(),
    temporal=False,
    mid_attention=values.get("mid_block_add_attention", True),
    quant_conv=quant.pop(),
    groups=values.get("norm_num_groups", 32),
  )


def diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
  """The `config.json` for which diffusers makes the frame-wise model. Raises WeightsError."""
  _check_exportable(config)
  widths = [config.channels * m for m in config.multipliers]
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": widths,
    "down_block_types": ["DownEncoderBlock2D"] * len(widths),
    "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": config.latent_channels,
    "layers_per_block": config.res_blocks,
    "mid_block_add_attention": config.mid_attention,
    "norm_num_groups": config.groups,
    "use_quant_conv": config.quant_conv,
    "use_post_quant_conv": config.quant_conv,
  }


def import_image(tensors: Flat, config: AutoencoderConfig, what: str = "the file") -> dict:
  """The parameters that an image autoencoder determines, for a model that may be inflated.

  The rest (temporal layers) keeps its initial values, with which the model equals the image
  model on every frame: `{**initial, **import_image(...)}`. In the 3D model the spatial kernel
  becomes the centre tap.

  Args:
    tensors: of diffusers, by name; old names of the attention are understood.
    config: of the model to fill.
    what: the file, for messages.

  Returns:
    Flat dict of fp32 arrays.

  Raises:
    WeightsError: tensors are missing, left over or of another shape; all are listed.
  """
  check_layout(config)
  tensors = {_modern(name): value for name, value in tensors.items()}
  shapes = tensor_shapes(config)
  # A linear map may be stored as a 1x1 convolution.
  tensors = {
    name: value.reshape(shapes[name])
    if name in shapes and rules_lib.same_matrix(value.shape, shapes[name])
    else value
    for name, value in tensors.items()
  }
  checks.check_names({name: value.shape for name, value in tensors.items()}, shapes, what)
  return {
    rule.target: _inflated(rule, rule.to_ours(np.asarray(tensors[rule.source], np.float32)), config)
    for rule in rules(config)
  }


def export_image(params: Flat, config: AutoencoderConfig) -> dict[str, np.ndarray]:
  """The frame-wise model as diffusers' tensors, by name; `diffusers_config` goes with them.

  Of an inflated (2.5D) model, the spatial half is written: the image autoencoder it began as, not
  what its temporal layers have learned since.

  Raises:
    WeightsError: parts of the model have no place in diffusers' format.
  """
  _check_exportable(config)
  return {
    rule.source: rule.to_theirs(np.asarray(params[rule.target], np.float32))
    for rule in rules(config)
  }


def rules(config: AutoencoderConfig) -> tuple[Rule, ...]:
  """Our parameter <- diffusers' tensor, for every tensor of the image model."""
  made: list[Rule] = []
  half = "volume" if config.temporal and config.inflation == "3d" else "spatial"

  def add(ours: str, theirs: str, leaf: str, transform: Transform = "none") -> None:
    made.append(Rule(f"{ours}/{leaf}", f"{theirs}.weight", transform))
    made.append(Rule(f"{ours}/bias", f"{theirs}.bias"))

  def conv(ours: str, theirs: str) -> None:
    add(f"{ours}/{half}", theirs, "kernel", "conv")

  def block(ours: str, theirs: str, before: int, after: int) -> None:
    for number in (1, 2):
      add(f"{ours}/norm{number}", f"{theirs}.norm{number}", "scale")
      conv(f"{ours}/conv{number}", f"{theirs}.conv{number}")
    if before != after:
      conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")

  def middle(side: str, width: int) -> None:
    for number in (0, 1):
      theirs = f"{side}.mid_block.resnets.{number}"
      block(f"{side}/middle/block{number + 1}", theirs, width, width)
    if config.mid_attention:
      ours, theirs = f"{side}/middle/attention", f"{side}.mid_block.attentions.0"
      add(f"{ours}/norm", f"{theirs}.group_norm", "scale")
      for mine, their in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("out", "to_out.0"),
      ):
        add(f"{ours}/spatial/{mine}", f"{theirs}.{their}", "kernel", "transpose")

  widths = [config.channels * m for m in config.multipliers]
  last = len(widths) - 1
  for side in ("encoder", "decoder"):
    conv(f"{side}/conv_in", f"{side}.conv_in")
    middle(side, widths[-1])
    add(f"{side}/norm_out", f"{side}.conv_norm_out", "scale")
    conv(f"{side}/conv_out", f"{side}.conv_out")
    if config.quant_conv:
      conv(f"{side}/quant_conv", "quant_conv" if side == "encoder" else "post_quant_conv")
  previous = widths[0]
  for level, width in enumerate(widths):
    for number in range(config.res_blocks):
      theirs = f"encoder.down_blocks.{level}.resnets.{number}"
      block(f"encoder/level{level}_block{number}", theirs, previous, width)
      previous = width
    if level in config.space_down:
      conv(f"encoder/level{level}_down", f"encoder.down_blocks.{level}.downsamplers.0.conv")
  previous = widths[-1]
  for level in range(last, -1, -1):
    for number in range(config.decoder_res_blocks):
      theirs = f"decoder.up_blocks.{last - level}.resnets.{number}"
      block(f"decoder/level{level}_block{number}", theirs, previous, widths[level])
      previous = widths[level]
    if level in config.space_down:  # theirs stands at the end of the level before
      conv(f"decoder/level{level}_up", f"decoder.up_blocks.{last - level - 1}.upsamplers.0.conv")
  return tuple(made)


def tensor_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of diffusers' tensors by name, for the image model behind `config`."""
  image = frame_wise(config)
  shapes = rules_lib.boxes(FAMILY, image)
  return {rule.source: rule.their_shape(shapes[rule.target].value.shape) for rule in rules(image)}


def frame_wise(config: AutoencoderConfig) -> AutoencoderConfig:
  """The image model that an inflated one starts from."""
  return dataclasses.replace(config, temporal=False, time_down=())


def _modern(name: str) -> str:
  for old, new in _OLD_NAMES.items():
    name = re.sub(old, new, name)
  return name


def _inflated(rule: Rule, value: np.ndarray, config: AutoencoderConfig) -> np.ndarray:
  """A kernel of the 3D model: the image's is its centre tap."""
  if "/volume/" not in rule.target or rule.transform != "conv":
    return value
  # A 1x1 convolution has one tap in time; so has every one whose spatial kernel is 1.
  taps = config.temporal_kernel if value.shape[0] > 1 else 1
  volume = np.zeros((taps, *value.shape), np.float32)
  volume[taps // 2] = value
  return volume


def check_layout(config: AutoencoderConfig) -> None:
  """Raises WeightsError where no AutoencoderKL has the layers that the model has."""
  wrong = _listed(config, _foreign_layers(config))
  if wrong:
    raise WeightsError(
      f"this model cannot start from an AutoencoderKL, which has no {wrong}: leave them at the "
      "model's defaults."
    )


def _check_exportable(config: AutoencoderConfig) -> None:
  reasons = {
    **_foreign_layers(config),
    "inflation": config.temporal and config.inflation == "3d",
    "space_down": config.space_down != tuple(range(len(config.multipliers) - 1)),
    "decoder_res_blocks": config.decoder_res_blocks != config.res_blocks + 1,
  }
  wrong = _listed(config, reasons)
  if wrong:
    raise WeightsError(
      f"diffusers' AutoencoderKL has no such model ({wrong}): only models with the layout of Stable"
      " Diffusion's can be exported."
    )


def _foreign_layers(config: AutoencoderConfig) -> dict[str, bool]:
  return {"patch": config.has_patch, "norm": config.norm != "group", "kernel": config.kernel != 3}


def _listed(config: AutoencoderConfig, reasons: dict[str, bool]) -> str:
  return ", ".join(f"{key} {getattr(config, key)}" for key, bad in reasons.items() if bad)


def _inputs(config: AutoencoderConfig) -> tuple:
  return (jnp.zeros((1, 1, *config.space_strides, 3)),)


FAMILY = Family(
  *("autoencoder_kl", AutoencoderConfig, Autoencoder, _inputs, rules, _modern),
  *(lambda hf, shapes: model_config(hf), diffusers_config, ("AutoencoderKL",)),
  file="diffusion_pytorch_model",
  verbatim=True,
)
