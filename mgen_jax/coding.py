"""Long videos through an autoencoder, piece by piece: constant memory, several devices.

A `Coder` turns a stream of frames into a stream of latents and back. In mode "blend" (the paper's)
pieces are coded alone. In mode "exact" the result equals coding the whole video at once: each piece
gets the neighbours that it depends on. Where the model attends to all time, its middle part, small
and next to the latents, is then run on the whole video, so memory grows by its features (2 KB a
latent position for 512 of them) and only the expensive part by the pixels runs in pieces.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import UserError
from mgen_jax.models import tiling
from mgen_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from mgen_jax.models.tiling import TilingConfig
from mgen_jax.parallel import cpu, rules
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.autoencoder import MODEL

Chunks = Iterable[np.ndarray]

_NO_FRAMES = "a video of 0 frames cannot be coded: give at least 1."


class Coder:
  """An autoencoder on the devices of a mesh, for videos of any length.

  Args:
    model: its config.
    params: its parameters, on the mesh.
    tiling: how videos are cut.
    mesh: of this process.

  Raises:
    ConfigError: pieces that the model's strides do not divide.
  """

  def __init__(
    self, model: AutoencoderConfig, params: Any, tiling: TilingConfig, mesh: jax.sharding.Mesh
  ):
    tiling.check(model)
    self.model, self.tiling = model, tiling
    self._params = {"params": {name: params[name] for name in MODEL}}
    self._mesh = mesh
    self._module = Autoencoder(model)
    self._programs: dict[str, Callable] = {}

  def encode(self, frames: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames -> mean and log-variance of the latents, in order.

    Args:
      frames: chunks [n, H, W, 3] of any lengths, uint8 or float in [-1, 1].

    Yields:
      Two arrays [t, H', W', C] fp32; all of them together have ceil(T / stride) latents.

    Raises:
      UserError: no frame, sizes that the strides do not divide or that change, other channels than
        three, values that are not finite.
    """
    checked = map(self._check_frames, frames)
    if self.tiling.mode == "blend":
      yield from self._run("encode", self._cut(checked), out=2)
      return
    if tiling.attends_to_all_time(self.model):
      features = [f for (f,) in self._run("encode_levels", self._near(checked, "levels"), out=1)]
      yield self._whole("encode_middle", np.concatenate(features))
      return
    yield from self._run("encode", self._near(checked, None), out=2)

  def decode(self, latents: Chunks, frames: int | None = None) -> Iterator[np.ndarray]:
    """Latents -> frames, in order.

    Args:
      latents: chunks [t, H', W', C] of any lengths.
      frames: of the video; the surplus of the last latent is dropped. None keeps it.

    Yields:
      Chunks [n, H, W, 3] fp32 in about [-1, 1].

    Raises:
      UserError: too few latents for `frames`, other channels than the model's, values that are not
        finite.
    """
    latents = map(self._check_latents, latents)
    made = (
      self._decode_blend(latents) if self.tiling.mode == "blend" else self._decode_near(latents)
    )
    if frames is None:
      yield from made
      return
    left = frames
    for chunk in made:
      if left > 0:
        yield chunk[:left]
      left -= len(chunk)
    if left > 0:
      raise UserError(f"the latents hold {frames - left} frames, but {frames} were asked for.")

  # ------------------------------------------------------------------------------------------------
  # Which pieces. A piece is (input, first of its outputs to keep, how many).

  def _cut(self, frames: Chunks) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pieces without overlap."""
    buffer, size, stride = _Buffer(frames), self.tiling.frames, self.model.time_stride
    start = 0
    while buffer.reaches(start + 1):
      piece = buffer.window(start, start + size)
      yield piece, 0, -(-len(piece) // stride)
      start += size
      buffer.drop(start)
    if not start:
      raise UserError(_NO_FRAMES)

  def _near(self, frames: Chunks, part: str | None) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pieces with the frames that their latents depend on, which begin on a multiple of the
    stride."""
    stride, count = self.model.time_stride, self.tiling.frames // self.model.time_stride
    reach = functools.partial(tiling.encoder_input, self.model, part=part)
    buffer, first = _Buffer(frames), 0
    while buffer.reaches(first * stride + 1):
      low, piece = buffer.around(*reach(first, first + count - 1), step=stride)
      total = -(-(low + len(piece)) // stride)  # latents up to the end of the piece
      yield piece, first - low // stride, min(count, total - first)
      first += count
    if not first:
      raise UserError(_NO_FRAMES)

  def _decode_blend(self, latents: Chunks) -> Iterator[np.ndarray]:
    """Pieces that overlap, cross-faded."""
    stride = self.model.time_stride
    size, shared = self.tiling.frames // stride, self.tiling.overlap // stride

    def pieces():
      buffer, start = _Buffer(latents), 0
      while True:
        piece = buffer.window(start, start + size)
        yield piece, 0, len(piece) * stride
        if not buffer.reaches(start + size + 1):
          return
        start += size - shared
        buffer.drop(start)

    tail = None
    later = tiling.fade(self.tiling.overlap)[:, None, None, None]
    for (video,) in self._run("decode", pieces(), out=1):
      if tail is not None:
        mixed = tail * (1 - later) + video[: len(tail)] * later
        video = np.concatenate([mixed, video[len(tail) :]])
      end = len(video) - self.tiling.overlap  # every piece but the first has more than it shares
      yield video[: max(end, 0)]
      tail = video[max(end, 0) :]
    yield tail

  def _decode_near(self, latents: Chunks) -> Iterator[np.ndarray]:
    """Pieces with the latents (or features of the middle) that their frames depend on."""
    part, method = None, "decode"
    if tiling.attends_to_all_time(self.model):
      chunks = list(latents)
      if not chunks:
        raise UserError(_NO_FRAMES)
      whole = np.concatenate(chunks)
      latents, part, method = [self._whole("decode_middle", whole)[0]], "levels", "decode_levels"
    stride, count = self.model.time_stride, self.tiling.frames // self.model.time_stride
    reach = functools.partial(tiling.decoder_input, self.model, part=part)

    def pieces():
      buffer, first = _Buffer(latents), 0
      while buffer.reaches(first + 1):
        low, piece = buffer.around(*reach(first * stride, (first + count) * stride - 1))
        keep = min(count, low + len(piece) - first)
        yield piece, (first - low) * stride, keep * stride
        first += count
      if not first:
        raise UserError(_NO_FRAMES)

    for (video,) in self._run(method, pieces(), out=1):
      yield video

  # ------------------------------------------------------------------------------------------------
  # Running them.

  def _run(
    self, method: str, pieces: Iterator[tuple[np.ndarray, int, int]], out: int
  ) -> Iterator[tuple[np.ndarray, ...]]:
    """`method` of each piece, in batches of pieces of one shape."""
    waiting: list[tuple[np.ndarray, int, int]] = []

    def flush() -> Iterator[tuple[np.ndarray, ...]]:
      if not waiting:
        return
      made = self._in_space(method, np.stack([piece for piece, _, _ in waiting]), out)
      for row, (_, first, keep) in enumerate(waiting):
        yield tuple(x[row, first : first + keep] for x in made)
      waiting.clear()

    for piece in pieces:
      if waiting and waiting[0][0].shape != piece[0].shape:
        yield from flush()
      waiting.append(piece)
      if len(waiting) == self.tiling.batch:
        yield from flush()
    yield from flush()

  def _in_space(self, method: str, batch: np.ndarray, out: int) -> tuple[np.ndarray, ...]:
    """`method` of a batch of pieces, cut in space as well where the config says so."""
    strides = self.model.space_strides
    encodes = method.startswith("encode")
    # All lengths in latents; what goes in and comes out is that many pixels, or latents.
    goes_in, comes_out = (strides, (1, 1)) if encodes else ((1, 1), strides)
    lengths = [n // step for n, step in zip(batch.shape[2:4], goes_in, strict=True)]
    sides, shared = (
      [n // step for step in strides] for n in (self.tiling.side, self.tiling.side_overlap)
    )
    if not self.tiling.side or all(n <= side for n, side in zip(lengths, sides, strict=True)):
      return self._batch(method, batch)
    cuts = [
      [(start, min(n, start + side)) for start in tiling.starts(n, side, side - both)]
      for n, side, both in zip(lengths, sides, shared, strict=True)
    ]
    whole = [n * step for n, step in zip(lengths, comes_out, strict=True)]
    weights, sums = np.zeros((*whole, 1), np.float32), [np.float32(0.0)] * out
    for tile in itertools.product(*cuts):
      before, here = (
        tuple(slice(a * step, b * step) for (a, b), step in zip(tile, steps, strict=True))
        for steps in (goes_in, comes_out)
      )
      rows, columns = (
        tiling.ramp((b - a) * step, both * step if a else 0, both * step if b < n else 0)
        for (a, b), step, both, n in zip(tile, comes_out, shared, lengths, strict=True)
      )
      weight = (rows[:, None] * columns)[..., None]
      weights[here] += weight
      for number, made in enumerate(self._batch(method, batch[:, :, *before])):
        if not np.ndim(sums[number]):
          sums[number] = np.zeros((*made.shape[:2], *whole, made.shape[-1]), np.float32)
        sums[number][:, :, *here] += made * weight
    return tuple(total / weights for total in sums)

  def _whole(self, method: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(y[0] for y in self._batch(method, x[None]))

  def _batch(self, method: str, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    """One program on all devices; the batch is filled up so that they divide it."""
    rows, parts = len(batch), mesh_lib.batch_shards(self._mesh)
    batch = np.pad(batch, [(0, -rows % parts)] + [(0, 0)] * 4, mode="edge")
    with mesh_lib.use(self._mesh):
      axes = ("batch", None, None, None, None)
      made = self._program(method)(
        self._params, jax.device_put(batch, rules.sharding(self._mesh, axes))
      )
      made = jax.device_get(made)
    return tuple(x[:rows] for x in (made if isinstance(made, tuple) else (made,)))

  def _program(self, method: str) -> Callable:
    if method not in self._programs:

      def program(params, x):
        if x.dtype == np.uint8:
          x = x.astype(np.float32) / 127.5 - 1.0
        return self._module.apply(params, x, method=method)

      options = cpu.compiler_options(self._mesh, convolutions=True)
      self._programs[method] = jax.jit(program, compiler_options=options)
    return self._programs[method]

  def _check_frames(self, frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[3] != 3:
      raise UserError(f"frames of shape {frames.shape} are not [frames, height, width, 3].")
    self.model.latent_shape(max(1, len(frames)), *frames.shape[1:3])
    if frames.dtype == np.uint8:
      return frames
    if not jnp.issubdtype(frames.dtype, jnp.floating):
      raise UserError(f"frames are {frames.dtype}: give uint8, or float in [-1, 1].")
    return _finite(frames, "pixels", "give uint8, or float in [-1, 1]")

  def _check_latents(self, latents: np.ndarray) -> np.ndarray:
    channels = self.model.latent_channels
    if latents.ndim != 4 or latents.shape[3] != channels:
      raise UserError(
        f"latents of shape {latents.shape} are not [times, height, width, {channels}]: decode them "
        "with the autoencoder that made them."
      )
    return _finite(latents, "values of the latents", "encode the video anew")


def _finite(values: np.ndarray, what: str, fix: str) -> np.ndarray:
  wrong = ~np.isfinite(values)
  if wrong.any():
    raise UserError(f"{int(wrong.sum())} {what} are not finite: {fix}.")
  return values


class _Buffer:
  """The part of a stream that is still needed, by absolute position."""

  def __init__(self, chunks: Chunks):
    self._chunks = iter(chunks)
    self._start = 0
    self._held: np.ndarray | None = None
    self._ended = False

  def reaches(self, end: int) -> bool:
    """Whether the stream has `end` rows or more."""
    while not self._ended and self._end() < end:
      chunk = next(self._chunks, None)
      if chunk is None:
        self._ended = True
      elif self._held is None:
        self._held = chunk
      elif chunk.shape[1:] != self._held.shape[1:]:
        sizes = " to ".join(f"{x.shape[1]}x{x.shape[2]}" for x in (self._held, chunk))
        raise UserError(f"the video changes its size, from {sizes} (height x width): cut it there.")
      else:
        self._held = np.concatenate([self._held, chunk])
    return self._end() >= end

  def window(self, first: int, end: int) -> np.ndarray:
    """Rows [first, end), fewer where the stream ends before."""
    self.reaches(end)
    if self._held is None:
      raise UserError(_NO_FRAMES)
    return self._held[first - self._start : end - self._start]

  def around(self, low: int, high: int, step: int = 1) -> tuple[int, np.ndarray]:
    """(first row, rows) of a window that holds [low, high], as far as the stream does.

    It begins on a multiple of `step` and is shifted, not cut, at both ends of the stream: all
    windows of one width are one compiled program. What lies before it is dropped.
    """
    low = low // step * step
    width = -(-(high + 1 - low) // step) * step
    low = max(0, low)
    if self.reaches(low + width):
      end = low + width
    else:
      end = self._end()
      low = max(0, (end - width) // step * step)
    rows = self.window(low, end)
    self.drop(low)
    return low, rows

  def drop(self, before: int) -> None:
    """Rows before this one are not asked for again."""
    if self._held is not None and before > self._start:
      self._held = self._held[before - self._start :].copy()
      self._start = before

  def _end(self) -> int:
    return self._start + (0 if self._held is None else len(self._held))


def to_uint8(video: np.ndarray) -> np.ndarray:
  """About [-1, 1] -> uint8, clipped and rounded."""
  return np.clip(np.round((video + 1.0) * 127.5), 0, 255).astype(np.uint8)


def fit_size(frames: np.ndarray, strides: tuple[int, int], how: str) -> np.ndarray:
  """Frames [n, H, W, 3] whose sides the strides divide.

  Args:
    frames: any sides.
    strides: of the autoencoder, (height, width).
    how: "refuse" leaves them (and coding refuses them), "pad" repeats the last row and column,
      "crop" leaves the surplus away, half on each side.

  Raises:
    UserError: an unknown `how`, or a crop that leaves nothing.
  """
  height, width = frames.shape[1:3]
  if how == "refuse":
    return frames
  if how == "pad":
    extra = [(0, -height % strides[0]), (0, -width % strides[1])]
    return np.pad(frames, [(0, 0), *extra, (0, 0)], mode="edge")
  if how != "crop":
    raise UserError(f"unknown fit {how!r}: use 'refuse', 'pad' or 'crop'.")
  if height < strides[0] or width < strides[1]:
    raise UserError(f"frames of {height}x{width} cannot be cropped to the strides {strides}: pad.")
  top, left = height % strides[0] // 2, width % strides[1] // 2
  rows, columns = height // strides[0] * strides[0], width // strides[1] * strides[1]
  return frames[:, top : top + rows, left : left + columns]
