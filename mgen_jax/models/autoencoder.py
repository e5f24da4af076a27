"""The temporal autoencoder of Movie Gen (section 3.1.1): an image autoencoder inflated to 2.5D.

Each spatial convolution is followed by a temporal one (the identity at the start) and each spatial
attention by a temporal one (zero at the start), so that before training the inflated model equals
the image model on every frame. Any length goes in: T frames make ceil(T / stride) latent frames,
and the decoder drops the frames that were not there. By config: the frame-wise model, and the 3D
arm of the paper's ablation. Not here: its FLOPs (`autoencoder_flops`), pieces of long videos
(`tiling`), losses, latent statistics.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers
from mgen_jax.models.backbone import patchify, unpatchify
from mgen_jax.parallel.attention import attention

Array = jax.Array

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Everything that fixes the autoencoder; the defaults are 8x8x8 with 16 channels, full size.

  The paper leaves widths and placement open; they follow the latent-diffusion autoencoder.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of `channels`, one for each level
  res_blocks: int = 2  # of each encoder level
  decoder_res_blocks: int = 3  # of each decoder level
  latent_channels: int = 16
  space_down: tuple[int, ...] = (0, 1, 2)  # levels that end with a stride of 2 in space
  time_down: tuple[int, ...] = (0, 1, 2)  # and in time
  mid_attention: bool = True
  temporal: bool = True  # False: the frame-wise image autoencoder
  # "3d" joins both halves of each convolution in one kernel, and attends over space and time at
  # once: the other arm of the paper's Table 11.
  inflation: str = "2.5d"
  # Attention over all time, as in the paper. Without it the reach in time is finite, and a video of
  # any length can be coded in pieces exactly and in constant memory (see `tiling`).
  temporal_attention: bool = True
  quant_conv: bool = False  # 1x1 convolutions around the latents, as in Stable Diffusion 1 and 2
  kernel: int = 3  # spatial; 1 treats each position by itself (with `patch`, for toys)
  temporal_kernel: int = 3
  # Pixels joined in one position in front (and split at the end) by a linear map, in place of the
  # convolutions next to the pixels: cheap, for toys. (1, 1, 1) is the paper's.
  patch: tuple[int, int, int] = (1, 1, 1)
  norm: str = "group"  # of each frame; "rms": over the channels of each position (Wan, toys)
  groups: int = 32  # of the group norms
  # "matmul" trains faster on a CPU; see layers.convolve.
  conv_method: Literal["direct", "matmul"] = "direct"
  remat: bool = False  # recompute the residual blocks in the backward pass: less memory
  dtype: Literal["bfloat16", "float32"] = "float32"

  @property
  def has_patch(self) -> bool:
    """Whether linear maps of patches stand next to the pixels instead of convolutions."""
    return self.patch != (1, 1, 1)

  @property
  def patch_values(self) -> int:
    """Numbers in one patch of RGB pixels."""
    return 3 * self.patch[0] * self.patch[1] * self.patch[2]

  @property
  def time_stride(self) -> int:
    """Frames per latent frame."""
    return self.patch[0] * 2 ** len(self.time_down)

  @property
  def space_strides(self) -> tuple[int, int]:
    """Pixels per latent, (height, width)."""
    scale = 2 ** len(self.space_down)
    return self.patch[1] * scale, self.patch[2] * scale

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the latents of a video.

    Raises:
      ConfigError: the height or the width is not divisible by the spatial stride.
    """
    for name, n, stride in zip(
      ("height", "width"), (height, width), self.space_strides, strict=True
    ):
      if n % stride or n < 1:
        nearest = max(stride, round(n / stride) * stride)
        raise ConfigError(
          f"video {name} {n} is not divisible by the autoencoder's stride {stride}: use {nearest}"
        )
    if frames < 1:
      raise ConfigError(f"a video of {frames} frames cannot be encoded: use at least 1")
    rows, columns = self.space_strides
    t = math.ceil(frames / self.time_stride)
    return t, height // rows, width // columns, self.latent_channels

  def check(self) -> None:
    """Raises ConfigError where fields are out of range or contradict each other."""
    check_ranges(
      self,
      positive=(
        *("channels", "multipliers", "latent_channels", "kernel", "temporal_kernel", "patch"),
        "groups",
      ),
      natural=("res_blocks", "decoder_res_blocks", "space_down", "time_down"),
    )
    levels = range(len(self.multipliers))
    for name in ("space_down", "time_down"):
      if not set(getattr(self, name)) <= set(levels):
        raise ConfigError(
          f"{name} {getattr(self, name)} names a level that does not exist: "
          f"use levels from 0 to {len(self.multipliers) - 1}"
        )
    if not self.temporal and self.time_down:
      raise ConfigError(
        f"temporal=False has no strides in time: set time_down {self.time_down} to ()"
      )
    if self.inflation not in ("2.5d", "3d"):
      raise ConfigError(f"unknown inflation {self.inflation!r}: use '2.5d' or '3d'")
    if self.kernel % 2 == 0 or self.temporal_kernel % 2 == 0:
      raise ConfigError(
        f"kernel {self.kernel} and temporal_kernel {self.temporal_kernel} must be odd: use 1 or 3"
      )
    if self.norm not in ("group", "rms", "layer"):
      raise ConfigError(f"unknown norm {self.norm!r}: use 'group', 'rms' or 'layer'")
    for multiplier in self.multipliers if self.norm == "group" else ():
      if (self.channels * multiplier) % self.groups:
        raise ConfigError(
          f"{self.channels * multiplier} channels do not divide into groups={self.groups}: "
          f"use channels={self.groups * max(1, round(self.channels / self.groups))}"
        )


