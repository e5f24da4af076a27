"""The transformer of Movie Gen (section 3.1.3), complete by configuration: 30B or a toy.

A layer adds the positions, then runs self-attention, cross-attention to the context and a gated
MLP; the flow time enters through one modulation MLP shared by all layers plus a small table per
layer. Not here: text encoders, the autoencoder, and how time and noise are drawn.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers
from mgen_jax.models import positions as positions_lib
from mgen_jax.models import remat as remat_lib
from mgen_jax.parallel.attention import attention

Array = jax.Array

TOKENS = ("batch", "tokens", "act_embed")
NORM_TOKENS = ("batch", "norm_tokens", "act_embed")
HEADS = ("batch", "tokens", "act_heads", None)
CONTEXT = ("batch", "context_tokens", "act_embed")
CONTEXT_HEADS = ("batch", "context_tokens", "act_heads", None)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  """Everything that fixes the transformer; the defaults are the paper's 30B (Table 1)."""

  layers: int = 48
  width: int = 6144
  heads: int = 48
  kv_heads: int | None = None  # fewer heads of keys and values (GQA); None: as many as `heads`
  mlp_width: int = 16384
  activation: Literal["swiglu", "silu", "gelu"] = "swiglu"
  norm: Literal["rms", "layer"] = "rms"
  norm_eps: float = 1e-5
  norm_affine: bool = True
  use_bias: bool = False
  qk_norm: bool = False  # RMSNorm of each head's queries and keys
  cross_norm: bool = False  # the paper draws no norm in front of the cross-attention
  # The cross-attention starts silent, as in PixArt; the paper does not say.
  cross_zero_init: bool = False
  in_channels: int = 16  # of the latents, with every condition that is concatenated to them
  out_channels: int = 16
  patch: tuple[int, int, int] = (1, 2, 2)
  # "learned": factorised tables, added at the input of every layer (section 3.1.3); "rotary":
  # queries and keys of the self-attention are turned by time, height and width, without tables.
  positions: Literal["learned", "rotary"] = "learned"
  max_positions: tuple[int, int, int] = (32, 96, 96)  # of the tables: time, height, width patches
  position_std: float = 0.02  # of the position tables at the start; a toy learns faster from 0.5
  # How the tables of an earlier stage with fewer positions become this model's; see
  # `positions.grow`.
  position_growth: Literal["interpolate", "extend"] = "interpolate"
  rotary_theta: float = 10_000.0
  context_widths: tuple[int, ...] = (4096, 1280, 1472)  # UL2, MetaCLIP, ByT5
  # How the self-attention sees the tokens of the other devices on the mesh axis "context".
  context_parallel: Literal["all_gather", "ring", "ulysses"] = "all_gather"
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: str = "full"  # see models/remat.py
  scan_unroll: int = 1  # layers per iteration of the scan; a toy on a CPU runs faster unrolled

  def __post_init__(self):
    check_ranges(
      self,
      positive=(
        *("layers", "width", "heads", "kv_heads", "mlp_width", "in_channels", "out_channels"),
        *("patch", "max_positions", "context_widths", "rotary_theta", "scan_unroll"),
      ),
      natural=("norm_eps", "position_std"),
    )
    remat_lib.policy(self.remat)
    if self.width % self.heads:
      raise ConfigError(f"width {self.width} does not divide into {self.heads} heads.")
    if self.heads % self.key_heads:
      raise ConfigError(f"heads {self.heads} do not divide into kv_heads {self.kv_heads} groups.")
    if self.positions == "rotary" and (self.head_dim % 2 or self.head_dim < 6):
      raise ConfigError(
        f"heads of {self.head_dim} cannot be rotated in three dimensions: width / heads must be "
        "even and at least 6."
      )

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.heads

  @property
  def key_heads(self) -> int:
    """Heads of keys and values."""
    return self.heads if self.kv_heads is None else self.kv_heads


