"""A byte-level text encoder, trained jointly with the generator. Needs no vocabulary file.

Tokens are those of ByT5: 0 pads, 1 ends the text, byte b is b + 3. An empty caption is the one
token "end", so that the unconditional branch of guidance always has a token to attend to.

With `max_words`, the bytes of a word become one feature: what a word means is then learned once,
not for every place where it may stand in the caption. Not here: the pre-trained encoders of the
paper (UL2, MetaCLIP, ByT5).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers
from mgen_jax.parallel.attention import attention

PAD, END, OFFSET = 0, 1, 3
VOCABULARY = 256 + OFFSET


def encode_bytes(texts: Sequence[str], length: int) -> np.ndarray:
  """UTF-8 texts as int32 tokens [len(texts), length]; longer texts are cut, the end token kept."""
  tokens = np.full((len(texts), length), PAD, np.int32)
  for row, text in enumerate(texts):
    data = np.frombuffer(text.encode("utf-8", "replace")[: length - 1], np.uint8)
    tokens[row, : len(data)] = data.astype(np.int32) + OFFSET
    tokens[row, len(data)] = END
  return tokens


def drop_captions(tokens: jax.Array, drop: jax.Array) -> jax.Array:
  """Replaces the captions [B, S] where `drop` [B] is True by the empty caption."""
  empty = jnp.zeros_like(tokens[0]).at[0].set(END)
  return jnp.where(drop[:, None], empty, tokens)


@dataclasses.dataclass(frozen=True)
class ByteEncoderConfig:
  """Shape of the byte encoder; the defaults are the toy used by the quickstart."""

  width: int = 128
  layers: int = 2
  heads: int = 4
  mlp_width: int = 256
  kernel: int = 7  # bytes seen by the convolution in front: about one word
  max_words: int | None = None  # one feature for each word, the text cut behind them; None: bytes
  max_length: int = 64  # bytes, the end token included
  dtype: Literal["bfloat16", "float32"] = "float32"

  def __post_init__(self):
    check_ranges(
      self,
      positive=("width", "layers", "heads", "mlp_width", "kernel", "max_words", "max_length"),
    )
    if self.width % self.heads:
      raise ConfigError(f"width {self.width} does not divide into {self.heads} heads.")

  @property
  def features(self) -> int:
    """The largest number of features of a text."""
    return self.max_length if self.max_words is None else self.max_words


class EncoderBlock(nn.Module):
  """A pre-norm transformer layer over the bytes; padding is never attended to."""

  config: ByteEncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    cfg = self.config
    batch, length, width = x.shape

    def dense(axes, name):
      return layers.Dense(width, axes, dtype=cfg.dtype, name=name)

    y = layers.Norm(dtype=cfg.dtype, name="attention_norm")(x)
    q, k, v = (
      dense(("embed", "heads"), name)(y).reshape(batch, length, cfg.heads, -1)
      for name in ("query", "key", "value")
    )
    y = attention(q, k, v, mask=mask, context_parallel=None).reshape(batch, length, width)
    x = x + dense(("heads", "embed"), "out")(y)
    y = layers.Norm(dtype=cfg.dtype, name="mlp_norm")(x)
    axes = ("batch", "context_tokens", "act_mlp")
    mlp = layers.MLP(cfg.mlp_width, "gelu", dtype=cfg.dtype, activation_axes=axes, name="mlp")
    return x + mlp(y)


class ByteEncoder(nn.Module):
  """Bytes -> features: a convolution over neighbouring bytes, then transformer layers."""

  config: ByteEncoderConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes int32 tokens [B, S].

    Returns:
      Features [B, S, width] (with `max_words` [B, max_words, width]) and their mask, True where
      there is text.

    Raises:
      ConfigError: S is longer than the position table.
    """
    cfg = self.config
    if tokens.shape[1] > cfg.max_length:
      raise ConfigError(
        f"a text of {tokens.shape[1]} bytes is longer than max_length {cfg.max_length}: cut it"
      )
    mask = tokens != PAD
    table = self.param(
      "embedding",
      layers.partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
      (VOCABULARY, cfg.width),
    )
    x = jnp.take(table, tokens, axis=0).astype(cfg.dtype) * mask[..., None]
    kernel = self.param(
      "kernel",
      layers.partitioned(layers.fan_in_init, None, None, "embed"),
      (cfg.kernel, cfg.width, cfg.width),
    )
    half = cfg.kernel // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)))[:, :, None]  # [B, S + k - 1, 1, D]
    x = x + layers.convolve(padded, kernel.astype(cfg.dtype)[:, None], method="matmul")[:, :, 0]
    if cfg.max_words is not None:
      share = word_shares(tokens, cfg.max_words)
      x = jnp.einsum("bsw,bsd->bwd", share.astype(x.dtype), nn.silu(x))
      mask = share.any(1)
    positions = self.param(
      "positions",
      layers.partitioned(nn.initializers.normal(0.02), None, "embed"),
      (cfg.features, cfg.width),
    )
    x = x + positions[: x.shape[1]].astype(cfg.dtype)
    x = nn.with_logical_constraint(x, ("batch", "context_tokens", "act_embed"))
    for index in range(cfg.layers):
      x = EncoderBlock(cfg, name=f"layer_{index}")(x, mask)
    return layers.Norm(dtype=cfg.dtype, name="norm")(x), mask


def word_shares(tokens: jax.Array, words: int) -> jax.Array:
  """How much each byte counts in the mean of each word: [B, S] -> [B, S, words] fp32.

  Bytes up to the space (control characters too) part words; the end token is a word of its own.
  What lies behind the last of `words` words counts nowhere.
  """
  blank = (tokens > END) & (tokens <= OFFSET + ord(" "))
  inside = (tokens != PAD) & ~blank
  first = inside & ~jnp.pad(inside, ((0, 0), (1, 0)))[:, :-1] | (tokens == END)
  word = jnp.cumsum(first, 1) - 1
  member = jax.nn.one_hot(word, words) * inside[..., None]
  return member / jnp.maximum(member.sum(1, keepdims=True), 1.0)


def flops(config: ByteEncoderConfig, tokens: int) -> dict[str, int]:
  """Matmul FLOPs of one forward pass over one text of `tokens` bytes, by part."""
  width, count = config.width, tokens if config.max_words is None else config.max_words
  return {
    "convolution": 2 * tokens * config.kernel * width * width,
    "words": 0 if config.max_words is None else 2 * tokens * count * width,
    "attention": config.layers * (8 * count * width * width + 4 * count * count * width),
    "mlp": config.layers * layers.mlp_flops(count, width, config.mlp_width, "gelu"),
  }
