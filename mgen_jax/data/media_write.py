"""Writing media: videos, images and contact sheets, whole or not at all.

Import these names from `media.py`, which is the one door to media files; this file exists to keep
that one readable.
"""

import itertools
import math
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from mgen_jax.data.files import publish, temporary_beside
from mgen_jax.errors import UserError

# Chosen over FFmpeg's faster paths, which make every picture 1 to 2 levels darker and depend on the
# CPU; about 1 ms more for a 480p frame.
EXACT = (
  Interpolation.ACCURATE_RND
  | Interpolation.BITEXACT
  | Interpolation.FULL_CHR_H_INT
  | Interpolation.FULL_CHR_H_INP
)

# suffix -> (muxer, sound encoder)
_CONTAINERS = {
  ".mp4": ("mp4", "aac"),
  ".m4v": ("mp4", "aac"),
  ".mov": ("mov", "aac"),
  ".mkv": ("matroska", "aac"),
  ".webm": ("webm", "libopus"),
  ".avi": ("avi", "libmp3lame"),
}
# Not libx265: it aborts the whole process on frames of 32 pixels.
_CODECS = ("libx264", "mpeg4", "libvpx-vp9")
_BT709 = 1  # AVCOL_PRI_BT709 and AVCOL_TRC_BT709

_local = threading.local()


class MediaError(UserError):
  """A media file that cannot be read or written."""


def reformatter() -> VideoReformatter:
  """This thread's scaler and colour converter; give it threads=1.

  One a thread, kept: it caches its tables, and a new one a frame costs memory and time.
  """
  if not hasattr(_local, "reformatter"):
    _local.reformatter = VideoReformatter()
  return _local.reformatter


def write_video(
  path: str | os.PathLike,
  frames: np.ndarray,
  fps: float,
  *,
  audio: np.ndarray | None = None,
  audio_rate: int = 48000,
  crf: int = 18,
  codec: str = "libx264",
  preset: str = "veryfast",
) -> None:
  """Writes uint8 [T, H, W, 3] as a video that browsers play; whole, or not at all.

  The container follows the suffix (.mp4, .mov, .mkv, .webm, .avi). The same input gives the same
  bytes. `audio` is float32 [n] or [n, channels] in [-1, 1].
  Raises MediaError for odd sizes, another dtype or shape, or a codec that the container refuses.
  """
  sound = None if audio is None else (_check_audio(audio), audio_rate)
  _write(Path(path), [frames], fps, sound, codec, crf, preset)


def write_video_stream(
  path: str | os.PathLike,
  chunks: Iterable[np.ndarray],
  fps: float,
  *,
  audio: np.ndarray | None = None,
  audio_rate: int = 48000,
  crf: int = 18,
  codec: str = "libx264",
  preset: str = "veryfast",
) -> int:
  """`write_video` of chunks uint8 [n, H, W, 3] as they come; returns how many frames there were."""
  sound = None if audio is None else (_check_audio(audio), audio_rate)
  return _write(Path(path), chunks, fps, sound, codec, crf, preset)


def _write(path, chunks, fps, sound, codec, crf, preset) -> int:
  if path.suffix.lower() not in _CONTAINERS:
    raise MediaError(f"{path}: cannot write '{path.suffix}'; use one of {', '.join(_CONTAINERS)}.")
  if codec not in _CODECS:
    raise MediaError(f"{path}: there is no encoder '{codec}'; use one of {', '.join(_CODECS)}.")
  chunks = iter(chunks)
  first = next(chunks, None)
  if first is None:
    raise MediaError(f"{path}: a video of 0 frames cannot be written; give at least one.")
  _check_frames(first, fps, str(path))
  frames = itertools.chain(first, itertools.chain.from_iterable(chunks))
  temporary = temporary_beside(path)
  try:
    suffix, size = path.suffix.lower(), first.shape[1:3]
    count = _encode(temporary, suffix, size, frames, fps, sound, codec, crf, preset)
    publish(temporary, path)
  except (av.FFmpegError, OSError) as error:
    raise MediaError(f"{path} could not be written ({error.strerror or error}).") from error
  finally:
    temporary.unlink(missing_ok=True)
  return count


def encode_video(frames: np.ndarray, fps: float, *, container: str = ".mp4", **options) -> bytes:
  """The bytes of the file that write_video would write, with the same options."""
  # Through a file: the muxer reads its own output again to move the index to the front.
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / f"video{container}"
    write_video(path, frames, fps, **options)
    return path.read_bytes()


