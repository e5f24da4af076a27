"""The transformer of `mgen_jax.models.backbone` once more, in PyTorch: the reference of a test.

Written from the same paper, Movie Gen sections 3.1.2 and 3.1.3, with PyTorch's own layers where it
has them, for one device and fp32. Parameters are named as in Flax and copied over by `load`.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mgen_jax.models.backbone import BackboneConfig


class Norm(nn.Module):
  """RMSNorm or LayerNorm, with or without affine."""

  def __init__(self, kind, width, eps, affine):
    super().__init__()
    self.kind, self.eps = kind, eps
    self.scale = nn.Parameter(torch.ones(width)) if affine else None
    self.bias = nn.Parameter(torch.zeros(width)) if affine and kind == "layer" else None

  def forward(self, x):
    if self.kind == "layer":
      return functional.layer_norm(x, x.shape[-1:], self.scale, self.bias, self.eps)
    return functional.rms_norm(x, x.shape[-1:], self.scale, self.eps)


def linear(d_in, d_out, config):
  return nn.Linear(d_in, d_out, bias=config.use_bias)


def rotary(grid, head_dim, theta):
  """Complex numbers e^(i angle): [t*h*w, head_dim / 2]."""
  half = head_dim // 2
  third = half // 3
  places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
  parts = []
  for axis, pairs in enumerate((half - 2 * third, third, third)):
    frequencies = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    parts.append(places.reshape(-1, 3)[:, axis, None] * frequencies)
  angles = torch.cat(parts, -1)
  return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


class Attention(nn.Module):
  """Self- or cross-attention, keys and values possibly of fewer heads."""

  def __init__(self, config):
    super().__init__()
    self.config = config
    d, dh = config.width, config.head_dim
    self.query = linear(d, config.heads * dh, config)
    self.key = linear(d, config.key_heads * dh, config)
    self.value = linear(d, config.key_heads * dh, config)
    self.out = linear(d, d, config)
    if config.qk_norm:
      self.query_norm = Norm("rms", dh, config.norm_eps, True)
      self.key_norm = Norm("rms", dh, config.norm_eps, True)

  def forward(self, x, source=None, mask=None, turn=None):
    cfg = self.config

    def heads(y, count):  # [B, N, H * Dh] -> [B, H, N, Dh]
      return y.unflatten(-1, (count, cfg.head_dim)).transpose(1, 2)

    source = x if source is None else source
    q = heads(self.query(x), cfg.heads)
    k = heads(self.key(source), cfg.key_heads)
    v = heads(self.value(source), cfg.key_heads)
    if cfg.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    if turn is not None:
      q, k = (
        torch.cat(((pairs := torch.complex(*y.chunk(2, -1)) * turn).real, pairs.imag), -1)
        for y in (q, k)
      )
    mask = None if mask is None else mask[:, None, None]
    y = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
  """SwiGLU, or two layers around SiLU or the tanh form of GELU."""

  def __init__(self, config):
    super().__init__()
    self.kind = config.activation
    if self.kind == "swiglu":
      self.gate = linear(config.width, config.mlp_width, config)
    self.up = linear(config.width, config.mlp_width, config)
    self.down = linear(config.mlp_width, config.width, config)

  def forward(self, x):
    if self.kind == "swiglu":
      return self.down(functional.silu(self.gate(x)) * self.up(x))
    if self.kind == "silu":
      return self.down(functional.silu(self.up(x)))
    return self.down(functional.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
  """A layer, in the order of the paper's figure 8."""

  def __init__(self, config):
    super().__init__()
    norm = lambda: Norm(config.norm, config.width, config.norm_eps, config.norm_affine)  # noqa: E731
    self.modulation = nn.Parameter(torch.zeros(6, config.width))
    self.self_norm, self.mlp_norm = norm(), norm()
    self.cross_norm = norm() if config.cross_norm else nn.Identity()
    self.self_attention, self.cross_attention = Attention(config), Attention(config)
    self.mlp = MLP(config)

  def forward(self, x, positions, turn, shared, text, mask):
    shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self.modulation).chunk(6, 1)
    if positions is not None:
      x = x + positions
    x = x + gate1 * self.self_attention(self.self_norm(x) * (1 + scale1) + shift1, turn=turn)
    x = x + self.cross_attention(self.cross_norm(x), text, mask)
    return x + gate2 * self.mlp(self.mlp_norm(x) * (1 + scale2) + shift2)


