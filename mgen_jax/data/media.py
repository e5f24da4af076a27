"""Video, image and sound files: what they hold, their frames by time, and writing them whole.

Everything that touches FFmpeg (through PyAV) or Pillow is here. Frames are chosen by their
presentation time, never by index x frame rate, so files with a variable rate or an edit list read
right. It is not a dataset: which files there are and how they are batched is in `ingest.py` and
`pipeline.py`.

Conventions: frames are uint8 RGB [T, H, W, 3] in display orientation (rotation flags and
non-square pixels applied); times are seconds from the first frame; sound is float32 in [-1, 1].
"""

import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps, UnidentifiedImageError

from mgen_jax.data.media_write import (
  EXACT,
  MediaError,
  contact_sheet,
  encode_video,
  reformatter,
  write_image,
  write_video,
  write_video_stream,
)

__all__ = [
  "IMAGE_SUFFIXES",
  "VIDEO_SUFFIXES",
  "MediaError",
  "MediaInfo",
  "NamedBytes",
  "contact_sheet",
  "display_size",
  "encode_video",
  "frame_to_rgb",
  "header_duration",
  "open_media",
  "pixel_aspect",
  "probe",
  "read_audio",
  "read_image",
  "read_video",
  "refuse_truncated",
  "stream_video",
  "video_stream",
  "write_image",
  "write_video",
  "write_video_stream",
]