def _norm(config: AutoencoderConfig, name: str) -> nn.Module:
  """The normalisation in front of each activation, by configuration."""
  if config.norm == "group":
    return layers.GroupNorm(config.groups, dtype=config.dtype, name=name)
  return layers.Norm(config.norm, dtype=config.dtype, name=name)


class Conv(nn.Module):
  """A 2.5D convolution: spatial, then temporal over the same channels; or both in one, "3d"."""

  config: AutoencoderConfig
  features: int
  kernel: int | None = None  # by default `config.kernel`
  stride: int = 1
  time_stride: int = 1
  padding: tuple[int, int] | None = None
  spatial: bool = True  # False: only the temporal half, where a level keeps its frame size

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    kernel = cfg.kernel if self.kernel is None else self.kernel
    # A 1x1 convolution sees one pixel, and so does its temporal half.
    taps = cfg.temporal_kernel if kernel > 1 else 1
    if cfg.temporal and cfg.inflation == "3d":
      x = layers.VolumeConv(
        self.features,
        (taps, kernel, kernel) if self.spatial else (taps, 1, 1),
        (self.time_stride, self.stride, self.stride),
        self.padding if self.spatial else None,
        dtype=cfg.dtype,
        method=cfg.conv_method,
        name="volume",
      )(x)
      return nn.with_logical_constraint(x, layers.VIDEO_AXES)
    if self.spatial:
      x = layers.SpatialConv(
        self.features,
        kernel,
        self.stride,
        self.padding,
        dtype=cfg.dtype,
        method=cfg.conv_method,
        name="spatial",
      )(x)
    if cfg.temporal:
      x = layers.TemporalConv(
        taps, self.time_stride, dtype=cfg.dtype, method=cfg.conv_method, name="temporal"
      )(x)
    return nn.with_logical_constraint(x, layers.VIDEO_AXES)


class ResBlock(nn.Module):
  """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1 if the width changes)."""

  config: AutoencoderConfig
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    y = _norm(cfg, "norm1")(x)
    y = Conv(cfg, self.features, name="conv1")(nn.silu(y))
    y = _norm(cfg, "norm2")(y)
    y = Conv(cfg, self.features, name="conv2")(nn.silu(y))
    if x.shape[-1] != self.features:
      x = Conv(cfg, self.features, kernel=1, name="shortcut")(x)
    return x + y


class AxisAttention(nn.Module):
  """Single-head self-attention over the second-last axis: x [N, L, C], added to its input."""

  config: AutoencoderConfig
  zero_init: bool = False

  @nn.compact
  def __call__(self, normed: Array) -> Array:
    cfg, channels = self.config, normed.shape[-1]

    def dense(name, init=layers.fan_in_init):
      axes = ("conv_in", "conv_out")
      return layers.Dense(
        channels, axes, use_bias=True, dtype=cfg.dtype, kernel_init=init, name=name
      )

    q, k, v = (dense(name)(normed)[:, :, None] for name in ("query", "key", "value"))
    init = nn.initializers.zeros if self.zero_init else layers.fan_in_init
    return dense("out", init)(attention(q, k, v, context_parallel=None)[:, :, 0])


