"""The blocks of Latte: attention within frames, attention along time, and their four arrangements.

A block works on x [B, G, S, D]: B clips of G sequences of S tokens. In the spatial layout a
sequence is a frame (G = frames, S = patches of a frame), in the temporal layout it is a place
(G = patches, S = frames); only the transposes between them differ from variant to variant. Not
here: embeddings, the stack of blocks and the head (see `latte`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.models import layers
from mgen_jax.models import positions as positions_lib
from mgen_jax.parallel.attention import attention

Array = jax.Array

SPATIAL = ("batch", "frames", "tokens", "act_embed")
TEMPORAL = ("batch", "tokens", "frames", "act_embed")

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros
# The reference draws the fused [D, 3D] matrix of queries, keys and values, and so each third of it
# with its bound, sqrt(6 / (D + 3D)).
_fused_xavier = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class Condition(NamedTuple):
  """What every block is told.

  Attributes:
    rows: [B, R, D] under S-AdaLN: the SiLU of time + class, one row for the clip and, in joint
      training with classes, one for each image (R = 1 + I); otherwise R = 1.
    shared: [B, 6, D] under adaLN-single, the output of the one MLP that all blocks share.
    context: [B, T, L, D] text, of the clip and, in joint training, of each image (T = 1 + I).
    mask: [B, T, L] bool, True where there is text.
    positions: [F, D] of the frames, added once; None under rotary encoding.
    angles: [F, head_dim / 2] of the frames under rotary encoding.
  """

  rows: Array | None = None
  shared: Array | None = None
  context: Array | None = None
  mask: Array | None = None
  positions: Array | None = None
  angles: Array | None = None


class Attention(nn.Module):
  """Multi-head attention of x [B, G, S, D] within each of the G sequences.

  `heads` x `head_dim` may be narrower than D (variant 4 has half the heads in each branch).
  """

  config: Any  # LatteConfig
  heads: int
  temporal: bool = False

  @nn.compact
  def __call__(self, x: Array, angles: Array | None = None) -> Array:
    cfg = self.config
    batch, groups, length, width = x.shape
    size = cfg.head_dim

    def heads(name):
      y = layers.Dense(
        self.heads * size,
        ("embed", "heads"),
        use_bias=True,
        dtype=cfg.dtype,
        kernel_init=_fused_xavier,
        name=name,
      )(x)
      y = y.reshape(batch * groups, length, self.heads, size)
      if angles is not None and name != "value":
        y = positions_lib.rotate(y, angles)
      axes = ("batch", "frames" if self.temporal else "tokens", "act_heads", None)
      return checkpoint_name(nn.with_logical_constraint(y, axes), "projection")

    # The frames of a clip are few: they stay on one device, and places are a batch.
    method = None if self.temporal else cfg.context_parallel
    out = attention(heads("query"), heads("key"), heads("value"), context_parallel=method)
    out = out.reshape(batch, groups, length, self.heads * size)
    return layers.Dense(
      width, ("heads", "embed"), use_bias=True, dtype=cfg.dtype, kernel_init=xavier, name="out"
    )(out)


class CrossAttention(nn.Module):
  """Attention of x [B, F + I, N, D] to the text: frames to the clip's, each image to its own."""

  config: Any

  @nn.compact
  def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
    cfg = self.config
    batch, frames, tokens, width = x.shape
    texts, length = context.shape[1:3]

    def heads(inputs, name):
      y = layers.Dense(
        width, ("embed", "heads"), use_bias=True, dtype=cfg.dtype, kernel_init=xavier, name=name
      )(inputs)
      return checkpoint_name(y.reshape(*y.shape[:-1], cfg.heads, cfg.head_dim), "projection")

    query, key, value = heads(x, "query"), heads(context, "key"), heads(context, "value")
    video = frames - (texts - 1)
    tail = (cfg.heads, cfg.head_dim)

    def attend(query, part, rows):
      """`query` [B, n, N, H, hd] of `rows` texts in [B * rows] independent attentions."""
      k, v = (a[:, part].reshape(batch * rows, length, *tail) for a in (key, value))
      m = None if mask is None else mask[:, part].reshape(batch * rows, length)
      q = query.reshape(batch * rows, -1, *tail)
      return attention(q, k, v, mask=m, split_keys=False).reshape(query.shape)

    out = attend(query[:, :video], slice(0, 1), 1)
    if texts > 1:
      out = jnp.concatenate([out, attend(query[:, video:], slice(1, None), texts - 1)], 1)
    out = out.reshape(batch, frames, tokens, width)
    return layers.Dense(
      width, ("heads", "embed"), use_bias=True, dtype=cfg.dtype, kernel_init=zeros, name="out"
    )(out)