def write_image(path: str | os.PathLike, rgb: np.ndarray) -> None:
  """Writes uint8 [H, W, 3] as PNG or JPEG by the suffix; whole, or not at all."""
  path = Path(path)
  kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
  if kind is None:
    raise MediaError(f"{path}: cannot write '{path.suffix}'; use .png or .jpg.")
  if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3:
    raise MediaError(f"{path}: an image is uint8 [H, W, 3], not {rgb.dtype} {rgb.shape}.")
  temporary = temporary_beside(path)
  try:
    Image.fromarray(rgb).save(temporary, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
    publish(temporary, path)
  except OSError as error:
    raise MediaError(f"{path} could not be written ({error.strerror or error}).") from error
  finally:
    temporary.unlink(missing_ok=True)


def contact_sheet(
  frames: Sequence[np.ndarray] | np.ndarray,
  columns: int = 8,
  labels: Sequence[str] | None = None,
  *,
  scale: int = 1,
) -> np.ndarray:
  """Lays images out on one sheet, row by row, each with its label below it.

  Args:
    frames: N images, uint8 [H, W, 3]; sizes may differ.
    labels: N texts, wrapped to the width of a cell.
    scale: whole factor to enlarge the images by.

  Returns:
    uint8 [H', W', 3].
  """
  images = [np.asarray(f).repeat(scale, axis=0).repeat(scale, axis=1) for f in frames]
  if not images:
    raise MediaError("A contact sheet needs at least one image.")
  columns = min(columns, len(images))
  gap, line, letter = 4, 12, 6
  cell_h = max(image.shape[0] for image in images)
  cell_w = max(image.shape[1] for image in images)
  texts = [_wrap(label, max(1, cell_w // letter)) for label in labels or [""] * len(images)]
  strip = line * max(len(text) for text in texts) if labels else 0
  rows = math.ceil(len(images) / columns)
  sheet = np.full(
    (gap + rows * (cell_h + strip + gap), gap + columns * (cell_w + gap), 3), 250, np.uint8
  )
  corners = [
    (gap + (i // columns) * (cell_h + strip + gap), gap + (i % columns) * (cell_w + gap))
    for i in range(len(images))
  ]
  for image, (top, left) in zip(images, corners, strict=True):
    sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
  if not labels:
    return sheet
  canvas = Image.fromarray(sheet)
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
  for text, (top, left) in zip(texts, corners, strict=True):
    for number, words in enumerate(text):
      draw.text((left, top + cell_h + number * line), words, fill=(20, 20, 20), font=font)
  return np.asarray(canvas)


def _check_frames(frames, fps, name):
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
    raise MediaError(f"{name}: frames are uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}.")
  height, width = frames.shape[1:3]
  if height % 2 or width % 2:
    raise MediaError(
      f"{name}: {height}x{width} is odd, and video stores colour for pairs of pixels; use"
      f" {height + height % 2}x{width + width % 2}."
    )
  if not (math.isfinite(fps) and fps > 0):
    raise MediaError(f"{name}: {fps} frames per second cannot be; use a rate above zero.")


def _check_audio(audio) -> np.ndarray:
  """float32 [n, channels]."""
  samples = np.asarray(audio, np.float32)
  samples = samples[:, None] if samples.ndim == 1 else samples
  if samples.ndim != 2 or samples.shape[1] not in (1, 2) or not len(samples):
    raise MediaError(f"Sound is [n], [n, 1] or [n, 2] with n > 0, not {np.shape(audio)}.")
  return samples


def _encode(path, suffix, size, frames, fps, sound, codec, crf, preset) -> int:
  muxer, sound_codec = _CONTAINERS[suffix]
  options = {"fflags": "+bitexact"}  # no version strings, no dates
  if muxer in ("mp4", "mov"):
    options["movflags"] = "+faststart"
  rate = Fraction(fps).limit_denominator(1001)
  with av.open(os.fspath(path), "w", format=muxer, options=options) as container:
    try:
      video = container.add_stream(codec, rate=rate)
    except ValueError as error:  # PyAV's own word for a pair that cannot be
      raise MediaError(f"{suffix} files cannot hold {codec} ({error}); use .mp4.") from error
    video.height, video.width, video.pix_fmt = *size, "yuv420p"
    context = video.codec_context
    context.thread_count = 1  # x264's output depends on the number of threads
    context.gop_size = max(1, round(2 * fps))
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries = context.color_trc = _BT709
    video.options = _encoder_options(codec, crf, preset)
    track = None if sound is None else _SoundTrack(container, sound_codec, *sound)
    for index, rgb in enumerate(frames):
      frame = reformatter().reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.AREA | EXACT,
        threads=1,
      )
      frame.pts, frame.time_base = index, 1 / rate
      container.mux(video.encode(frame))
      if track:
        track.write_until((index + 1) / fps)
    container.mux(video.encode(None))
    if track:
      track.finish()
  return index + 1


def _encoder_options(codec, crf, preset) -> dict[str, str]:
  if codec == "libx264":
    # With its macroblock tree x264 gives other bytes from run to run.
    return {"crf": str(crf), "preset": preset, "mbtree": "0"}
  if codec == "libvpx-vp9":
    return {"crf": str(crf), "b": "0", "deadline": "good", "cpu-used": "4"}
  return {"qmin": "2", "qmax": "4"}


class _SoundTrack:
  """The sound of a file that is being written, a block at a time beside the frames."""

  def __init__(self, container, codec, samples, rate):
    self._container, self._samples, self._rate, self._done = container, samples, rate, 0
    self._layout = "mono" if samples.shape[1] == 1 else "stereo"
    self._stream = container.add_stream(codec, rate=rate, layout=self._layout)
    self._stream.codec_context.thread_count = 1
    self._resampler = av.AudioResampler(
      format=self._stream.codec_context.format, layout=self._layout, rate=rate
    )

  def write_until(self, seconds):
    end = min(len(self._samples), math.ceil(seconds * self._rate))
    if end <= self._done:
      return
    block = np.ascontiguousarray(self._samples[self._done : end].T)
    frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
    frame.rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
    self._done = end
    for part in self._resampler.resample(frame):
      self._container.mux(self._stream.encode(part))

  def finish(self):
    self.write_until(len(self._samples) / self._rate + 1)
    for part in self._resampler.resample(None):
      self._container.mux(self._stream.encode(part))
    self._container.mux(self._stream.encode(None))


def _wrap(text: str, width: int) -> list[str]:
  lines = [""]
  for word in text.split():
    if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
      lines.append("")
    lines[-1] += (" " if lines[-1] else "") + word
  return lines