class AttentionBlock(nn.Module):
  """Attention within each frame, then over time at each position (zero at the start).

  Inflated to "3d": over all positions of all frames at once.
  """

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    b, t, h, w, c = x.shape
    y = _norm(cfg, "norm")(x)
    if cfg.temporal and cfg.temporal_attention and cfg.inflation == "3d":
      return x + AxisAttention(cfg, name="spatial")(y.reshape(b, t * h * w, c)).reshape(x.shape)
    y = AxisAttention(cfg, name="spatial")(y.reshape(b * t, h * w, c))
    x = x + y.reshape(x.shape)
    if not (cfg.temporal and cfg.temporal_attention):
      return x
    y = _norm(cfg, "temporal_norm")(x)
    y = y.reshape(b, t, h * w, c).swapaxes(1, 2).reshape(b * h * w, t, c)
    y = AxisAttention(cfg, zero_init=True, name="temporal")(y)
    return x + y.reshape(b, h * w, t, c).swapaxes(1, 2).reshape(x.shape)


def _res_block(config: AutoencoderConfig, features: int, name: str) -> nn.Module:
  return (nn.remat(ResBlock) if config.remat else ResBlock)(config, features, name=name)


class Middle(nn.Module):
  """The blocks at the lowest resolution: res, attention (by config), res."""

  config: AutoencoderConfig
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _res_block(self.config, self.features, "block1")(x)
    if self.config.mid_attention:
      x = AttentionBlock(self.config, name="attention")(x)
    return _res_block(self.config, self.features, "block2")(x)


# The two parts that a pass can be cut into: "levels" stands next to the pixels, and what it makes
# of a frame depends on a few neighbours only; "middle" stands next to the latents, is small, and
# attends to all frames. The decoder's last map may also be taken apart: "output", after "features".
Part = Literal["levels", "middle", "features", "output"]


class Encoder(nn.Module):
  """Video -> mean and log-variance of the latents, joined on the channels."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: Array, part: Part | None = None) -> Array:
    if part != "middle":
      x = self._levels(x)
    return x if part == "levels" else self._middle(x)

  def _levels(self, video: Array) -> Array:
    cfg = self.config
    x = self._input(video, cfg.channels * cfg.multipliers[0])
    for level, multiplier in enumerate(cfg.multipliers):
      features = cfg.channels * multiplier
      for block in range(cfg.res_blocks):
        x = _res_block(cfg, features, f"level{level}_block{block}")(x)
      space, time = level in cfg.space_down, level in cfg.time_down
      if space or time:
        # Zeros after the last row and column only, as in the latent-diffusion autoencoder.
        x = Conv(
          cfg,
          features,
          stride=2 if space else 1,
          time_stride=2 if time else 1,
          padding=(0, 1),
          spatial=space,
          name=f"level{level}_down",
        )(x)
    return x

  def _middle(self, x: Array) -> Array:
    cfg = self.config
    x = Middle(cfg, x.shape[-1], name="middle")(x)
    x = nn.silu(_norm(cfg, "norm_out")(x))
    x = Conv(cfg, 2 * cfg.latent_channels, name="conv_out")(x)
    return Conv(cfg, x.shape[-1], kernel=1, name="quant_conv")(x) if cfg.quant_conv else x

  def _input(self, video: Array, features: int) -> Array:
    cfg = self.config
    if not cfg.has_patch:
      return Conv(cfg, features, name="conv_in")(video)
    # Frames that do not fill a temporal patch are completed by repeating the last one.
    x = patchify(layers.replicate_pad(video, 0, -video.shape[1] % cfg.patch[0], axis=1), cfg.patch)
    return layers.Dense(
      features, (None, "conv_out"), use_bias=True, dtype=cfg.dtype, name="patch_in"
    )(x)


class Decoder(nn.Module):
  """Latents -> video, all `time_stride` frames of every latent frame."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: Array, part: Part | None = None) -> Array:
    if part in (None, "middle", "features"):
      x = self._middle(x)
    if part in (None, "levels", "features"):
      x = self._levels(x)
    return self._output(x) if part in (None, "levels", "output") else x

  def _middle(self, x: Array) -> Array:
    cfg = self.config
    if cfg.quant_conv:
      x = Conv(cfg, cfg.latent_channels, kernel=1, name="quant_conv")(x)
    x = Conv(cfg, cfg.channels * cfg.multipliers[-1], name="conv_in")(x)
    return Middle(cfg, x.shape[-1], name="middle")(x)

  def _levels(self, x: Array) -> Array:
    cfg = self.config
    for level in reversed(range(len(cfg.multipliers))):
      features = cfg.channels * cfg.multipliers[level]
      # The decoder's level undoes the down step that led to the encoder's next level.
      space, time = level in cfg.space_down, level in cfg.time_down
      if space or time:
        x = jnp.repeat(x, 2, axis=1) if time else x
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3) if space else x
        x = Conv(cfg, x.shape[-1], spatial=space, name=f"level{level}_up")(x)
      for block in range(cfg.decoder_res_blocks):
        x = _res_block(cfg, features, f"level{level}_block{block}")(x)
    return nn.silu(_norm(cfg, "norm_out")(x))

  def _output(self, x: Array) -> Array:
    cfg = self.config
    if not cfg.has_patch:
      return Conv(cfg, 3, name="conv_out")(x).astype(jnp.float32)
    x = layers.Dense(
      cfg.patch_values, ("conv_in", None), use_bias=True, dtype=cfg.dtype, name="patch_out"
    )(x)
    return unpatchify(x.astype(jnp.float32), cfg.patch)