# The 30B and 5B are the paper's (the 5B's mlp_width is chosen to give 5B). It names 7B, 9B and 17B
# without their shapes: ours keep its proportions, heads of 128 and a number of heads that tensor
# parallelism over 4 divides. The 1B is the one of mindone's re-implementation.
_FULL = BackboneConfig(cross_zero_init=True)
SIZES = {
  "30B": _FULL,
  "17B": dataclasses.replace(_FULL, layers=40, width=5120, heads=40, mlp_width=13824),
  "9B": dataclasses.replace(_FULL, layers=32, width=4096, heads=32, mlp_width=11776),
  "7B": dataclasses.replace(_FULL, layers=32, width=3584, heads=28, mlp_width=10240),
  "5B": dataclasses.replace(_FULL, layers=32, width=3072, heads=24, mlp_width=8192),
  "1B": dataclasses.replace(_FULL, layers=24, width=1536, heads=16, mlp_width=4096),
  "toy": BackboneConfig(
    layers=6,
    width=192,
    heads=6,
    mlp_width=512,
    qk_norm=True,
    cross_norm=True,
    max_positions=(4, 8, 8),
    context_widths=(128,),
    dtype="float32",
    remat="none",
    scan_unroll=6,
  ),
}


def dit_arm(config: BackboneConfig) -> BackboneConfig:
  """The DiT arm of the paper's ablation (Table 9): everything else stays as in `config`."""
  return dataclasses.replace(
    config, norm="layer", norm_eps=1e-6, norm_affine=False, activation="silu", use_bias=True
  )


class Attention(nn.Module):
  """Multi-head attention of x [B, N, D] to itself or to a source [B, S, D] under its mask."""

  config: BackboneConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    source: Array | None = None,
    mask: Array | None = None,
    angles: Array | None = None,
  ) -> Array:
    cfg = self.config
    batch, tokens, width = x.shape
    dense = functools.partial(layers.Dense, use_bias=cfg.use_bias, dtype=cfg.dtype)

    def heads(inputs, name, count, axes):
      y = dense(count * cfg.head_dim, ("embed", "heads"), inputs=axes[:2], name=name)(inputs)
      y = y.reshape(*y.shape[:2], count, cfg.head_dim)  # [B, N, H, Dh]
      if cfg.qk_norm and name != "value":
        y = layers.Norm("rms", cfg.norm_eps, dtype=cfg.dtype, name=f"{name}_norm")(y)
      if angles is not None and name != "value":
        y = positions_lib.rotate(y, angles)
      return checkpoint_name(nn.with_logical_constraint(y, axes), "projection")

    inputs = x if source is None else source
    key_axes = HEADS if source is None else CONTEXT_HEADS
    query = heads(x, "query", cfg.heads, HEADS)
    key = heads(inputs, "key", cfg.key_heads, key_axes)
    value = heads(inputs, "value", cfg.key_heads, key_axes)
    if source is None:
      out = attention(query, key, value, mask=mask, context_parallel=cfg.context_parallel)
    else:  # every device has the whole text: there is nothing to exchange
      out = attention(query, key, value, mask=mask, split_keys=False)
    out = nn.with_logical_constraint(out, HEADS).reshape(batch, tokens, width)
    quiet = source is not None and cfg.cross_zero_init
    init = nn.initializers.zeros if quiet else layers.fan_in_init
    return dense(width, ("heads", "embed"), kernel_init=init, inputs=HEADS[:2], name="out")(out)


