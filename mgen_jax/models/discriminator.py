"""The patch discriminator that an autoencoder is trained against: one logit for each patch.

A stack of strided 4x4 convolutions (Isola et al., 2017), on every frame ("2d") or over space and
time ("3d"). Norms are of each example, so that no statistics cross the batch. Not here: its losses.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax

from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import layers

Array = jax.Array

_SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """The discriminator, its losses and when they set in. The papers name it without any of these."""

  weight: float = 0.0  # of the adversarial loss; 0: there is no discriminator
  kind: str = "2d"  # "3d" sees motion; its convolutions also stride over time
  channels: int = 64
  layers: int = 3  # strided ones
  groups: int = 32
  start_step: int = 0  # neither side has an adversarial loss before
  # Scale the adversarial gradient to that of the reconstruction at the last layer of the decoder
  # (Esser et al., 2021), times `weight`.
  adaptive: bool = True
  r1_weight: float = 0.0  # of the squared gradient at real videos (Mescheder et al., 2018)
  conv_method: Literal["direct", "matmul"] = "direct"

  def __post_init__(self):
    check_ranges(
      self, positive=("channels", "groups"), natural=("weight", "start_step", "r1_weight")
    )
    if self.kind not in ("2d", "3d"):
      raise ConfigError(f"unknown kind {self.kind!r}: use '2d' or '3d'")
    if self.layers < 1 or self.channels % min(self.groups, self.channels):
      raise ConfigError(
        f"layers {self.layers} must be 1 or more, and channels {self.channels} divide into groups "
        f"{self.groups}"
      )


class Discriminator(nn.Module):
  """[B, T, H, W, 3] in [-1, 1] -> logits [B, T', H', W'], high for real; any T, H and W >= 16."""

  config: DiscriminatorConfig
  dtype: str = "float32"

  @nn.compact
  def __call__(self, video: Array) -> Array:
    cfg = self.config

    def conv(x, features, stride, name):
      common = {"dtype": self.dtype, "method": cfg.conv_method, "name": name, "padding": (1, 1)}
      if cfg.kind == "2d":
        return layers.SpatialConv(features, 4, stride, **common)(x)
      return layers.VolumeConv(features, (3, 4, 4), (stride,) * 3, **common)(x)

    x = nn.leaky_relu(conv(video, cfg.channels, 2, "conv0"), _SLOPE)
    for number in range(1, cfg.layers + 1):
      features = cfg.channels * min(2**number, 8)
      x = conv(x, features, 2 if number < cfg.layers else 1, f"conv{number}")
      x = layers.GroupNorm(min(cfg.groups, features), dtype=self.dtype, name=f"norm{number}")(x)
      x = nn.leaky_relu(x, _SLOPE)
    return conv(x, 1, 1, "conv_out")[..., 0].astype("float32")