class Autoencoder(nn.Module):
  """Videos [-1, 1] <-> latents. Images are videos of one frame."""

  config: AutoencoderConfig

  def setup(self):
    self.config.check()
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def encode(self, video: Array) -> tuple[Array, Array]:
    """Encodes a video.

    Args:
      video: [B, T, H, W, 3] in [-1, 1]; any T, H and W divisible by the spatial stride.

    Returns:
      Mean and log-variance of the latents, each [B, ceil(T / time_stride), H', W', C] in fp32.

    Raises:
      ConfigError: a size that the stride does not divide.
    """
    self.config.latent_shape(*video.shape[1:4])
    return self._moments(self.encoder(video))

  def _moments(self, x: Array) -> tuple[Array, Array]:
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, -1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def encode_levels(self, video: Array) -> Array:
    """The part of `encode` next to the pixels: [B, T, H, W, 3] -> [B, T', H', W', features]."""
    self.config.latent_shape(*video.shape[1:4])
    return self.encoder(video, "levels")

  def encode_middle(self, features: Array) -> tuple[Array, Array]:
    """The rest: `encode` is `encode_middle` of `encode_levels`."""
    return self._moments(self.encoder(features, "middle"))

  def decode(self, latents: Array, frames: int | None = None) -> Array:
    """Decodes latents [B, T, H', W', C] to a video [B, frames, H, W, 3] in about [-1, 1].

    `frames` drops the surplus frames of the last latent frame; None keeps them.
    """
    return self.decoder(latents)[:, :frames]

  def decode_middle(self, latents: Array) -> Array:
    """The part of `decode` next to the latents: [B, T, H', W', C] -> [B, T, H', W', features]."""
    return self.decoder(latents, "middle")

  def decode_levels(self, features: Array) -> Array:
    """The rest: `decode` is `decode_levels` of `decode_middle`."""
    return self.decoder(features, "levels")

  def decode_features(self, latents: Array) -> Array:
    """All of `decode` but its last linear map: [B, T, H', W', C] -> [B, T', H, W, features]."""
    return self.decoder(latents, "features")

  def decode_output(self, features: Array, frames: int | None = None) -> Array:
    """The last map: `decode` is `decode_output` of `decode_features`."""
    return self.decoder(features, "output")[:, :frames]

  def __call__(self, video: Array, noise: Array | None = None) -> tuple[Array, Array, Array]:
    """Reconstruction, mean and log-variance; `noise` (shaped like the mean) samples the latent."""
    mean, logvar = self.encode(video)
    latents = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    return self.decode(latents, video.shape[1]), mean, logvar