class Block(nn.Module):
  """One layer, in the order of the paper's figure 8. The carry of the scan over layers."""

  config: BackboneConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    positions: Array | None,
    angles: Array | None,
    modulation: Array,
    context: Array,
    mask: Array | None,
  ) -> tuple[Array, None]:
    """Runs the layer.

    Between the attentions and the MLP, which need all tokens of an example (or all of a device's
    share of them) and are split over heads and hidden units, the tokens are split over the mesh
    axis "tensor" as well: norms and the residual stream cost each device its share only.

    Args:
      x: tokens [B, N, D].
      positions: [B, N, D], added at the input of every layer, if they are learned.
      angles: [N, head_dim / 2], if positions are rotary.
      modulation: [B, 6, D] fp32, the shared MLP's output; the layer adds its own table.
      context: [B, S, D]; mask: [B, S] bool, True where there is text.
    """
    cfg = self.config
    norm = functools.partial(
      layers.Norm, cfg.norm, cfg.norm_eps, affine=cfg.norm_affine, dtype=cfg.dtype
    )
    x = checkpoint_name(nn.with_logical_constraint(x, NORM_TOKENS), "block_input")
    table = self.param(
      "modulation",
      layers.partitioned(nn.initializers.normal(cfg.width**-0.5), None, "embed"),
      (6, cfg.width),
    )
    table = layers.expand(table, modulation.shape)
    shifts = jnp.split((modulation + table).astype(cfg.dtype), 6, axis=1)  # six of [B, 1, D]
    shift1, scale1, gate1, shift2, scale2, gate2 = shifts

    def split(y):
      return nn.with_logical_constraint(y, NORM_TOKENS)

    def whole(y):  # this device's share of the context axis, no longer split over "tensor"
      return nn.with_logical_constraint(split(y), TOKENS)  # and its gradient is split again

    if positions is not None:
      x = x + positions
    y = whole(norm(name="self_norm")(x) * (1 + scale1) + shift1)
    y = split(Attention(cfg, name="self_attention")(y, angles=angles))
    x = x + gate1 * y
    y = whole(norm(name="cross_norm")(x) if cfg.cross_norm else x)
    x = x + split(Attention(cfg, name="cross_attention")(y, context, mask))
    y = whole(norm(name="mlp_norm")(x) * (1 + scale2) + shift2)
    mlp = layers.MLP(cfg.mlp_width, cfg.activation, cfg.use_bias, cfg.dtype, name="mlp")
    x = x + gate2 * split(mlp(y))
    return split(x), None


def patchify(latents: Array, patch: Sequence[int]) -> Array:
  """[B, T, H, W, C] -> [B, T/pt, H/ph, W/pw, pt*ph*pw*C]; each size must be divisible."""
  batch, *size, channels = latents.shape
  for name, n, p in zip(("frames", "height", "width"), size, patch, strict=True):
    if n % p:
      raise ConfigError(
        f"latent {name} {n} is not divisible by the patch size {p}: choose a bucket whose "
        f"latent {name} is a multiple of it"
      )
  t, h, w = (n // p for n, p in zip(size, patch, strict=True))
  x = latents.reshape(batch, t, patch[0], h, patch[1], w, patch[2], channels)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t, h, w, -1)