class TimeEmbedding(nn.Module):
  """Sines and cosines of 1000 t, then two layers around SiLU."""

  def __init__(self, config):
    super().__init__()
    setattr(self, "in", linear(256, config.width, config))
    self.out = linear(config.width, config.width, config)

  def forward(self, time):
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(128) / 128)
    angles = 1000.0 * time[:, None] * frequencies
    x = torch.cat((angles.cos(), angles.sin()), -1)
    return self.out(functional.silu(getattr(self, "in")(x)))


class Backbone(nn.Module):
  """Latents [B, T, H, W, C], time [B], texts and masks -> velocity [B, T, H, W, C]."""

  def __init__(self, config: BackboneConfig):
    super().__init__()
    self.config = config
    d, values = config.width, math.prod(config.patch)
    self.patch_in = linear(values * config.in_channels, d, config)
    if config.positions == "learned":
      for name, limit in zip(("frames", "height", "width"), config.max_positions, strict=True):
        setattr(self, f"position_{name}", nn.Parameter(torch.zeros(limit, d)))
    for index, width in enumerate(config.context_widths):
      setattr(self, f"context_{index}", linear(width, d, config))
      setattr(self, f"context_norm_{index}", Norm("layer", d, 1e-5, True))
    self.time = TimeEmbedding(config)
    self.modulation = linear(d, 6 * d, config)
    self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
    self.head_modulation = nn.Parameter(torch.zeros(2, d))
    self.head_norm = Norm(config.norm, d, config.norm_eps, config.norm_affine)
    self.head = linear(d, values * config.out_channels, config)

  def forward(self, latents, time, texts, masks):
    cfg = self.config
    (pt, ph, pw), (batch, t, h, w, c) = cfg.patch, latents.shape
    grid = (t // pt, h // ph, w // pw)
    # The patch embedding is a 3D convolution whose stride is its kernel.
    kernel = self.patch_in.weight.reshape(cfg.width, pt, ph, pw, c).permute(0, 4, 1, 2, 3)
    x = functional.conv3d(
      latents.permute(0, 4, 1, 2, 3), kernel, self.patch_in.bias, stride=cfg.patch
    )
    x = x.flatten(2).transpose(1, 2)  # [B, N, D]
    positions = turn = None
    if cfg.positions == "learned":
      tables = (self.position_frames, self.position_height, self.position_width)
      at = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, 3)
      positions = sum(table[at[:, axis]] for axis, table in enumerate(tables))
    else:
      turn = rotary(grid, cfg.head_dim, cfg.rotary_theta)
    text = torch.cat(
      [
        getattr(self, f"context_norm_{i}")(getattr(self, f"context_{i}")(y))
        for i, y in enumerate(texts)
      ],
      1,
    )
    mask = torch.cat(masks, 1)
    embedded = self.time(time)
    shared = self.modulation(functional.silu(embedded)).unflatten(-1, (6, cfg.width))
    for layer in self.layers:
      x = layer(x, positions, turn, shared, text, mask)
    shift, scale = (embedded[:, None] + self.head_modulation).chunk(2, 1)
    x = self.head(self.head_norm(x) * (1 + scale) + shift)
    x = x.reshape(batch, *grid, pt, ph, pw, cfg.out_channels)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, t, h, w, cfg.out_channels)


def to_torch(params: dict, layers: int) -> dict[str, np.ndarray]:
  """A tree of Flax parameters (or gradients) by PyTorch's names: kernels transposed, the stack of
  layers taken apart."""
  found = {}

  def visit(tree, prefix):
    for name, leaf in tree.items():
      if isinstance(leaf, dict):
        visit(leaf, (*prefix, name))
      elif name == "kernel":
        found[".".join((*prefix, "weight"))] = np.asarray(leaf).T
      else:
        found[".".join((*prefix, name))] = np.asarray(leaf)

  visit({name: leaf for name, leaf in params.items() if name != "layers"}, ())
  for index in range(layers):

    def pick(tree, index=index):
      return {k: pick(v) if isinstance(v, dict) else v[index] for k, v in tree.items()}

    visit(pick(params["layers"]), ("layers", str(index)))
  return found


def load(model: Backbone, params: dict) -> None:
  """Copies Flax parameters into the model; every parameter of either must have its twin."""
  arrays = to_torch(params, model.config.layers)
  model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=True)
