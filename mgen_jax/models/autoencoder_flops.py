"""How many floating-point operations the autoencoder costs, counted from its config alone."""

import functools
import math

from mgen_jax.models.autoencoder import AutoencoderConfig


def flops(config: AutoencoderConfig, video_shape: tuple[int, int, int]) -> dict[str, int]:
  """Exact matmul and convolution FLOPs of one video (frames, height, width), by part.

  Returns:
    FLOPs of "encoder" and "decoder"; additions and norms are not counted.
  """
  count = functools.partial(_conv_flops, config)
  cfg = config
  t = math.ceil(video_shape[0] / cfg.patch[0])
  h, w = (n // p for n, p in zip(video_shape[1:], cfg.patch[1:], strict=True))
  widths = [cfg.channels * m for m in cfg.multipliers]

  def res(shape, before, after):
    shortcut = count(shape, shape, before, after, kernel=1) if before != after else 0
    return count(shape, shape, before, after) + count(shape, shape, after, after) + shortcut

  def middle(shape, c):
    total = 2 * res(shape, c, c)
    if cfg.mid_attention:
      frames, area = shape[0], shape[1] * shape[2]
      projections = 2 * frames * area * 4 * c * c
      total += projections + 4 * frames * area * area * c
      if cfg.temporal and cfg.temporal_attention:
        if cfg.inflation == "3d":
          total += 4 * frames * area * (frames - 1) * area * c
        else:
          total += projections + 4 * frames * frames * area * c
    return total

  shapes = [(t, h, w)]  # at the start of each level
  pixels = 2 * t * h * w * cfg.patch_values * widths[0]
  encoder = pixels if cfg.has_patch else count(shapes[0], shapes[0], 3, widths[0])
  previous = widths[0]
  for level, features in enumerate(widths):
    for _ in range(cfg.res_blocks):
      encoder += res(shapes[level], previous, features)
      previous = features
    t, h, w = shapes[level]
    space, time = level in cfg.space_down, level in cfg.time_down
    after = (-(-t // 2) if time else t, h // 2 if space else h, w // 2 if space else w)
    shapes.append(after)
    if space or time:
      encoder += count(shapes[level], after, features, features, spatial=space)
  encoder += middle(shapes[-1], widths[-1])
  encoder += count(shapes[-1], shapes[-1], widths[-1], 2 * cfg.latent_channels)

  shape, latent = shapes[-1], cfg.latent_channels
  decoder = count(shape, shape, latent, widths[-1]) + middle(shape, widths[-1])
  if cfg.quant_conv:
    encoder += count(shape, shape, 2 * latent, 2 * latent, kernel=1)
    decoder += count(shape, shape, latent, latent, kernel=1)
  previous = widths[-1]
  for level in reversed(range(len(widths))):
    space, time = level in cfg.space_down, level in cfg.time_down
    shape = (shape[0] * (2 if time else 1), *(n * (2 if space else 1) for n in shape[1:]))
    if space or time:
      decoder += count(shape, shape, previous, previous, spatial=space)
    for _ in range(cfg.decoder_res_blocks):
      decoder += res(shape, previous, widths[level])
      previous = widths[level]
  if cfg.has_patch:
    decoder += 2 * shape[0] * shape[1] * shape[2] * previous * cfg.patch_values
  else:
    decoder += count(shape, shape, previous, 3)
  return {"encoder": encoder, "decoder": decoder}


def _conv_flops(cfg, before, after, c_in, c_out, kernel=None, spatial=True) -> int:
  """FLOPs of one 2.5D convolution between grids (t, h, w): spatial first, then temporal."""
  kernel = cfg.kernel if kernel is None else kernel
  total = 0
  taps = cfg.temporal_kernel if kernel > 1 else 1
  if cfg.temporal and cfg.inflation == "3d":
    area = kernel * kernel if spatial else 1
    return 2 * after[0] * after[1] * after[2] * taps * area * c_in * c_out
  if spatial:
    total += 2 * before[0] * after[1] * after[2] * kernel * kernel * c_in * c_out
  if cfg.temporal:
    total += 2 * after[0] * after[1] * after[2] * taps * c_out * c_out
  return total
