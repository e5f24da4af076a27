"""The encoder of the T5 family, one module by config: T5, T5 v1.1, UL2, ByT5, UMT5.

Pre-norm transformer layers without biases. Positions enter only as a bias of the attention scores,
looked up by the distance of key and query; scores are not scaled by the width of a head. What
differs between the members is a key of `T5Config`. Sources: Raffel et al. 2020 (T5), Shazeer 2020
(gated units), Xue et al. 2022 (ByT5), Tay et al. 2023 (UL2), Chung et al. 2023 (UMT5).

Not here: tokenizers and the names that public weights carry (`mgen_jax/encoders`).
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import check_ranges
from mgen_jax.models import layers

Array = jax.Array

TOKENS = ("batch", "context_tokens", "act_embed")
HEADS = ("batch", "context_tokens", "act_heads", None)
_ACTIVATIONS = {
  "relu": nn.relu,
  "gated_gelu": functools.partial(nn.gelu, approximate=True),  # tanh: the exact one is 4e-4 off
  "gated_silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape of an encoder; the defaults are UL2's."""

  vocab: int = 32128
  width: int = 4096
  layers: int = 32
  heads: int = 16
  head_dim: int = 256  # heads * head_dim may differ from width
  mlp_width: int = 16384
  activation: Literal["relu", "gated_gelu", "gated_silu"] = "gated_silu"
  buckets: int = 32  # of distances, half of them for keys before the query
  max_distance: int = 128  # from which on all distances share a bucket
  shared_bias: bool = True  # one table for all layers; UMT5 has one in each
  norm_eps: float = 1e-6
  dtype: str = "bfloat16"
  scan_unroll: int = 1

  def __post_init__(self):
    check_ranges(
      self,
      positive=(
        *("vocab", "width", "layers", "heads", "head_dim", "mlp_width", "buckets"),
        *("max_distance", "scan_unroll"),
      ),
      natural=("norm_eps",),
    )

  @property
  def output_width(self) -> int:
    """Of a feature."""
    return self.width


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
  """The bucket of each distance key - query from 1 - length to length - 1, int32 [2 length - 1].

  Half of the buckets are for keys after the query; half of those are exact distances, the rest
  grow by logarithm up to `max_distance`. In fp64: a bf16 logarithm is wrong at 45 and 90.
  """
  distance = np.arange(1 - length, length)
  half = buckets // 2
  exact = half // 2
  far = np.abs(distance)
  log = np.log(np.maximum(far, 1) / exact) / np.log(max_distance / exact)
  # fp32 as in every other implementation: where the logarithm is a whole number, it decides.
  large = exact + (log.astype(np.float32) * np.float32(half - exact)).astype(np.int32)
  return np.where(distance > 0, half, 0) + np.where(far < exact, far, np.minimum(large, half - 1))


class PositionBias(nn.Module):
  """What the distance of key and query adds to the scores: fp32 [1, heads, S, S]."""

  config: T5Config

  @nn.compact
  def __call__(self, length: int) -> Array:
    cfg = self.config
    table = self.param(
      "table",
      layers.partitioned(nn.initializers.normal(cfg.width**-0.5), None, "heads"),
      (cfg.buckets, cfg.heads),
    )
    by_distance = jnp.take(
      table.astype(jnp.float32).T, distance_buckets(length, cfg.buckets, cfg.max_distance), axis=1
    )  # [H, 2 S - 1]
    offset = jnp.arange(length)[None, :] - jnp.arange(length)[:, None] + length - 1
    return jnp.take(by_distance, offset, axis=1)[None]


class T5Attention(nn.Module):
  """Self-attention of x [B, S, D] with a bias on the unscaled scores."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array, mask: Array) -> Array:
    cfg = self.config
    batch, length, width = x.shape
    inner = cfg.heads * cfg.head_dim

    def heads(name, std):
      init = nn.initializers.normal(std)
      y = layers.Dense(inner, ("embed", "heads"), dtype=cfg.dtype, kernel_init=init, name=name)(x)
      return nn.with_logical_constraint(y.reshape(batch, length, cfg.heads, cfg.head_dim), HEADS)

    query = heads("query", (width * cfg.head_dim) ** -0.5)
    key, value = heads("key", width**-0.5), heads("value", width**-0.5)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores + bias, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(cfg.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    out = nn.with_logical_constraint(out, HEADS).reshape(batch, length, inner)
    init = nn.initializers.normal(inner**-0.5)
    return layers.Dense(width, ("heads", "embed"), dtype=cfg.dtype, kernel_init=init, name="out")(
      out
    )


class T5MLP(nn.Module):
  """Feed-forward layer, gated (three matrices) or with ReLU (two)."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    dense = functools.partial(layers.Dense, dtype=cfg.dtype)
    act = _ACTIVATIONS[cfg.activation]
    up = dense(cfg.mlp_width, ("embed", "mlp"), name="up")(x)
    if cfg.activation == "relu":
      hidden = act(up)
    else:
      hidden = act(dense(cfg.mlp_width, ("embed", "mlp"), name="gate")(x)) * up
    hidden = nn.with_logical_constraint(hidden, ("batch", "context_tokens", "act_mlp"))
    return dense(x.shape[-1], ("mlp", "embed"), name="down")(hidden)


class T5Block(nn.Module):
  """One layer; the carry of the scan over layers."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array | None, mask: Array) -> tuple[Array, None]:
    cfg = self.config
    norm = functools.partial(layers.Norm, "rms", cfg.norm_eps, dtype=cfg.dtype)
    if bias is None:
      bias = PositionBias(cfg, name="position_bias")(x.shape[1])
    y = T5Attention(cfg, name="attention")(norm(name="attention_norm")(x), bias, mask)
    x = nn.with_logical_constraint(x + y, TOKENS)
    x = x + T5MLP(cfg, name="mlp")(norm(name="mlp_norm")(x))
    return nn.with_logical_constraint(x, TOKENS), None


class T5Encoder(nn.Module):
  """Tokens -> features."""

  config: T5Config

  @nn.compact
  def __call__(self, tokens: Array, mask: Array) -> Array:
    """Encodes int32 tokens [B, S] under their mask [B, S], True where there is text.

    Returns:
      [B, S, width] in the config's dtype; what stands at padding has no meaning. A row that is all
      padding gives finite numbers.
    """
    cfg = self.config
    table = self.param(
      "embedding",
      layers.partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
      (cfg.vocab, cfg.width),
    )
    x = jnp.take(table, tokens, axis=0).astype(cfg.dtype)  # [B, S, D]
    x = nn.with_logical_constraint(x, TOKENS)
    bias = PositionBias(cfg, name="position_bias")(x.shape[1]) if cfg.shared_bias else None
    stack = nn.scan(
      T5Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=cfg.layers,
      unroll=min(cfg.scan_unroll, cfg.layers),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x = stack(cfg, name="layers")(x, bias, mask)[0]
    return layers.Norm("rms", cfg.norm_eps, dtype=cfg.dtype, name="norm")(x)


def flops(config: T5Config, tokens: int) -> dict[str, int]:
  """Matmul FLOPs of one forward pass over one text of `tokens` tokens, by part."""
  inner = config.heads * config.head_dim
  matrices = 2 if config.activation == "relu" else 3
  return {
    "attention": config.layers * (8 * tokens * config.width * inner + 4 * tokens**2 * inner),
    "mlp": config.layers * 2 * matrices * tokens * config.width * config.mlp_width,
  }
