"""Text to video and to image (a video of one frame), by flow matching (Movie Gen, section 3.1).

Learns from latents that the encode stage has normalised to mean 0 and std 1 for each channel, so
this file knows no autoencoder: decoding is the business of whoever samples.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.data.buckets import Bucket
from mgen_jax.diffusion import flow_matching, guidance, samplers, time_grids
from mgen_jax.errors import ConfigError
from mgen_jax.models import backbone
from mgen_jax.models import text as text_lib
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.tasks.base import ArraySpec


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How samples are drawn; the defaults are the paper's (section 3.4.2)."""

  method: Literal["euler", "midpoint", "heun"] = "euler"
  grid: Literal["linear", "quadratic", "linear_quadratic"] = "linear_quadratic"
  num_steps: int = 50
  linear_steps: int = 250  # that the linear-quadratic grid stands for
  guidance: float = 7.5


@dataclasses.dataclass(frozen=True)
class TextToVideoConfig:
  """The generator: backbone, text encoder and objective.

  The papers do not state the caption dropout; 10 % is what the field uses.
  """

  name: str = "text_to_video"
  model: backbone.BackboneConfig = backbone.BackboneConfig()
  text: text_lib.ByteEncoderConfig = text_lib.ByteEncoderConfig()
  stride: tuple[int, int, int] = (8, 8, 8)  # pixels per latent: (frames, height, width)
  caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
  time_mean: float = 0.0  # of the logit of t
  time_std: float = 1.0
  sampler: SamplerConfig = SamplerConfig()

  def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the latents of a bucket."""
    t, h, w = self.stride
    return (
      math.ceil(bucket.frames / t),
      bucket.height // h,
      bucket.width // w,
      self.model.out_channels,
    )

  def check_bucket(self, bucket: Bucket) -> None:
    """Raises ConfigError for a bucket that does not fit the strides or the position tables."""
    latents = self.latent_shape(bucket)[:3]
    names = ("frames", "height", "width")
    for axis, side in ((1, bucket.height), (2, bucket.width)):
      unit = self.stride[axis] * self.model.patch[axis]
      if side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise ConfigError(f"{names[axis]} {side} is not a multiple of {unit}: use {nearest}.")
    for axis, size in enumerate(latents):
      limit = self.model.max_positions[axis] * self.model.patch[axis]
      if size > limit or size % self.model.patch[axis]:
        raise ConfigError(
          f"its latent {names[axis]} is {size}, and the model takes multiples of "
          f"{self.model.patch[axis]} up to {limit}: set model.max_positions[{axis}] to "
          f"{math.ceil(size / self.model.patch[axis])} or choose another bucket."
        )

  def check_latents(self, autoencoder: AutoencoderConfig, path: str) -> None:
    """Raises ConfigError where this model does not fit the latents of an autoencoder."""
    stride = (autoencoder.time_stride, *autoencoder.space_strides)
    if stride != self.stride:
      raise ConfigError(f"{path}.task.stride is {self.stride}: the autoencoder's is {stride}.")
    channels = autoencoder.latent_channels
    for key in ("in_channels", "out_channels"):
      if getattr(self.model, key) != channels:
        raise ConfigError(
          f"{path}.task.model.{key} is {getattr(self.model, key)}: the autoencoder has {channels}."
        )


class TextToVideo:
  """Captions -> latents of videos."""

  source = "latents"

  def __init__(self, config: TextToVideoConfig):
    self.config = config
    self._backbone = backbone.Backbone(config.model)
    self._text = text_lib.ByteEncoder(config.text)

  def init(self, key: jax.Array) -> Any:
    """Parameters {"backbone": ..., "text": ...}, boxed with logical axis names."""
    keys = jax.random.split(key)
    latents = jnp.zeros((1, *self.config.model.patch, self.config.model.in_channels))
    tokens = jnp.ones((1, 1), jnp.int32)
    features, mask = jax.eval_shape(self._text.init_with_output, keys[1], tokens)[0]
    context = jnp.zeros(features.shape, features.dtype)
    return {
      "backbone": self._backbone.init(
        keys[0], latents, jnp.zeros((1,)), context, jnp.ones(mask.shape, bool)
      )["params"],
      "text": self._text.init(keys[1], tokens)["params"],
    }

  def velocity(self, params: Any, x: jax.Array, t: jax.Array, tokens: jax.Array) -> jax.Array:
    """u(X_t, t, text): x [B, T, H, W, C], t [B], tokens [B, S] -> [B, T, H, W, C] fp32."""
    features, mask = self._text.apply({"params": params["text"]}, tokens)
    return self._backbone.apply({"params": params["backbone"]}, x, t, features, mask)

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Flow matching on "latents" [B, T, H, W, C] with captions "tokens" [B, S]."""
    pair_keys, drop_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, self.config.caption_dropout))(drop_keys)
    tokens = text_lib.drop_captions(batch["tokens"], drop)
    x, t, target = flow_matching.training_pair(
      pair_keys, batch["latents"], mean=self.config.time_mean, std=self.config.time_std
    )
    prediction = self.velocity(params, x, t, tokens)
    return flow_matching.loss(prediction, target).mean(), {}

  def sample(
    self,
    params: Any,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    bucket: Bucket,
    *,
    sampler: SamplerConfig | None = None,
  ) -> jax.Array:
    """Normalised latents [B, T, H, W, C] for captions "tokens" [B, S], noise from `keys` [B]."""
    sampler = self.config.sampler if sampler is None else sampler
    noise = flow_matching.draw_noise(keys, self.config.latent_shape(bucket))
    tokens = batch["tokens"]
    empty = text_lib.drop_captions(tokens, jnp.ones(tokens.shape[0], bool))
    u = guidance.guided(
      lambda x, t, tokens: self.velocity(params, x, t, tokens), tokens, empty, sampler.guidance
    )
    grid = time_grids.time_grid(sampler.grid, sampler.num_steps, sampler.linear_steps)
    return samplers.sample(u, noise, grid, sampler.method)

  def batch_spec(self, bucket: Bucket, examples: int) -> dict[str, ArraySpec]:
    """ "latents" and "tokens"."""
    return {
      "latents": ArraySpec(
        (examples, *self.config.latent_shape(bucket)),
        np.float32,
        ("batch", "frames", "height", "width", "channels"),
      ),
      "tokens": ArraySpec(
        (examples, self.config.text.max_length), np.int32, ("batch", "context_tokens")
      ),
    }

  def flops(self, bucket: Bucket) -> float:
    """Training FLOPs of one example: three times the forward pass, text encoder included."""
    return sum(self.flops_by_part(bucket).values())

  def flops_by_part(self, bucket: Bucket) -> dict[str, float]:
    """`flops`, by part of the model."""
    text = self.config.text
    shape = self.config.latent_shape(bucket)[:3]
    parts = backbone.flops(self.config.model, shape, math.ceil(text.max_length / text.pool))
    parts["text_encoder"] = sum(text_lib.flops(text, text.max_length).values())
    return {name: 3.0 * part for name, part in parts.items()}

  def tokens(self, bucket: Bucket) -> int:
    """Patches of latents."""
    latents = self.config.latent_shape(bucket)[:3]
    return math.prod(size // p for size, p in zip(latents, self.config.model.patch, strict=True))

  def tokenize(self, prompts: list[str]) -> np.ndarray:
    """Captions -> int32 tokens [B, S]."""
    return text_lib.encode_bytes(prompts, self.config.text.max_length)

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """A record {"latents", "caption"} -> one row of the batch."""
    return {
      "latents": np.asarray(example["latents"], np.float32),
      "tokens": self.tokenize([example["caption"]])[0],
    }
