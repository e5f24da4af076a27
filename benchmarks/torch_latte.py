"""Latte (variant 1) once more, in PyTorch: the reference of the parity tests and of a benchmark.

Written from the published architecture, with the parameter names of the released code, plain
attention (its mode "math") and its handling of images in joint training. Like the released code it
repeats the condition for every frame and every place before the modulation.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mgen_jax.models import latte


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    batch, tokens, width = x.shape
    qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * (width // self.heads) ** -0.5
    out = scores.softmax(-1) @ v
    return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x, shift, scale):
  return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.attn = Attention(width, heads)
    self.mlp = Mlp(width)
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

  def forward(self, x, c):
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
    x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1))
    return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class TimestepEmbedder(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

  def forward(self, t):
    frequencies = torch.exp(-np.log(10_000.0) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies
    return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbedder(nn.Module):
  def __init__(self, classes, width):
    super().__init__()
    self.embedding_table = nn.Embedding(classes + 1, width)


class FinalLayer(nn.Module):
  def __init__(self, width, values):
    super().__init__()
    self.linear = nn.Linear(width, values)
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

  def forward(self, x, c):
    shift, scale = self.adaLN_modulation(c).chunk(2, 1)
    return self.linear(modulated(x, shift, scale))


class PatchEmbed(nn.Module):
  def __init__(self, channels, width, patch):
    super().__init__()
    self.proj = nn.Conv2d(channels, width, patch, patch)

  def forward(self, x):
    return self.proj(x).flatten(2).transpose(1, 2)


class Latte(nn.Module):
  """`forward(x [B, F + I, C, H, W], t [B], labels [B] or [B, 1 + I], images=I)`."""

  def __init__(self, config: latte.LatteConfig, side: int, frames: int):
    super().__init__()
    self.config, self.frames = config, frames
    width, rows = config.width, side // config.patch
    self.x_embedder = PatchEmbed(config.in_channels, width, config.patch)
    self.t_embedder = TimestepEmbedder(width)
    if config.classes:
      self.y_embedder = LabelEmbedder(config.classes, width)
    self.pos_embed = nn.Parameter(torch.zeros(1, rows * rows, width), requires_grad=False)
    self.temp_embed = nn.Parameter(torch.zeros(1, frames, width), requires_grad=False)
    self.blocks = nn.ModuleList([Block(width, config.heads) for _ in range(config.layers)])
    self.final_layer = FinalLayer(width, config.patch**2 * config.out_channels)
    self._set_positions(rows)

  def _set_positions(self, rows):
    """Sines and cosines: the column in the first half of the channels, the row in the second."""

    def table(features, positions):
      rates = 1.0 / 10_000 ** (np.arange(features // 2) / (features / 2))
      angles = positions.reshape(-1, 1) * rates
      return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    width = self.config.width
    row, column = np.mgrid[:rows, :rows].astype(np.float64)
    places = np.concatenate([table(width // 2, column), table(width // 2, row)], 1)
    self.pos_embed.data.copy_(torch.tensor(places)[None])
    times = table(width, np.arange(self.frames, dtype=np.float64))
    self.temp_embed.data.copy_(torch.tensor(times)[None])

  def forward(self, x, t, labels=None, images=0):
    cfg = self.config
    batch, pictures, channels, height, _ = x.shape
    rows, frames = height // cfg.patch, pictures - images
    x = self.x_embedder(x.reshape(batch * pictures, channels, height, height)) + self.pos_embed
    places = x.shape[1]
    clip = self.t_embedder(t)  # [B, D]
    of_picture = clip[:, None].repeat(1, pictures, 1)
    if cfg.classes:
      named = self.y_embedder.embedding_table(labels.reshape(batch, -1))  # [B, 1 or 1 + I, D]
      of_frames = named[:, :1].repeat(1, frames, 1)
      of_images = named[:, 1:] if named.shape[1] > 1 else named.repeat(1, images, 1)
      of_picture = of_picture + torch.cat([of_frames, of_images], 1)
      clip = clip + named[:, 0]
    of_picture = of_picture.flatten(0, 1)  # [B * (F + I), D]
    of_place = clip.repeat_interleave(places, 0)  # [B * N, D]
    for index in range(0, len(self.blocks), 2):
      x = self.blocks[index](x, of_picture)
      x = x.view(batch, pictures, places, -1).transpose(1, 2).flatten(0, 1)  # [B * N, F + I, D]
      video, still = x[:, :frames], x[:, frames:]
      if index == 0:
        video = video + self.temp_embed
      video = self.blocks[index + 1](video, of_place)
      x = torch.cat([video, still], 1).view(batch, places, pictures, -1)
      x = x.transpose(1, 2).flatten(0, 1)
    x = self.final_layer(x, of_picture)
    x = x.view(batch, pictures, rows, rows, cfg.patch, cfg.patch, cfg.out_channels)
    x = x.permute(0, 1, 6, 2, 4, 3, 5)  # [B, F + I, C, rows, p, rows, p]
    return x.reshape(batch, pictures, cfg.out_channels, height, height)

  def guided(self, x, t, labels, scale):
    """Classifier-free guidance: the first half of the batch is conditional, the noise channels are
    guided, the variance is not."""
    half = x[: len(x) // 2]
    out = self(torch.cat([half, half]), t, labels)
    noise, rest = out.split(self.config.in_channels, 2)
    conditional, unconditional = noise.chunk(2)
    noise = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([noise, noise]), rest], 2)


def redraw(module: nn.Module, seed: int, scale: float = 0.1) -> None:
  """Every parameter anew: a fresh model puts out exactly 0."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.requires_grad:
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
