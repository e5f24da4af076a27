"""The two towers of CLIP and MetaCLIP: text and vision, by config.

Pre-norm transformers with biases and learned positions. The text tower is causal and pools at the
token that ends the text; the vision tower pools at a class token. Sources: Radford et al. 2021,
Xu et al. 2024 (MetaCLIP); text positions beyond 77 after Long-CLIP (Zhang et al. 2024), and what
is trained of them after Movie Gen (appendix on Long-prompt MetaCLIP).

Not here: tokenizers, images from files and the names of public weights (`mgen_jax/encoders`).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers

Array = jax.Array

TOKENS = ("batch", "context_tokens", "act_embed")
HEADS = ("batch", "context_tokens", "act_heads", None)

# Mean and standard deviation of the pixels, in [0, 1], that all public towers were trained with.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Shape of a text tower; the defaults are those of MetaCLIP's ViT-bigG at 256 positions."""

  vocab: int = 49408
  width: int = 1280
  layers: int = 32
  heads: int = 20
  mlp_width: int = 5120
  max_positions: int = 256
  activation: Literal["quick_gelu", "gelu"] = "gelu"
  projection: int | None = 1280  # width of the pooled feature; None: not projected
  # Where a text is pooled: at its first `eos` token, or, as CLIP's first code did, at its largest
  # token (the same, where the end token is the last of the vocabulary).
  pooling: Literal["eos", "argmax"] = "eos"
  eos: int = 49407
  norm_eps: float = 1e-5
  dtype: str = "bfloat16"

  def __post_init__(self):
    check_ranges(
      self,
      positive=("vocab", "width", "layers", "heads", "mlp_width", "max_positions", "projection"),
      natural=("eos", "norm_eps"),
    )

  @property
  def output_width(self) -> int:
    """Of a feature."""
    return self.width


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
  """Shape of a vision tower; the defaults are those of ViT-H/14."""

  image_size: int = 224
  patch: int = 14
  width: int = 1280
  layers: int = 32
  heads: int = 16
  mlp_width: int = 5120
  activation: Literal["quick_gelu", "gelu"] = "gelu"
  projection: int | None = 1024
  norm_eps: float = 1e-5
  dtype: str = "bfloat16"

  def __post_init__(self):
    check_ranges(
      self,
      positive=("image_size", "patch", "width", "layers", "heads", "mlp_width", "projection"),
      natural=("norm_eps",),
    )

  @property
  def output_width(self) -> int:
    """Of a feature."""
    return self.width


class ClipOutput(NamedTuple):
  """What a tower makes of its input.

  Attributes:
    last: text: [B, S, width] behind the final norm; vision: [B, 1 + patches, width] before it.
    penultimate: [B, ., width], what enters the last layer.
    pooled: [B, width], normed.
    projected: [B, projection] fp32, in the space that both towers share; None without projection.
  """

  last: Array
  penultimate: Array
  pooled: Array
  projected: Array | None


def _activation(name: str):
  if name == "quick_gelu":
    return lambda x: x * nn.sigmoid(1.702 * x)
  return functools.partial(nn.gelu, approximate=False)