def unpatchify(x: Array, patch: Sequence[int]) -> Array:
  """The inverse of `patchify`: [B, t, h, w, pt*ph*pw*C] -> [B, t*pt, h*ph, w*pw, C]."""
  batch, t, h, w, features = x.shape
  channels = features // (patch[0] * patch[1] * patch[2])
  x = x.reshape(batch, t, h, w, *patch, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
  return x.reshape(batch, t * patch[0], h * patch[1], w * patch[2], channels)


class Backbone(nn.Module):
  """Latents, flow time and context -> velocity."""

  config: BackboneConfig

  @nn.compact
  def __call__(
    self,
    latents: Array,
    time: Array,
    context: Array | Sequence[Array],
    context_mask: Array | Sequence[Array] | None = None,
    *,
    modulation: Array | None = None,
  ) -> Array:
    """Predicts the velocity.

    Args:
      latents: [B, T, H, W, in_channels], noisy, conditions concatenated on the channels.
      time: [B] in [0, 1], 0 is noise.
      context: text features [B, S, context_width]; one array for each entry of
        `config.context_widths` (a bare array if there is one entry).
      context_mask: likewise, [B, S] bool, True where there is text; None: all of it.
      modulation: [B, width], added to the time embedding (edit task and the like).

    Returns:
      [B, T, H, W, out_channels] fp32.

    Raises:
      ConfigError: the latents exceed the position tables or do not divide into patches.
    """
    cfg = self.config
    patches = patchify(latents, cfg.patch)
    batch, *grid, _ = patches.shape
    x = patches.reshape(batch, -1, patches.shape[-1])  # [B, N, pt*ph*pw*C]
    x = layers.Dense(
      cfg.width, (None, "embed"), use_bias=cfg.use_bias, dtype=cfg.dtype, name="patch_in"
    )(x)
    positions = angles = None
    if cfg.positions == "learned":
      # Every example has its own, which XLA does not store on one device: the gradients of all
      # layers are then added where they are, and cross the devices once, not in each layer.
      positions = jnp.broadcast_to(self._positions(grid).astype(cfg.dtype), x.shape)
      positions = nn.with_logical_constraint(positions, NORM_TOKENS)
    else:
      angles = positions_lib.rotary_angles(grid, cfg.head_dim, cfg.rotary_theta)
    text, mask = self._context(context, context_mask)

    embedded = layers.TimeEmbedding(cfg.width, use_bias=cfg.use_bias, name="time")(time)
    if modulation is not None:
      embedded = embedded + modulation.astype(jnp.float32)
    shared = layers.Dense(
      6 * cfg.width,
      ("embed", "mlp"),
      use_bias=cfg.use_bias,
      kernel_init=nn.initializers.zeros,
      name="modulation",
    )(nn.silu(embedded)).reshape(batch, 6, cfg.width)

    x = self._layers()(x, positions, angles, shared, text, mask)[0]
    return self._head(x, embedded, grid)

  def _layers(self) -> nn.Module:
    """The stack of layers: parameters [layers, ...] whatever the remat policy and the unroll."""
    cfg = self.config
    policy = remat_lib.policy(cfg.remat)
    block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=cfg.layers,
      unroll=min(cfg.scan_unroll, cfg.layers),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(cfg, name="layers")

  def _positions(self, grid: Sequence[int]) -> Array:
    """The factorised learnable positions of a grid of patches: [1, t*h*w, D] (section 3.1.3)."""
    cfg = self.config
    tables = []
    for axis, (name, n, limit) in enumerate(
      zip(positions_lib.AXES, grid, cfg.max_positions, strict=True)
    ):
      if n > limit:
        raise ConfigError(
          f"{n} patches of latent {name} exceed the position table's {limit}: "
          f"raise max_positions[{axis}] to {n} or choose a smaller bucket"
        )
      init = layers.partitioned(nn.initializers.normal(cfg.position_std), None, "embed")
      tables.append(self.param(f"position_{name}", init, (limit, cfg.width))[:n])
    return positions_lib.grid_sum(tables)

  def _context(self, context, context_mask) -> tuple[Array, Array | None]:
    """Projects and normalises each context and joins them along the tokens: [B, S, D], [B, S]."""
    cfg = self.config
    sources = [context] if isinstance(context, jax.Array) else list(context)
    masks = context_mask
    if masks is None or isinstance(masks, jax.Array):
      masks = [masks] * len(sources)
    if tuple(source.shape[-1] for source in sources) != tuple(cfg.context_widths):
      raise ConfigError(
        f"context widths {[source.shape[-1] for source in sources]} differ from the model's "
        f"context_widths {list(cfg.context_widths)}: set them to the text encoders' widths"
      )
    texts, scales, biases = [], [], []
    for index, source in enumerate(sources):
      y = layers.Dense(
        cfg.width,
        (None, "embed"),
        use_bias=cfg.use_bias,
        dtype=cfg.dtype,
        name=f"context_{index}",
      )(source)
      texts.append(y)
      scale, bias = layers.Affine(cfg.width, name=f"context_norm_{index}")()
      scales.append(jnp.broadcast_to(scale, y.shape[1:]))
      biases.append(jnp.broadcast_to(bias, y.shape[1:]))
    # All tokens are normalised at once, each with its own encoder's scale and bias.
    text = layers.Norm("layer", affine=False)(jnp.concatenate(texts, 1))
    scale, bias = (layers.expand(jnp.concatenate(x), text.shape) for x in (scales, biases))
    text = text * scale + bias
    text = nn.with_logical_constraint(text.astype(cfg.dtype), CONTEXT)
    if all(mask is None for mask in masks):
      return text, None
    masks = [
      jnp.ones(source.shape[:2], bool) if mask is None else mask
      for source, mask in zip(sources, masks, strict=True)
    ]
    return text, jnp.concatenate(masks, 1)

  def _head(self, x: Array, embedded: Array, grid: Sequence[int]) -> Array:
    """Norm, modulation by the time, linear map to the patch's values, unpatchify."""
    cfg = self.config
    table = self.param(
      "head_modulation",
      layers.partitioned(nn.initializers.normal(cfg.width**-0.5), None, "embed"),
      (2, cfg.width),
    )
    shape = x.shape[0], *table.shape  # [B, 2, D]
    embedded = jax.lax.broadcast_in_dim(embedded.astype(jnp.float32), shape, (0, 2))
    shift, scale = jnp.split(embedded + layers.expand(table, shape), 2, axis=1)
    x = layers.Norm(cfg.norm, cfg.norm_eps, affine=cfg.norm_affine, name="head_norm")(x)
    x = nn.with_logical_constraint(x * (1 + scale) + shift, NORM_TOKENS)
    values = cfg.patch[0] * cfg.patch[1] * cfg.patch[2] * cfg.out_channels
    x = layers.Dense(
      values,
      ("embed", None),
      use_bias=cfg.use_bias,
      dtype=cfg.dtype,
      kernel_init=nn.initializers.zeros,
      name="head",
    )(x)
    return unpatchify(x.astype(jnp.float32).reshape(x.shape[0], *grid, values), cfg.patch)


def flops(
  config: BackboneConfig, latent_shape: Sequence[int], text_tokens: int | Sequence[int]
) -> dict[str, int]:
  """Exact matmul FLOPs of one forward pass of one example, by part (2 for a multiply-add).

  Args:
    config: the model.
    latent_shape: (T, H, W) of the latents.
    text_tokens: number of context tokens, one for each entry of `config.context_widths`.

  Returns:
    FLOPs of "embedding", "self_attention" (projections), "self_scores" (the two products of the
    attention itself), "cross_attention", "cross_scores", "mlp", "modulation", "head".
  """
  counts = [text_tokens] if isinstance(text_tokens, int) else list(text_tokens)
  d, n, s = config.width, 1, sum(counts)
  keys = config.key_heads * config.head_dim
  values = config.patch[0] * config.patch[1] * config.patch[2]
  for size, patch in zip(latent_shape, config.patch, strict=True):
    n *= size // patch
  texts = sum(c * w for c, w in zip(counts, config.context_widths, strict=True))
  return {
    "embedding": 2 * d * (n * values * config.in_channels + texts),
    "self_attention": config.layers * 2 * n * (2 * d + 2 * keys) * d,
    "self_scores": config.layers * 4 * n * n * d,
    "cross_attention": config.layers * 2 * (2 * n * d + 2 * s * keys) * d,
    "cross_scores": config.layers * 4 * n * s * d,
    "mlp": config.layers * layers.mlp_flops(n, d, config.mlp_width, config.activation),
    "modulation": 2 * d * (256 + d + 6 * d),
    "head": 2 * n * d * values * config.out_channels,
  }


def grow_positions(params: dict, fresh: dict, method: str) -> dict:
  """Parameters of a smaller grid for a model with longer position tables.

  Args:
    params: trained; fresh: those of the larger model at its start, for rows that are new.
    method: see `positions.grow`.

  Returns:
    `params` with its position tables grown to the size of those in `fresh`; a table that it did not
    have is that of `fresh`, one that is no longer used is left out.

  Raises:
    ConfigError: a table would shrink.
  """
  grown = dict(params)
  for axis in positions_lib.AXES:
    name = f"position_{axis}"
    if name in fresh:
      have = name in params
      grown[name] = positions_lib.grow(params[name], fresh[name], method) if have else fresh[name]
    else:
      grown.pop(name, None)
  return grown


def grow_channels(params: dict, fresh: dict, patch: Sequence[int]) -> dict:
  """Parameters of a model with fewer input channels for one that reads more (conditions beside the
  latents, movie_gen 8 and 11).

  Args:
    params: trained; fresh: those of the larger model, for its shape.
    patch: that a token is made of: its rows come position by position, channels last.

  Returns:
    `params` with rows of zeros for the channels that are new: at first they say nothing.
  """
  kernel, wanted = params["patch_in"]["kernel"], fresh["patch_in"]["kernel"]
  if kernel.shape == wanted.shape:
    return params
  places = math.prod(patch)
  rows = kernel.reshape(places, -1, kernel.shape[-1])  # [places, channels, width]
  more = wanted.shape[0] // places - rows.shape[1]
  rows = jnp.pad(rows, ((0, 0), (0, more), (0, 0)))
  kernel = rows.reshape(wanted.shape)
  return {**params, "patch_in": {**params["patch_in"], "kernel": kernel}}
