"""The LLaMA 3 and 3.1 decoder, with a cache of keys and values.

RMSNorm, rotary positions (the two halves of a head are the pair that is turned), grouped-query
attention, SwiGLU; no biases. Source: Grattafiori et al. 2024. Of use for prompt rewriting and for
captions (Movie Gen 3.5 and 3.2). Not here: the tokenizer, and how the next token is chosen from
more than one text at a time (`generate` samples or takes the likeliest).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers

Array = jax.Array

TOKENS = ("batch", "context_tokens", "act_embed")
HEADS = ("batch", "context_tokens", "act_heads", None)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Shape of a decoder; the defaults are LLaMA 3 8B's."""

  vocab: int = 128256
  width: int = 4096
  layers: int = 32
  heads: int = 32
  kv_heads: int = 8
  mlp_width: int = 14336
  max_positions: int = 8192
  rope_theta: float = 500_000.0
  # LLaMA 3.1 turns slow pairs slower, to read longer texts; 1: LLaMA 3 turns all as they are.
  rope_factor: float = 1.0  # by which those are slowed that turn less than rope_low times ...
  rope_low: float = 1.0
  rope_high: float = 4.0  # ... and not at all those that turn more often than this ...
  rope_original: int = 8192  # ... in so many tokens
  tied: bool = False  # the embedding is the head too
  norm_eps: float = 1e-5
  dtype: str = "bfloat16"

  def __post_init__(self):
    check_ranges(
      self,
      positive=(
        *("vocab", "width", "layers", "heads", "kv_heads", "mlp_width", "max_positions"),
        *("rope_theta", "rope_original"),
      ),
      natural=("norm_eps",),
    )
    if self.width % self.heads or self.heads % self.kv_heads:
      raise ConfigError(
        f"width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} do not divide."
      )
    if self.rope_factor <= 0 or not 0 <= self.rope_low < self.rope_high:
      raise ConfigError(
        f"rope_factor {self.rope_factor}, rope_low {self.rope_low} and rope_high {self.rope_high} "
        "scale no positions: the factor is positive and rope_low is less than rope_high."
      )

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.heads

  @property
  def output_width(self) -> int:
    """Of a hidden state."""
    return self.width


class Cache(NamedTuple):
  """Keys and values of the tokens read so far, the same place for the same position."""

  keys: Array  # [layers, B, places, kv_heads, head_dim]
  values: Array
  length: Array  # int32 [B]: places in use, all at the front


def make_cache(config: LlamaConfig, batch: int, places: int) -> Cache:
  """An empty cache for `batch` texts of up to `places` tokens."""
  shape = (config.layers, batch, places, config.kv_heads, config.head_dim)
  empty = jnp.zeros(shape, config.dtype)
  return Cache(empty, empty, jnp.zeros(batch, jnp.int32))


def frequencies_of(config: LlamaConfig) -> np.ndarray:
  """How far each pair of a head turns from one token to the next, radians, fp32 [head_dim / 2].

  Source of the scaling: LLaMA 3.1 (rope_type "llama3" of the public configs).
  """
  half = config.head_dim // 2
  plain = config.rope_theta ** (-np.arange(half) / half)
  turns = config.rope_original * plain / (2 * np.pi)
  kept = np.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0.0, 1.0)
  return (plain * (kept + (1 - kept) / config.rope_factor)).astype(np.float32)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
  """Turns the pairs of x [B, S, H, Dh] by positions [B, S] times frequencies, angles in fp32."""
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [B, S, 1, Dh / 2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class LlamaAttention(nn.Module):
  """Causal self-attention of x [B, S, D]; what is cached is read and written."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x: Array, positions: Array, places: Array, visible: Array, cached: Any
  ) -> tuple[Array, Any]:
    """See `Llama`: `places` [B, S] are where keys go, `visible` [B, S, keys] what may be seen."""
    cfg = self.config
    batch, length, width = x.shape

    def heads(name, count):
      y = layers.Dense(count * cfg.head_dim, ("embed", "heads"), dtype=cfg.dtype, name=name)(x)
      return y.reshape(batch, length, count, cfg.head_dim)

    frequencies = frequencies_of(cfg)
    query = rotate(heads("query", cfg.heads), positions, frequencies)
    query = nn.with_logical_constraint(query, HEADS)
    key = rotate(heads("key", cfg.kv_heads), positions, frequencies)
    value = heads("value", cfg.kv_heads)
    if cached is not None:
      rows = jnp.arange(batch)[:, None]
      # Padding has a place outside, and is dropped.
      key = cached[0].at[rows, places].set(key, mode="drop")
      value = cached[1].at[rows, places].set(value, mode="drop")
      cached = (key, value)
    grouped = query.reshape(batch, length, cfg.kv_heads, -1, cfg.head_dim)
    scores = jnp.einsum("bqkgd,btkd->bkgqt", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(
      visible[:, None, None], scores * cfg.head_dim**-0.5, jnp.finfo(jnp.float32).min
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(cfg.dtype)
    out = jnp.einsum("bkgqt,btkd->bqkgd", weights, value).reshape(batch, length, width)
    return layers.Dense(width, ("heads", "embed"), dtype=cfg.dtype, name="out")(out), cached


class LlamaBlock(nn.Module):
  """One layer; the carry of the scan over layers, with its part of the cache as what is scanned."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x: Array, cached: Any, positions: Array, places: Array, visible: Array
  ) -> tuple[Array, Any]:
    cfg = self.config
    norm = functools.partial(layers.Norm, "rms", cfg.norm_eps, dtype=cfg.dtype)
    attend = LlamaAttention(cfg, name="attention")
    y, cached = attend(norm(name="attention_norm")(x), positions, places, visible, cached)
    x = nn.with_logical_constraint(x + y, TOKENS)
    axes = ("batch", "context_tokens", "act_mlp")
    mlp = layers.MLP(cfg.mlp_width, "swiglu", dtype=cfg.dtype, activation_axes=axes, name="mlp")
    x = x + mlp(norm(name="mlp_norm")(x))
    return nn.with_logical_constraint(x, TOKENS), cached