class Block(nn.Module):
  """A pre-norm block: attention(s), cross-attention where there is text, MLP.

  `kind` says what the attention part is: "spatial" and "temporal" (variants 1 and 2) have one
  attention, "both" (variant 3) one after the other, "parallel" (variant 4) their sum. x comes in
  the layout of its attention, and in the spatial one for the last two.

  With all-tokens conditioning there is no modulation. The K condition tokens are appended to each
  sequence, and what attention makes of their copies is averaged: one set for each clip. How they
  travel through the split of space and time is not published; this is our choice.
  """

  config: Any
  kind: str

  @nn.compact
  def __call__(
    self, x: Array, tokens: Array | None, condition: Condition, first: Array, images: int = 0
  ) -> tuple[Array, Array | None]:
    """Runs the block.

    Args:
      x: [B, G, S, D].
      tokens: [B, K, D] under all-tokens conditioning.
      condition: see `Condition`.
      first: scalar, 1 in the first block (or pair) and 0 in the others; the temporal positions
        enter there (kinds "both" and "parallel").
      images: how many of the frames are images, which temporal attention does not see.
    """
    cfg = self.config
    axes = TEMPORAL if self.kind == "temporal" else SPATIAL
    x = checkpoint_name(nn.with_logical_constraint(x, axes), "block_input")
    frames = x.shape[2] if self.kind == "temporal" else x.shape[1] - images
    shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(condition, frames, images)
    affine = cfg.conditioning == "all_tokens"

    def norm(name):
      return layers.Norm("layer", cfg.norm_eps, affine=affine, dtype=cfg.dtype, name=name)

    def add(x, tokens, changes, gate):
      change, token_change = changes
      x = x + (change if gate is None else gate * change)
      return x, (None if tokens is None else tokens + token_change)

    def normed(name, shift, scale):
      module = norm(name)
      y = module(x)
      y = y if shift is None else y * (1 + scale) + shift
      return y, (None if tokens is None else module(tokens))

    angles = condition.angles
    if self.kind in ("spatial", "temporal"):
      inner = Attention(cfg, cfg.heads, self.kind == "temporal", name="attention")
      turn = angles if self.kind == "temporal" else None
      x, tokens = add(x, tokens, _attend(inner, *normed("norm1", shift1, scale1), turn), gate1)
    elif self.kind == "both":
      spatial = Attention(cfg, cfg.heads, name="spatial")
      temporal = Attention(cfg, cfg.heads, True, name="temporal")
      x, tokens = add(x, tokens, _attend(spatial, *normed("norm1", shift1, scale1)), gate1)
      x = _add_positions(x, condition, first, images)
      y, y_tokens = normed("norm_temporal", shift1, scale1)
      x, tokens = add(x, tokens, _attend_in_time(temporal, y, y_tokens, angles, images), gate1)
    else:
      half = cfg.heads // 2
      x = _add_positions(x, condition, first, images)
      y, y_tokens = normed("norm1", shift1, scale1)
      within = _attend(Attention(cfg, half, name="spatial"), y, y_tokens)
      along = Attention(cfg, half, True, name="temporal")
      along = _attend_in_time(along, y, y_tokens, angles, images)
      x, tokens = add(x, tokens, jax.tree.map(jnp.add, within, along), gate1)

    if condition.context is not None and self.kind != "temporal":
      x = x + CrossAttention(cfg, name="cross_attention")(x, condition.context, condition.mask)
    y, y_tokens = normed("norm2", shift2, scale2)
    mlp = layers.MLP(
      cfg.mlp_width,
      "gelu",
      use_bias=True,
      dtype=cfg.dtype,
      activation_axes=(*axes[:-1], "act_mlp"),
      kernel_init=xavier,
      name="mlp",
    )
    changes = mlp(y), (None if tokens is None else mlp(y_tokens[:, None])[:, 0])
    x, tokens = add(x, tokens, changes, gate2)
    return nn.with_logical_constraint(x, axes), tokens

  def _modulation(self, condition: Condition, frames: int, images: int) -> tuple[Array | None, ...]:
    """Shift, scale and gate of the attention and of the MLP, each [B, 1 or G, 1, D].

    They are computed once for a clip (and for an image), never for each token.
    """
    cfg = self.config
    if cfg.conditioning == "all_tokens":
      return (None,) * 6
    if cfg.conditioning == "adaln_single":
      table = self.param(
        "modulation",
        layers.partitioned(nn.initializers.normal(cfg.width**-0.5), None, "embed"),
        (6, cfg.width),
      )
      parts = jnp.split(condition.shared + table, 6, axis=1)  # six of [B, 1, D]
    else:
      rows = condition.rows[:, :1] if self.kind == "temporal" else condition.rows
      made = layers.Dense(
        6 * cfg.width, ("embed", "mlp"), use_bias=True, kernel_init=zeros, name="modulation"
      )(rows)
      parts = jnp.split(made, 6, axis=-1)  # six of [B, R, D]
    return tuple(spread_rows(part.astype(cfg.dtype), frames, images) for part in parts)


