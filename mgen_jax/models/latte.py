"""Latte (Ma et al., 2024): a diffusion transformer that alternates attention in space and in time.

All of the paper by configuration: four variants, two patch embeddings, S-AdaLN and all-tokens
conditioning, absolute and rotary encoding of time; unconditional, by class, or by text in the
manner of PixArt (adaLN-single, cross-attention in the spatial blocks). Variant 1 with S-AdaLN and
variant 1 with text are those whose code was released, and agree with it; what is only described in
words says "our choice". Not here: the blocks (`latte_blocks`), diffusion, and where labels and
text come from.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import latte_blocks as blocks
from mgen_jax.models import layers
from mgen_jax.models import positions as positions_lib
from mgen_jax.models import remat as remat_lib
from mgen_jax.models.backbone import patchify, unpatchify

Array = jax.Array

TIME_FREQUENCIES = 256


@dataclasses.dataclass(frozen=True)
class LatteConfig:
  """Everything that fixes the transformer; the defaults are XL/2 without condition."""

  layers: int = 28  # blocks: half of them spatial, half temporal in variants 1 and 2
  width: int = 1152
  heads: int = 16
  mlp_ratio: int = 4
  patch: int = 2  # of the height and width of latents
  in_channels: int = 4
  learn_variance: bool = True  # the output has twice the channels: noise, then variance
  # 1: spatial and temporal blocks in turn. 2: all spatial blocks, then all temporal ones. 3: both
  # attentions in each block, one after the other. 4: both at once, each with half of the heads.
  variant: Literal[1, 2, 3, 4] = 1
  # "compression": tubes of `time_stride` frames are one token, and a transposed convolution after
  # the head makes frames of them again.
  embedding: Literal["uniform", "compression"] = "uniform"
  time_stride: int = 2
  # "all_tokens": time and class are tokens; "adaln_single": one modulation MLP for all blocks with
  # a small table for each (PixArt; what the text-to-video model has).
  conditioning: Literal["s_adaln", "all_tokens", "adaln_single"] = "s_adaln"
  time_encoding: Literal["sincos", "rotary"] = "sincos"
  rotary_theta: float = 10_000.0
  max_frames: int = 16  # tubes of frames that the time table has
  # Positions of patches are index / position_scale; with a grid, the index runs up to the grid's
  # size whatever the picture's (PixArt at other resolutions).
  position_grid: int = 0
  position_scale: float = 1.0
  # Sin-cos positions of frames are index / time_scale. A few frames or places lie close together
  # on these waves (8 frames span 4 directions, the others are all but nil); 1/4 sets them apart.
  time_scale: float = 1.0
  classes: int = 0  # 0: no class; otherwise the table has one row more, "no class"
  context_widths: tuple[int, ...] = ()  # of text features; (): no text
  norm_eps: float = 1e-6
  context_parallel: Literal["all_gather", "ring", "ulysses"] = "all_gather"
  dtype: Literal["bfloat16", "float32"] = "float32"
  remat: str = "none"  # see models/remat.py; of a pair of blocks in variant 1
  scan_unroll: int = 1

  def __post_init__(self):
    check_ranges(
      self,
      positive=(
        *("layers", "width", "heads", "mlp_ratio", "patch", "in_channels", "time_stride"),
        *("rotary_theta", "max_frames", "position_scale", "time_scale", "context_widths"),
        "scan_unroll",
      ),
      natural=("position_grid", "classes", "norm_eps"),
    )
    remat_lib.policy(self.remat)
    if self.width % self.heads:
      raise ConfigError(f"width {self.width} does not divide into {self.heads} heads.")
    if self.width % 4:
      raise ConfigError(f"width {self.width} is not a multiple of 4, as sin-cos positions need.")
    if self.variant in (1, 2) and self.layers % 2:
      raise ConfigError(
        f"layers {self.layers} is odd: variant {self.variant} has as many spatial as temporal "
        f"blocks; use {self.layers + 1}."
      )
    if self.variant == 4 and self.heads % 2:
      raise ConfigError(f"heads {self.heads} is odd: variant 4 halves them; use {self.heads + 1}.")
    if self.time_encoding == "rotary" and self.head_dim % 2:
      raise ConfigError(f"heads of {self.head_dim} cannot be rotated: use an even width / heads.")
    if self.classes and self.context_widths:
      raise ConfigError("classes and context_widths are both set: condition on one of them.")

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.heads

  @property
  def mlp_width(self) -> int:
    """Hidden units of the MLPs."""
    return self.mlp_ratio * self.width

  @property
  def out_channels(self) -> int:
    """Channels of the output."""
    return self.in_channels * (2 if self.learn_variance else 1)

  @property
  def frame_stride(self) -> int:
    """Latent frames of one token."""
    return self.time_stride if self.embedding == "compression" else 1


# Layers, width and heads of the paper's sizes.
_SHAPES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
HEADS = {width: heads for _, width, heads in _SHAPES.values()}
_PATCHES = (2, 4, 8)
SIZES = tuple(f"{name}/{patch}" for name in _SHAPES for patch in _PATCHES)
# A block of variant 3 has 22 d^2 parameters where those of the others have 18 d^2: as many layers
# as give the same size (XL: 23, which is what the paper's table comes out at).
_SHARE = {3: 18 / 22}


def size(name: str, *, variant: int = 1, **changes) -> LatteConfig:
  """A named size: "S/2" to "XL/8".

  Args:
    name: of `SIZES`.
    variant: 1 to 4; variant 3 has fewer layers, so that all have about as many parameters.
    **changes: further keys of LatteConfig.

  Raises:
    ConfigError: there is no such size.
  """
  if name not in SIZES:
    raise ConfigError(f"unknown size {name!r}: use one of {', '.join(SIZES)}.")
  shape, patch = name.split("/")
  count, width, heads = _SHAPES[shape]
  count = round(count * _SHARE.get(variant, 1))
  values = {"layers": count, "width": width, "heads": heads, "patch": int(patch)}
  return LatteConfig(**{**values, "variant": variant, **changes})


@functools.cache
def sincos(features: int, positions: tuple[float, ...]) -> np.ndarray:
  """[sin | cos] of positions at frequencies 10000^(-k / (features / 2)): fp32 [n, features].

  Computed in float64, as the reference does.
  """
  half = features // 2
  angles = np.outer(np.array(positions, np.float64), 10_000.0 ** -(np.arange(half) / half))
  return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def patch_positions(config: LatteConfig, rows: int, columns: int) -> np.ndarray:
  """Of a frame's patches in row-major order: [rows * columns, D]; columns first, then rows."""

  def places(count):
    unit = config.position_grid / count if config.position_grid else 1.0
    return tuple(np.arange(count) * unit / config.position_scale)

  half = config.width // 2
  across = np.broadcast_to(sincos(half, places(columns))[None], (rows, columns, half))
  down = np.broadcast_to(sincos(half, places(rows))[:, None], (rows, columns, half))
  return np.concatenate([across, down], -1).reshape(rows * columns, config.width)