VIDEO_SUFFIXES = (
  ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif",
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# How files begin, for bytes without a name.
_MAGIC = (
  (b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"\x1aE\xdf\xa3", ".mkv"),
  (b"BM", ".bmp"),
)  # fmt: skip

# Containers that we let FFmpeg open. Playlists (hls, concat) are left out: a file of that kind can
# make the reader open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,asf,flv,gif,ogg,wav,mp3,flac"


@dataclasses.dataclass(frozen=True)
class MediaInfo:
  """What a file holds; width and height (pixels) as displayed, `duration` in seconds."""

  path: str
  kind: str  # "video" or "image"
  width: int
  height: int
  fps: float  # average; 0 for an image
  frames: int
  duration: float
  codec: str
  has_audio: bool


def suffix_of(data: bytes, name: str = "") -> str:
  """What kind of file bytes are: as the name that they had says, or as they begin; else ".mp4"."""
  said = os.path.splitext(name)[1].lower()
  if said in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
    return said
  for start, suffix in _MAGIC:
    if data.startswith(start):
      return suffix
  if data[:4] == b"RIFF":
    return ".webp" if data[8:12] == b"WEBP" else ".avi"
  return ".mp4"


class NamedBytes(bytes):
  """The bytes of a whole file that is part of another one, with the name that messages use."""

  name: str

  def __new__(cls, data: bytes, name: str) -> "NamedBytes":
    made = super().__new__(cls, data)
    made.name = name
    return made


def probe(source: str | os.PathLike | NamedBytes) -> MediaInfo:
  """Reads the header and the first frame of a file.

  Frames are counted by reading packets only where the header does not say.
  Raises MediaError if the file is missing, is no media, is truncated or has no readable frame.
  """
  path = _name(source)
  if Path(path).suffix.lower() in IMAGE_SUFFIXES:
    with _open_image(source) as image:
      width, height = image.size
      if image.getexif().get(_ORIENTATION, 1) > 4:  # lying on its side
        width, height = height, width
      codec = (image.format or "unknown").lower()
    return MediaInfo(path, "image", width, height, 0.0, 1, 0.0, codec, False)
  with open_media(source) as container:
    stream = video_stream(container, path)
    first = next(_decode(container, stream, path), None)
    if first is None:
      raise MediaError(f"{path} has no frame that can be decoded; re-encode or remove it.")
    width, height = display_size(first, pixel_aspect(stream))
    has_audio = bool(container.streams.audio)
    codec = stream.codec_context.name
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    frames, duration = stream.frames, header_duration(container, stream)
    refuse_truncated(stream, source)
    # AVI has no duration of its own: FFmpeg takes it from the file's size.
    if container.format.name == "avi" and rate and frames / rate - duration > max(0.5, 2 / rate):
      raise MediaError(
        f"{path} is truncated (its header says {frames / rate:.2f} s, it holds {duration:.2f} s);"
        " copy it again."
      )
  if frames == 0 or duration <= 0 or rate <= 0:
    frames, duration, rate = _count(source, rate, duration)
  return MediaInfo(path, "video", width, height, rate, frames, duration, codec, has_audio)


def read_video(
  source: str | os.PathLike | bytes,
  *,
  frames: int | None = None,
  start: float = 0.0,
  duration: float | None = None,
  size: tuple[int, int] | None = None,
) -> np.ndarray:
  """Decodes a window of a video.

  Args:
    source: a path, or the bytes of a whole file.
    frames: how many to return: frame j is the one on screen at start + (j + 0.5) * duration /
      frames (seconds). None returns every frame of the window.
    start, duration: the window, in seconds from the first frame; None is to the end.
    size: (height, width) to scale to: just covering it, then cropped at the centre.

  Returns:
    uint8 [T, H, W, 3].

  Raises:
    MediaError: unreadable or truncated, or the window lies outside the video.
  """
  name = _name(source)
  if frames is not None and frames < 1:
    raise MediaError(f"{name}: {frames} frames were asked for; ask for at least one.")
  with open_media(source) as container:
    stream = video_stream(container, name)
    total = header_duration(container, stream)
    if duration is None:
      # Without a length in the header, the last frame decides.
      duration = (total or _count(source, 0.0, 0.0)[1]) - start
    if duration <= 0 or start < 0:
      raise MediaError(
        f"{name}: the window from {start:g} s of {duration:g} s lies outside the video"
        f" ({total:g} s); choose one inside."
      )
    shown = _frames_from(container, stream, name, start)
    if frames is None:
      picked, order = _all(shown, start, start + duration, stream, name)
    else:
      times = start + (np.arange(frames) + 0.5) * duration / frames
      picked, order = _pick(shown, times, stream, name)
    if not picked:
      raise MediaError(f"{name} has no frame that can be decoded; re-encode or remove it.")
    distinct = [frame_to_rgb(frame, pixel_aspect(stream), size) for frame in picked]
  return np.stack([distinct[i] for i in order])


def stream_video(source: str | os.PathLike, chunk: int = 32) -> Iterator[np.ndarray]:
  """Every frame of a video in chunks uint8 [up to `chunk`, H, W, 3]: a film in constant memory.

  Raises MediaError if it is unreadable or ends before its header says.
  """
  name = _name(source)
  with open_media(source) as container:
    stream = video_stream(container, name)
    total = header_duration(container, stream)
    held, stamps = [], []
    for time, frame in _frames_from(container, stream, name, 0.0):
      held.append(frame_to_rgb(frame, pixel_aspect(stream), None))
      stamps = [*stamps[-1:], time]
      if len(held) == chunk:
        yield np.stack(held)
        held = []
    if not stamps:
      raise MediaError(f"{name} has no frame that can be decoded; re-encode or remove it.")
    _refuse_short(stamps, total, stream, name)
    if held:
      yield np.stack(held)


def read_image(source: str | os.PathLike | bytes, size: tuple[int, int] | None = None):
  """Decodes an image to uint8 [H, W, 3]; transparent parts become white.

  `size` as in read_video. Raises MediaError if the file is no image or is cut short.
  """
  with _open_image(source) as image:
    try:
      image = ImageOps.exif_transpose(image)
      if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
      raise MediaError(f"{_name(source)} is a damaged image ({error}); replace it.") from error
  if size is not None:
    scaled, box = _cover(image.height, image.width, size)
    down = scaled[0] < image.height
    method = Image.Resampling.BOX if down else Image.Resampling.BILINEAR
    image = image.resize(scaled[::-1], method)
    image = image.crop((box[1], box[0], box[1] + size[1], box[0] + size[0]))
  return np.asarray(image)


def read_audio(
  source: str | os.PathLike | bytes, rate: int, start: float = 0.0, end: float | None = None
) -> np.ndarray:
  """Decodes the first sound track to float32 [samples, channels] at `rate` Hz.

  Sample 0 is `start` seconds after the start of the file's timeline; only what lies before `end` is
  held in memory. Raises MediaError if there is no sound.
  """
  name = _name(source)
  with open_media(source) as container:
    if not container.streams.audio:
      raise MediaError(f"{name} has no sound track.")
    stream = container.streams.audio[0]
    resampler = av.AudioResampler(format="fltp", layout=stream.layout.name, rate=rate)
    first, last = round(start * rate), round(end * rate) if end is not None else sys.maxsize
    if stream.duration:  # encoders pad the last block; the header knows the true end
      length = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
      last = min(last, round(length * rate))
    parts, at = [], None  # at: the number of the next sample
    try:
      for frame in itertools.chain(container.decode(stream), [None]):
        if at is None and frame is not None:
          at = round((frame.time or 0.0) * rate)
          parts.append(
            np.zeros((stream.layout.nb_channels, max(0, min(at, last) - first)), np.float32)
          )
        for block in resampler.resample(frame):
          samples = block.to_ndarray()
          part = samples[:, max(0, first - at) : max(0, last - at)]
          if part.size:  # an empty one would hold on to the block
            parts.append(part)
          at += samples.shape[1]
        if at is not None and at >= last:
          break
    except av.FFmpegError as error:
      raise MediaError(f"{name}: its sound cannot be decoded ({error.strerror}).") from error
    if at is None:
      raise MediaError(f"{name} has an empty sound track.")
  return np.ascontiguousarray(np.concatenate(parts, axis=1).T)


@contextmanager
def open_media(source, **options: str) -> Iterator[av.container.InputContainer]:
  """A container for reading; `options` are FFmpeg's, of containers and of decoders.

  Raises MediaError if it is missing or no media; playlists that open other files are none.
  """
  name = _name(source)
  file = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
  try:
    options = {"format_whitelist": _FORMATS, **options}
    container = av.open(file, metadata_errors="replace", options=options)
  except (av.FFmpegError, OSError) as error:
    reason = error.strerror or "not a media file"
    raise MediaError(f"{name} cannot be opened ({reason}); replace or remove it.") from error
  with container:
    yield container


@contextmanager
def _open_image(source) -> Iterator[Image.Image]:
  name = _name(source)
  try:
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
  except UnidentifiedImageError as error:
    raise MediaError(f"{name} is not an image; replace or remove it.") from error
  except (OSError, Image.DecompressionBombError) as error:
    reason = getattr(error, "strerror", None) or error
    raise MediaError(f"{name} cannot be opened ({reason}).") from error
  with image:
    yield image


def _name(source) -> str:
  if isinstance(source, NamedBytes):
    return source.name
  return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def video_stream(container, name):
  """The first video stream, to be decoded by one thread. Raises MediaError without one."""
  if not container.streams.video:
    raise MediaError(f"{name} holds no video track; replace or remove it.")
  stream = container.streams.video[0]
  if stream.codec_context is None:
    raise MediaError(f"{name}: there is no decoder for its video track; re-encode or remove it.")
  # Many files at once keep the cores busier than many threads on a file.
  stream.codec_context.thread_count = 1
  return stream


def header_duration(container, stream) -> float:
  """Seconds, as the file says; 0 if it does not."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  return container.duration / av.time_base if container.duration else 0.0


def refuse_truncated(stream, source):
  """An index that points past the end of the file: it was cut while being copied."""
  path = _name(source)
  size = len(source) if isinstance(source, bytes) else os.path.getsize(path)
  end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
  if end > size:
    raise MediaError(
      f"{path} is truncated (it has {size} bytes, its index needs {end}); copy it again."
    )


def _count(source, rate, header_duration) -> tuple[int, float, float]:
  """(frames, duration, fps) from the packets alone."""
  name = _name(source)
  times = []
  with open_media(source) as container:
    stream = video_stream(container, name)
    try:
      for packet in container.demux(stream):
        if packet.size and packet.pts is not None:
          times.append(float(packet.pts * packet.time_base))
        elif packet.size:
          times.append(times[-1] + 1 / rate if times and rate else 0.0)
    except av.FFmpegError as error:
      raise MediaError(f"{name} is damaged ({error.strerror}); copy it again.") from error
  if not times:
    raise MediaError(f"{name} has no frame; replace or remove it.")
  span = max(times) - min(times)
  if rate <= 0:
    rate = (len(times) - 1) / span if span > 0 else 1.0
  duration = span + 1 / rate
  if header_duration and header_duration - duration > max(0.5, 2 / rate):
    raise MediaError(
      f"{name} is truncated (its header says {header_duration:.2f} s, it holds {duration:.2f} s);"
      " copy it again."
    )
  return len(times), duration, rate


def _decode(container, stream, name) -> Iterator[av.VideoFrame]:
  try:
    yield from container.decode(stream)
  except av.FFmpegError as error:
    raise MediaError(
      f"{name} is damaged or truncated ({error.strerror}); re-encode or remove it."
    ) from error


def _frames_from(container, stream, name, start) -> Iterator[tuple[float, av.VideoFrame]]:
  """(seconds from the first frame, frame) from the key frame before `start` on."""
  origin = None
  if stream.start_time is not None:
    origin = float(stream.start_time * stream.time_base)
    if start > 1.0:  # less is quicker to decode than to seek
      try:
        container.seek(int((start + origin) / stream.time_base), stream=stream)
      except av.FFmpegError:
        container.seek(0)  # no index: decode from the start
  step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
  time = None
  for frame in _decode(container, stream, name):
    stamp = frame.time
    if origin is None:
      origin = stamp or 0.0
    # Some AVI files have no time stamps: count on.
    time = stamp - origin if stamp is not None else (0.0 if time is None else time + step)
    yield time, frame


def _all(shown, start, end, stream, name) -> tuple[list[av.VideoFrame], range]:
  """Every frame that appears in [start, end)."""
  picked, stamps = [], []
  for time, frame in shown:
    if time >= end - 1e-6:
      return picked, range(len(picked))
    stamps.append(time)
    if time >= start - 1e-6:
      picked.append(frame)
  _refuse_short(stamps, end, stream, name)
  return picked, range(len(picked))


def _pick(shown, times, stream, name) -> tuple[list[av.VideoFrame], list[int]]:
  """The distinct frames on screen at `times` (ascending), and for each time which one."""
  picked, order, stamps = [], [], []
  current = None

  def show(count):
    if count > 0 and current is not None:
      picked.append(current)
      order.extend([len(picked) - 1] * count)

  for time, frame in shown:
    if current is None:
      current = frame  # a window that starts before the first frame shows it
    show(int(np.searchsorted(times, time - 1e-6)) - len(order))
    current = frame
    stamps.append(time)
    if len(order) == len(times):
      return picked, order
  _refuse_short(stamps, times[-1], stream, name)
  show(len(times) - len(order))
  return picked, order


def _refuse_short(stamps, wanted, stream, name):
  """Frames ended at `stamps[-1]`; refuses if `wanted` (seconds) is clearly after that."""
  step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
  if len(stamps) > 1:
    step = max(step, stamps[-1] - stamps[-2])
  if stamps and wanted - stamps[-1] > 2 * step + 0.1:
    raise MediaError(
      f"{name} is truncated: its last frame is at {stamps[-1]:.2f} s, but {wanted:.2f} s was asked"
      " for; copy it again."
    )


def pixel_aspect(stream) -> float:
  """Width of a pixel / its height; 1 if the file does not say."""
  ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
  return float(ratio) if ratio and ratio > 0 else 1.0


def display_size(frame, aspect: float) -> tuple[int, int]:
  """(width, height) of a frame of such pixels, after rotation."""
  width = round(frame.width * aspect)
  return (frame.height, width) if frame.rotation % 180 else (width, frame.height)


def _cover(height, width, size) -> tuple[tuple[int, int], tuple[int, int]]:
  """The size that just covers `size`, and the top left corner of the centre crop."""
  scale = max(size[0] / height, size[1] / width)
  scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
  return scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)


def frame_to_rgb(frame, aspect: float, size) -> np.ndarray:
  """uint8 [H, W, 3] as displayed; `size` as in read_video, None for its own."""
  width, height = display_size(frame, aspect)
  corner = (0, 0)
  if size is None:
    (height_to, width_to), size = (height, width), (height, width)
  else:
    (height_to, width_to), corner = _cover(height, width, size)
  turned = bool(frame.rotation % 180)
  method = Interpolation.AREA if height_to < height else Interpolation.BILINEAR
  rgb = reformatter().reformat(
    frame,
    width=height_to if turned else width_to,
    height=width_to if turned else height_to,
    format="rgb24",
    interpolation=method | EXACT,
    threads=1,
  )
  array = np.rot90(rgb.to_ndarray(), frame.rotation // 90)  # counter-clockwise, as FFmpeg counts
  top, left = corner
  return array[top : top + size[0], left : left + size[1]]