class LlamaOutput(NamedTuple):
  """What the decoder makes of its tokens."""

  logits: Array  # fp32 [B, S, vocab], of the token after each
  hidden: Array  # [B, S, width], behind the final norm
  cache: Cache | None


class Llama(nn.Module):
  """Tokens -> logits of the next."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, tokens: Array, mask: Array | None = None, cache: Cache | None = None
  ) -> LlamaOutput:
    """Reads int32 tokens [B, S] after those that are in the cache.

    Args:
      tokens: padded on either side.
      mask: [B, S], True where there is text; None: everywhere. Padding takes no position and no
        place in the cache.
      cache: of the tokens before; None: there are none, and none is returned. Its places must
        suffice: what comes after the last is not kept.

    Raises:
      ConfigError: there are more tokens or places than the model was made for.
    """
    cfg = self.config
    batch, length = tokens.shape
    count = length if cache is None else cache.keys.shape[2]
    if max(count, length) > cfg.max_positions:
      raise ConfigError(
        f"{max(count, length)} tokens are more than max_positions {cfg.max_positions}: cut the text"
      )
    mask = jnp.ones((batch, length), bool) if mask is None else mask
    before = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    positions = jnp.maximum(before[:, None] + jnp.cumsum(mask, 1) - 1, 0)
    if cache is None:  # keys stand where their tokens stand
      places, cached = positions, None
      visible = jnp.tri(length, dtype=bool) & mask[:, None, :]
    else:
      places, cached = jnp.where(mask, positions, count), (cache.keys, cache.values)
      visible = jnp.arange(count) <= positions[..., None]

    table = self.param(
      "embedding",
      layers.partitioned(nn.initializers.normal(0.02), "vocab", "embed"),
      (cfg.vocab, cfg.width),
    )
    x = jnp.take(table, tokens, axis=0).astype(cfg.dtype)
    stack = nn.scan(
      LlamaBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=cfg.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, cached = stack(cfg, name="layers")(x, cached, positions, places, visible)
    x = layers.Norm("rms", cfg.norm_eps, dtype=cfg.dtype, name="norm")(x)
    if cfg.tied:
      logits = jnp.einsum("bsd,vd->bsv", x, table.astype(cfg.dtype))
    else:
      logits = layers.Dense(cfg.vocab, ("embed", "vocab"), dtype=cfg.dtype, name="head")(x)
    if cache is not None:
      cache = Cache(*cached, before + mask.sum(1, dtype=jnp.int32))
    return LlamaOutput(logits.astype(jnp.float32), x, cache)


def generate(
  config: LlamaConfig,
  params: Any,
  tokens: Array,
  mask: Array,
  steps: int,
  *,
  end: int,
  key: Array | None = None,
  temperature: float = 0.0,
) -> Array:
  """Continues texts, to be called inside `jit` (`steps` is static).

  Args:
    config: of the model.
    params: its parameters.
    tokens: int32 [B, S]; mask: [B, S], True where there is text (at least one token a row).
    steps: how many tokens to add.
    end: the token that ends a text; it fills what follows it.
    key: of the randomness, needed with a temperature.
    temperature: 0 takes the likeliest token.

  Returns:
    int32 [B, steps].
  """
  model = Llama(config)
  batch, length = tokens.shape
  cache = make_cache(config, batch, length + steps)
  first = model.apply({"params": params}, tokens, mask, cache)
  last = length - 1 - jnp.argmax(mask[:, ::-1], 1)  # of each text: padding may stand behind it
  logits = jnp.take_along_axis(first.logits, last[:, None, None], 1)[:, 0]
  keys = jax.random.split(jax.random.key(0) if key is None else key, steps)

  def step(carry, key):
    logits, cache, done = carry
    if temperature:
      picked = jax.random.categorical(key, logits / temperature)
    else:
      picked = jnp.argmax(logits, -1)
    picked = jnp.where(done, end, picked).astype(jnp.int32)
    out = model.apply({"params": params}, picked[:, None], None, cache)
    return (out.logits[:, 0], out.cache, done | (picked == end)), picked

  _, made = jax.lax.scan(step, (logits, first.cache, jnp.zeros(batch, bool)), keys)
  return made.T