def frame_positions(config: LatteConfig, frames: int) -> np.ndarray:
  """Of the frames (or tubes) of a clip: [frames, D]."""
  return sincos(config.width, tuple(np.arange(frames) / config.time_scale))


def timestep_features(time: Array) -> Array:
  """[cos | sin] of raw steps 0 .. 999 at 128 frequencies from 1 to about 1e-4: [B] -> [B, 256]."""
  half = TIME_FREQUENCIES // 2
  # On the host, exactly rounded: a frequency that is wrong in its last bit makes an angle of 999
  # that is wrong in its fourth digit after the point.
  exponents = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / half
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = time.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimestepEmbedding(nn.Module):
  """Steps [B] -> [B, features]."""

  features: int

  @nn.compact
  def __call__(self, time: Array) -> Array:
    init = nn.initializers.normal(0.02)

    def dense(axes, name):
      return layers.Dense(self.features, axes, use_bias=True, kernel_init=init, name=name)

    hidden = nn.silu(dense((None, "mlp"), "in")(timestep_features(time)))
    return dense(("mlp", "embed"), "out")(hidden)


class Latte(nn.Module):
  """Noisy latents, steps and a condition -> noise and variance."""

  config: LatteConfig

  @nn.compact
  def __call__(
    self,
    latents: Array,
    time: Array,
    labels: Array | None = None,
    context: Array | Sequence[Array] | None = None,
    context_mask: Array | Sequence[Array] | None = None,
    *,
    images: int = 0,
  ) -> Array:
    """Predicts the noise and, with `learn_variance`, the logits of the variance.

    In joint training with images, the last `images` frames are images of their own: spatial
    blocks and the head see them, temporal attention and temporal positions do not.

    Args:
      latents: [B, F + images, H, W, C].
      time: [B], the raw step of the diffusion, 0 to 999.
      labels: with classes, int [B], or [B, 1 + images] with a label for the clip and for each
        image; the number of classes stands for "no class".
      context: with text, features [B, L, width] for each entry of `config.context_widths` (a bare
        array if there is one), or [B, 1 + images, L, width].
      context_mask: likewise, bool [B, L] or [B, 1 + images, L], True where there is text.
      images: how many of the frames are images.

    Returns:
      [B, F + images, H, W, out_channels] fp32; the first half of the channels is the noise.

    Raises:
      ConfigError: the frames exceed the time table or do not divide into tubes or patches, or the
        model has no such condition.
    """
    cfg = self.config
    self._check(latents, labels, context, images)
    stride = (cfg.frame_stride, cfg.patch, cfg.patch)
    patches = patchify(latents, stride)
    batch, frames, rows, columns, values = patches.shape
    # The Xavier bound of the reference's convolution is that of the flattened matrix.
    x = layers.Dense(cfg.width, (None, "embed"), True, cfg.dtype, blocks.xavier, name="patch_in")(
      patches.reshape(batch, frames, rows * columns, values)
    )  # [B, F, N, D]
    x = x + patch_positions(cfg, rows, columns).astype(cfg.dtype)
    video = frames - images

    time_row = TimestepEmbedding(cfg.width, name="time")(time)[:, None]  # [B, 1, D]
    row, tokens = time_row, [time_row]
    if cfg.classes:
      init = layers.partitioned(nn.initializers.normal(0.02), "vocab", "embed")
      table = self.param("classes", init, (cfg.classes + 1, cfg.width))
      named = jnp.take(table, labels.reshape(batch, -1), 0)  # [B, 1 or 1 + I, D]
      row, tokens = time_row + named, [time_row, named[:, :1]]
    condition = blocks.Condition(
      rows=nn.silu(row), **self._time_encoding(video), **self._context(context, context_mask)
    )
    if cfg.conditioning == "adaln_single":
      shared = layers.Dense(
        6 * cfg.width, ("embed", "mlp"), True, kernel_init=blocks.zeros, name="modulation"
      )(condition.rows)
      condition = condition._replace(shared=shared.reshape(batch, 6, cfg.width), rows=None)
    carry = (x, None)
    if cfg.conditioning == "all_tokens":
      carry = (x, jnp.concatenate(tokens, 1).astype(cfg.dtype))
    x = self._layers(carry, condition, images)
    return self._head(x, row, (frames, rows, columns), images)

  def _check(self, latents: Array, labels, context, images: int) -> None:
    cfg = self.config
    frames = latents.shape[1] - images
    if frames % cfg.frame_stride:
      raise ConfigError(
        f"{frames} latent frames do not divide into tubes of time_stride {cfg.time_stride}: use "
        f"{max(1, round(frames / cfg.time_stride)) * cfg.time_stride}."
      )
    if frames // cfg.frame_stride > cfg.max_frames:
      raise ConfigError(
        f"{frames // cfg.frame_stride} frames exceed the time table's {cfg.max_frames}: raise "
        "max_frames (the table is computed, not learned) or choose a shorter bucket."
      )
    if images and cfg.embedding == "compression":
      raise ConfigError(
        "an image is no tube of frames: joint training with images needs embedding 'uniform'."
      )
    if images and cfg.classes and cfg.conditioning == "all_tokens":
      raise ConfigError(
        "all_tokens has one set of tokens for a clip, and each image its own class: train images "
        "with classes under conditioning 's_adaln'."
      )
    if (labels is None) != (cfg.classes == 0):
      wanted = "needs labels" if cfg.classes else "takes no labels: it has no classes"
      raise ConfigError(f"this model {wanted}.")
    if (context is None) != (not cfg.context_widths):
      wanted = "needs text features" if cfg.context_widths else "takes no text: it has no context"
      raise ConfigError(f"this model {wanted}.")

  def _time_encoding(self, frames: int) -> dict[str, Array]:
    """The positions or the angles of the frames; a single frame stands at no time."""
    cfg = self.config
    if cfg.time_encoding == "rotary":
      return {"angles": positions_lib.line_angles(frames, cfg.head_dim, cfg.rotary_theta)}
    if frames == 1:
      return {}
    return {"positions": jnp.asarray(frame_positions(cfg, frames))}

  def _context(self, context, context_mask) -> dict[str, Array | None]:
    """Projects each text (two layers, as PixArt) and joins them along the tokens."""
    cfg = self.config
    if not cfg.context_widths:
      return {}
    sources = list(context) if isinstance(context, list | tuple) else [context]
    found = tuple(source.shape[-1] for source in sources)
    if found != tuple(cfg.context_widths):
      raise ConfigError(
        f"context widths {found} differ from the model's context_widths {cfg.context_widths}: set "
        "them to the text encoders' widths."
      )
    several = isinstance(context_mask, list | tuple)
    masks = list(context_mask) if several else [context_mask] * len(sources)
    texts, seen = [], []
    for index, (source, mask) in enumerate(zip(sources, masks, strict=True)):
      dense = functools.partial(layers.Dense, cfg.width, use_bias=True, dtype=cfg.dtype)
      source = source[:, None] if source.ndim == 3 else source  # [B, T, L, width]
      hidden = dense((None, "mlp"), kernel_init=blocks.xavier, name=f"context_{index}_in")(source)
      out = dense(("mlp", "embed"), kernel_init=blocks.xavier, name=f"context_{index}_out")
      texts.append(out(nn.gelu(hidden)))
      mask = jnp.ones(source.shape[:-1], bool) if mask is None else mask
      seen.append(mask[:, None] if mask.ndim == 2 else mask)
    text, mask = jnp.concatenate(texts, 2), jnp.concatenate(seen, 2)
    return {"context": text, "mask": None if context_mask is None else mask}

  def _layers(self, carry: tuple, condition: blocks.Condition, images: int) -> Array:
    """All blocks: [B, F + I, N, D] -> the same. Parameters are stacked along the layers."""
    cfg = self.config
    policy = remat_lib.policy(cfg.remat)

    def run(body, name, count, carry, starts, **fields):
      if policy is not None:
        body = nn.remat(body, policy=policy, prevent_cse=False)
      stack = blocks.stack_of(body, length=count, unroll=min(cfg.scan_unroll, count))
      first = (jnp.arange(count) == 0) & starts  # where the temporal positions enter
      return stack(cfg, name=name, **fields)(carry, first.astype(jnp.float32), condition)[0]

    if cfg.variant == 1:
      return run(blocks.Pair, "layers", cfg.layers // 2, carry, True, images=images)[0]
    if cfg.variant in (3, 4):
      kind = "both" if cfg.variant == 3 else "parallel"
      return run(blocks.One, "layers", cfg.layers, carry, True, kind=kind, images=images)[0]
    half = cfg.layers // 2
    x, tokens = run(blocks.One, "spatial_layers", half, carry, False, kind="spatial", images=images)
    video, still = x[:, : x.shape[1] - images], x[:, x.shape[1] - images :]
    if condition.positions is not None:
      video = video + condition.positions[:, None].astype(video.dtype)
    carry = (video.swapaxes(1, 2), tokens)
    video, _ = run(blocks.One, "temporal_layers", half, carry, False, kind="temporal")
    video = video.swapaxes(1, 2)
    return jnp.concatenate([video, still], 1) if images else video

  def _head(self, x: Array, row: Array, grid: tuple[int, int, int], images: int) -> Array:
    """Norm, modulation, linear map to the patch's values; tubes become frames again."""
    cfg = self.config
    video = grid[0] - images
    affine = cfg.conditioning == "all_tokens"
    x = layers.Norm("layer", 1e-6, affine=affine, name="head_norm")(x)
    if cfg.conditioning == "adaln_single":
      init = layers.partitioned(nn.initializers.normal(cfg.width**-0.5), None, "embed")
      table = self.param("head_modulation", init, (2, cfg.width))
      shift, scale = jnp.split(row + table, 2, 1)
    elif cfg.conditioning == "s_adaln":
      made = layers.Dense(
        2 * cfg.width, ("embed", "mlp"), True, kernel_init=blocks.zeros, name="head_modulation"
      )(nn.silu(row))
      shift, scale = jnp.split(made, 2, -1)
    if not affine:
      shift, scale = (blocks.spread_rows(part, video, images) for part in (shift, scale))
      x = x * (1 + scale) + shift
    values = cfg.patch * cfg.patch * cfg.out_channels
    x = layers.Dense(
      values, ("embed", None), True, cfg.dtype, kernel_init=blocks.zeros, name="head"
    )(x)
    x = unpatchify(x.reshape(x.shape[0], *grid, values), (1, cfg.patch, cfg.patch))
    if cfg.embedding == "compression":
      # A transposed convolution of kernel = stride in time. It starts by repeating each tube's
      # output: our choice, as are kernel and stride.
      stride, channels = cfg.time_stride, cfg.out_channels
      x = layers.Dense(
        stride * channels, (None, None), True, cfg.dtype, kernel_init=_repeat, name="upsample"
      )(x)
      x = x.reshape(*x.shape[:4], stride, channels)  # [B, f, H, W, s, 2C]
      x = x.transpose(0, 1, 4, 2, 3, 5).reshape(x.shape[0], -1, *x.shape[2:4], channels)
    return x.astype(jnp.float32)


def _repeat(key, shape: tuple[int, int], dtype=jnp.float32) -> Array:
  """[C, s * C]: s identities beside each other."""
  del key
  return jnp.tile(jnp.eye(shape[0], dtype=dtype), (1, shape[1] // shape[0]))


def flops(
  config: LatteConfig,
  latent_shape: Sequence[int],
  text_tokens: Sequence[int] = (),
  *,
  images: int = 0,
  per_token_modulation: bool = False,
) -> dict[str, int]:
  """Exact matmul FLOPs of one forward pass of one example, by part (2 for a multiply-add).

  Args:
    config: the model.
    latent_shape: (F, H, W) of the latents, without images.
    text_tokens: of each text encoder.
    images: beside the clip, in joint training.
    per_token_modulation: count the modulation as often as the released code computes it (once for
      each frame in spatial blocks, for each place in temporal ones) and not once for a clip.

  Returns:
    FLOPs of "embedding", "attention" (projections), "scores", "cross_attention", "mlp",
    "modulation", "head".
  """
  d, depth = config.width, config.layers
  frames, rows, columns = latent_shape
  frames, places = frames // config.frame_stride, (rows // config.patch) * (columns // config.patch)
  pictures = frames + images
  every, video = pictures * places, frames * places
  # Attentions of each kind, and what their blocks do to every token and to those of the video.
  separate = config.variant in (1, 2)
  spatial = temporal = depth // 2 if separate else depth
  pointwise = spatial * every + temporal * video if separate else depth * every
  inner = d // 2 if config.variant == 4 else d
  extra = 0  # condition tokens of each sequence
  if config.conditioning == "all_tokens":
    extra = 2 if config.classes else 1
  projected = spatial * pictures * (places + extra) + temporal * places * (frames + extra)
  scores = spatial * pictures * (places + extra) ** 2 + temporal * places * (frames + extra) ** 2

  own = 1 + images if config.classes else 1  # rows of the condition
  if config.conditioning == "all_tokens":
    modulation = 0
  elif config.conditioning == "adaln_single":
    modulation = 12 * d * d
  elif per_token_modulation:
    modulation = 12 * d * d * (spatial * pictures + temporal * places) + 4 * d * d * pictures
  else:
    shared = spatial * own + temporal if separate else depth * own
    modulation = 12 * d * d * shared + 4 * d * d * own

  text_in = cross = 0
  if config.context_widths:
    text, texts = sum(text_tokens), 1 + images
    pairs = zip(text_tokens, config.context_widths, strict=True)
    text_in = 2 * texts * d * sum(count * (width + d) for count, width in pairs)
    cross = spatial * (4 * d * d * (every + texts * text) + 4 * every * text * d)
  upsample = 0
  if config.embedding == "compression":
    upsample = 2 * frames * rows * columns * config.out_channels**2 * config.time_stride
  values = config.patch**2 * config.frame_stride * config.in_channels
  steps = 2 * d * (TIME_FREQUENCIES + d)
  return {
    "embedding": 2 * every * values * d + steps + text_in,
    "attention": 8 * d * inner * projected,
    "scores": 4 * inner * scores,
    "cross_attention": cross,
    "mlp": 4 * d * config.mlp_width * (pointwise + depth * extra),
    "modulation": modulation,
    "head": 2 * every * d * config.patch**2 * config.out_channels + upsample,
  }