class ClipBlock(nn.Module):
  """One layer; its carry is (output, input), so that the scan ends with what enters the last."""

  config: ClipTextConfig | ClipVisionConfig

  @nn.compact
  def __call__(self, carry: tuple[Array, Array], mask: Array | None) -> tuple[Any, None]:
    """x [B, S, D] under a mask [B or 1, 1, S, S] of what may be attended to; None: all."""
    cfg = self.config
    x = before = carry[0]
    batch, length, width = x.shape
    dense = functools.partial(layers.Dense, use_bias=True, dtype=cfg.dtype)
    norm = functools.partial(layers.Norm, "layer", cfg.norm_eps, dtype=cfg.dtype)

    y = norm(name="attention_norm")(x)

    def heads(name):
      z = dense(width, ("embed", "heads"), name=name)(y)
      return nn.with_logical_constraint(z.reshape(batch, length, cfg.heads, -1), HEADS)

    query, key, value = heads("query"), heads("key"), heads("value")
    query = query * (width // cfg.heads) ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
      scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(cfg.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
    x = x + dense(width, ("heads", "embed"), name="out")(y)
    hidden = dense(cfg.mlp_width, ("embed", "mlp"), name="up")(norm(name="mlp_norm")(x))
    hidden = _activation(cfg.activation)(hidden)
    hidden = nn.with_logical_constraint(hidden, ("batch", "context_tokens", "act_mlp"))
    x = x + dense(width, ("mlp", "embed"), name="down")(hidden)
    return (nn.with_logical_constraint(x, TOKENS), before), None


def _stack(config: ClipTextConfig | ClipVisionConfig) -> nn.Module:
  stack = nn.scan(
    ClipBlock,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=config.layers,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return stack(config, name="layers")


def _project(config: ClipTextConfig | ClipVisionConfig, pooled: Array) -> Array | None:
  if config.projection is None:
    return None
  dense = layers.Dense(config.projection, ("embed", None), dtype=config.dtype, name="projection")
  return dense(pooled).astype(jnp.float32)


class ClipText(nn.Module):
  """Tokens -> features, causal."""

  config: ClipTextConfig

  @nn.compact
  def __call__(self, tokens: Array, mask: Array | None = None) -> ClipOutput:
    """Encodes int32 tokens [B, S].

    Args:
      tokens: each row holds the token that ends the text (`check_ends` says so on the host).
      mask: [B, S], True where there is text; only what stands at padding depends on it.

    Raises:
      ConfigError: S is longer than the position table.
    """
    cfg = self.config
    length = tokens.shape[1]
    if length > cfg.max_positions:
      raise ConfigError(
        f"a text of {length} tokens is longer than max_positions {cfg.max_positions}: cut it, or "
        "stretch the table (convert --positions)"
      )
    table = self.param(
      "embedding",
      layers.partitioned(nn.initializers.normal(0.02), "vocab", "embed"),
      (cfg.vocab, cfg.width),
    )
    positions = self.param(
      "positions",
      layers.partitioned(nn.initializers.normal(0.01), None, "embed"),
      (cfg.max_positions, cfg.width),
    )
    x = (jnp.take(table, tokens, axis=0) + positions[:length]).astype(cfg.dtype)
    causal = jnp.tri(length, dtype=bool)[None, None]
    mask = causal if mask is None else causal & mask[:, None, None]
    (x, before), _ = _stack(cfg)((x, x), mask)
    x = layers.Norm("layer", cfg.norm_eps, dtype=cfg.dtype, name="norm")(x)
    last = jnp.argmax(tokens if cfg.pooling == "argmax" else tokens == cfg.eos, axis=1)
    pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return ClipOutput(x, before, pooled, _project(cfg, pooled))


def check_ends(config: ClipTextConfig, tokens: np.ndarray) -> None:
  """Raises ConfigError for a row of tokens [B, S] without an end: it would be pooled at its start.

  A function of the host: what is compiled cannot complain.
  """
  if config.pooling == "eos" and not (missing := (tokens == config.eos).any(1)).all():
    raise ConfigError(
      f"text {int(np.argmin(missing))} does not hold the token {config.eos} that ends a text: add "
      "it, or set eos to the tokenizer's"
    )


class ClipVision(nn.Module):
  """Images -> features."""

  config: ClipVisionConfig

  @nn.compact
  def __call__(self, images: Array) -> ClipOutput:
    """Encodes images [B, H, W, 3], normalised by PIXEL_MEAN and PIXEL_STD.

    Raises:
      ConfigError: H or W is not the config's image_size.
    """
    cfg = self.config
    if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
      raise ConfigError(
        f"images of shape {tuple(images.shape[1:])} do not fit the tower: resize them to "
        f"{(cfg.image_size, cfg.image_size, 3)}"
      )
    size, grid = cfg.patch, cfg.image_size // cfg.patch
    kernel = self.param(
      "patch",
      layers.partitioned(layers.fan_in_init, None, None, None, "embed"),
      (size, size, 3, cfg.width),
    )
    x = images.reshape(-1, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, grid * grid, size * size * 3).astype(cfg.dtype)  # [B, patches, values]
    x = x @ kernel.reshape(-1, cfg.width).astype(cfg.dtype)
    table = nn.initializers.normal(0.02)
    token = self.param("class_token", layers.partitioned(table, "embed"), (cfg.width,))
    positions = self.param(
      "positions", layers.partitioned(table, None, "embed"), (1 + grid * grid, cfg.width)
    )
    token = jnp.broadcast_to(token.astype(cfg.dtype), (x.shape[0], 1, cfg.width))
    x = jnp.concatenate([token, x], 1) + positions.astype(cfg.dtype)
    norm = functools.partial(layers.Norm, "layer", cfg.norm_eps, dtype=cfg.dtype)
    x = norm(name="norm_before")(x)
    (x, before), _ = _stack(cfg)((x, x), None)
    pooled = norm(name="norm")(x[:, 0])
    return ClipOutput(x, before, pooled, _project(cfg, pooled))


def stretch_positions(table: Array, length: int, keep: int = 20) -> Array:
  """A longer table of text positions: [N, D] -> [length, D] (Long-CLIP; theirs is 77 -> 248).

  The first `keep` rows, which nearly all captions reach, stay; the others are spread evenly over
  what follows, by linear interpolation, and by extrapolation behind the last. Movie Gen has 256
  positions and does not say how they start.

  Raises:
    ConfigError: the table would shrink.
  """
  count = table.shape[0]
  if length < count or count < keep + 2:
    raise ConfigError(
      f"{count} positions cannot become {length} with the first {keep} kept: tables only grow"
    )
  at = np.arange(length, dtype=np.float64)
  at = np.where(at < keep, at, keep + (at - keep) * (count - keep) / (length - keep))
  low = np.minimum(at.astype(np.int64), count - 2)
  share = (at - low).astype(np.float32)[:, None]
  exact = jnp.asarray(table, jnp.float32)
  made = exact[low] + share * (exact[low + 1] - exact[low])
  return jnp.concatenate([exact[:keep], made[keep:]]).astype(table.dtype)


def positions_and_biases(params: Any) -> Any:
  """What Long-prompt MetaCLIP trains of its text tower: True at the positions and at every bias.

  A mask for optax, of the parameters of `ClipText`: `optax.chain(optax.masked(optimizer, mask),
  optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)))`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ("positions", "bias"), params
  )


def flops(config: ClipTextConfig, tokens: int) -> dict[str, int]:
  """Matmul FLOPs of one forward pass of the text tower over one text, by part."""
  width = config.width
  return {
    "attention": config.layers * (8 * tokens * width * width + 4 * tokens**2 * width),
    "mlp": config.layers * 4 * tokens * width * config.mlp_width,
  }
