"""Windows of 16 frames: which frames are taken, how they are resized, cropped and flipped.

Exactly what the released loaders do, but for the random numbers: a window is a function of the
seed, the clip and its number.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipelines.datasets.layouts import Layout, SourceClip
from mgen_jax.errors import UserError

FRAMES, INTERVAL = 16, 3


def indices(
  total: int,
  rng: np.random.Generator,
  *,
  spread: bool,
  frames: int = FRAMES,
  interval: int = INTERVAL,
) -> np.ndarray:
  """Which of `total` frames are taken: int [frames].

  The window of frames * interval starts anywhere up to one frame before the last place, as the
  loaders have it. With `spread` its frames are those of a truncated linspace from its first to its
  last (for 16 of 48: gaps of 3, and two of 4), otherwise every `interval`-th.

  Raises:
    ValueError: fewer frames than a window needs.
  """
  size = frames * interval
  if total < size:
    raise ValueError(f"{total} frames are fewer than a window of {size}")
  start = int(rng.integers(0, max(0, total - size - 1) + 1))
  if spread:
    return np.linspace(start, start + size - 1, frames).astype(np.int64)
  return np.arange(start, start + size, interval)


def generator(seed: int, clip: str, number: int) -> np.random.Generator:
  """The random numbers of one window."""
  digest = hashlib.blake2b(f"{seed}|{clip}|{number}".encode(), digest_size=8).digest()
  return np.random.default_rng(int.from_bytes(digest))


def count_frames(clip: SourceClip) -> int:
  """Frames of a clip; those of a video are counted by reading its packets."""
  if isinstance(clip.frames, tuple):
    return len(clip.frames)
  return sum(1 for _ in _decoded(clip.frames))


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
  try:
    with av.open(str(path)) as container:
      yield from container.decode(video=0)
  except (av.FFmpegError, IndexError) as error:
    raise UserError(f"{path} cannot be read ({error}): replace or remove it.") from error


def read(clip: SourceClip, wanted: np.ndarray) -> np.ndarray:
  """Some frames of a clip by number, rising: uint8 [n, H, W, 3]."""
  if isinstance(clip.frames, tuple):
    return _stacked([clip.frames[i] for i in wanted])
  found, last = {}, int(wanted[-1])
  chosen = set(wanted.tolist())
  for number, frame in enumerate(_decoded(clip.frames)):
    if number in chosen:
      found[number] = frame.to_ndarray(format="rgb24")
    if number == last:
      break
  return np.stack([found[int(number)] for number in wanted])


def _stacked(paths: list[Path]) -> np.ndarray:
  """Picture files of one size: uint8 [n, H, W, 3]."""
  frames = []
  for path in paths:
    try:
      frames.append(np.asarray(Image.open(path).convert("RGB")))
    except (OSError, Image.DecompressionBombError) as error:
      raise UserError(f"{path} cannot be read ({error}): replace or remove it.") from error
    if frames[-1].shape != frames[0].shape:
      (height, width), (first, second) = frames[-1].shape[:2], frames[0].shape[:2]
      raise UserError(
        f"{path} is {height} x {width}, and {paths[0].name} of the same clip {first} x {second}: "
        "give all frames of a clip one size."
      )
  return np.stack(frames)


def resize(video: np.ndarray, size: int, method: str) -> np.ndarray:
  """uint8 [T, H, W, 3] -> uint8 [T, size, size, 3]; see `Layout.resize`.

  Raises:
    UserError: method "none" and another size.
  """
  height, width = video.shape[1:3]
  if method == "none":
    if (height, width) != (size, size):
      raise UserError(
        f"its frames are {height} x {width} and not {size} x {size}: resize them, or give their "
        "size as --size."
      )
    return video
  short = min(height, width)
  if method == "square":
    video = _centre(video, short)
    return _bilinear(video, size, size, short / size)
  scale = size / short
  return _centre(_bilinear(video, int(height * scale), int(width * scale), 1 / scale), size)


def _centre(video: np.ndarray, side: int) -> np.ndarray:
  top, left = (round((n - side) / 2.0) for n in video.shape[1:3])
  return video[:, top : top + side, left : left + side]


def _bilinear(video: np.ndarray, height: int, width: int, step: float) -> np.ndarray:
  """Bilinear without antialiasing, sample points at the centres of pixels `step` apart."""

  def places(old, new):
    at = np.maximum((np.arange(new) + 0.5) * step - 0.5, 0.0)
    low = np.minimum(at.astype(int), old - 1)
    return low, np.minimum(low + 1, old - 1), (at - low).astype(np.float32)

  if video.shape[1:3] == (height, width):
    return video
  low, high, share = places(video.shape[1], height)
  rows = video[:, low] * (1 - share)[:, None, None] + video[:, high] * share[:, None, None]
  low, high, share = places(video.shape[2], width)
  made = rows[:, :, low] * (1 - share)[:, None] + rows[:, :, high] * share[:, None]
  return np.clip(np.round(made), 0, 255).astype(np.uint8)


def windows(
  clip: SourceClip, layout: Layout, *, count: int, size: int, seed: int, interval: int = INTERVAL
) -> Iterator[np.ndarray]:
  """`count` random windows of a clip: uint8 [16, size, size, 3]; none if it is too short."""
  total = count_frames(clip)
  if total < FRAMES * interval + layout.spare:
    return
  for number in range(count):
    rng = generator(seed, clip.id, number)
    chosen = indices(total, rng, spread=layout.spread, interval=interval)
    video = read(clip, chosen)
    try:
      video = resize(video, size, layout.resize)
    except UserError as error:
      raise UserError(f"clip {clip.id}: {error}") from error
    if layout.flip and rng.random() < 0.5:
      video = video[:, :, ::-1]
    yield np.ascontiguousarray(video)