def spread_rows(rows: Array, frames: int, images: int) -> Array:
  """[B, 1, D] or [B, 1 + I, D] -> [B, 1 or F + I, 1, D]: the clip's row for each of its frames."""
  if rows.shape[1] > 1:
    clip = jnp.broadcast_to(rows[:, :1], (rows.shape[0], frames, rows.shape[2]))
    rows = jnp.concatenate([clip, rows[:, 1:]], 1)
  elif images:
    rows = rows[:, :1]
  return rows[:, :, None]


def _attend(
  inner: Attention, x: Array, tokens: Array | None, angles: Array | None = None
) -> tuple[Array, Array | None]:
  """Attention of x [B, G, S, D] with the condition tokens [B, K, D] at the end of each sequence."""
  if tokens is None:
    return inner(x, angles), None
  batch, groups, length, width = x.shape
  copies = jnp.broadcast_to(tokens[:, None], (batch, groups, tokens.shape[1], width))
  if angles is not None:  # the tokens stand at no time
    angles = jnp.pad(angles, ((0, tokens.shape[1]), (0, 0)))
  out = inner(jnp.concatenate([x, copies], 2), angles)
  return out[:, :, :length], out[:, :, length:].mean(1)


def _attend_in_time(
  inner: Attention, x: Array, tokens: Array | None, angles: Array | None, images: int
) -> tuple[Array, Array | None]:
  """Temporal attention of x in the spatial layout; what it adds to images is 0."""
  video = x[:, : x.shape[1] - images].swapaxes(1, 2)  # [B, N, F, D]
  out, tokens = _attend(inner, video, tokens, angles)
  out = out.swapaxes(1, 2)
  if images:
    out = jnp.pad(out, ((0, 0), (0, images), (0, 0), (0, 0)))
  return out, tokens


def _add_positions(x: Array, condition: Condition, first: Array, images: int) -> Array:
  """The temporal positions for the video frames of x [B, F + I, N, D], in the first block only."""
  if condition.positions is None:
    return x
  table = jnp.pad(condition.positions, ((0, images), (0, 0)))
  return x + (first * table)[:, None].astype(x.dtype)


class Pair(nn.Module):
  """Variant 1: a spatial and a temporal block. The carry of the scan is (x, tokens)."""

  config: Any
  images: int = 0

  @nn.compact
  def __call__(
    self, carry: tuple[Array, Array | None], first: Array, condition: Condition
  ) -> tuple[tuple[Array, Array | None], None]:
    x, tokens = carry
    x, tokens = Block(self.config, "spatial", name="spatial")(
      x, tokens, condition, first, self.images
    )
    x = _add_positions(x, condition, first, self.images)
    frames = x.shape[1] - self.images
    video, images = x[:, :frames], x[:, frames:]
    video, tokens = Block(self.config, "temporal", name="temporal")(
      video.swapaxes(1, 2), tokens, condition, first
    )
    x = video.swapaxes(1, 2)
    return (jnp.concatenate([x, images], 1) if self.images else x, tokens), None


class One(nn.Module):
  """A single block as the body of a scan (variants 2, 3 and 4)."""

  config: Any
  kind: str
  images: int = 0

  @nn.compact
  def __call__(
    self, carry: tuple[Array, Array | None], first: Array, condition: Condition
  ) -> tuple[tuple[Array, Array | None], None]:
    block = Block(self.config, self.kind, name="block")
    return block(*carry, condition, first, self.images), None


stack_of = functools.partial(
  nn.scan,
  variable_axes={"params": 0},
  split_rngs={"params": True},
  in_axes=(0, nn.broadcast),
  metadata_params={nn.PARTITION_NAME: "layers"},
)
