"""Frames of files that nobody has checked, decoded once for all observers, in a child process.

A video is a program for its decoder, and some make it hang, crash or eat all memory. So decoding
and observing happen in a child that has a deadline and a memory limit; if it dies or is killed, the
file gets an error code and the next file a new child. What is computed from frames is in `stages`;
how one pass both finds the clips of a source and observes them is in `watch`.
"""

import dataclasses
import errno
import multiprocessing
import os
import threading
import time as clock
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation

from mgen_jax.data.media import (
  MediaError,
  display_size,
  frame_to_rgb,
  header_duration,
  open_media,
  pixel_aspect,
  refuse_truncated,
  video_stream,
)
from mgen_jax.data.media_write import EXACT, reformatter
from mgen_jax.errors import UserError

# Luma of these is their first plane, 8 bits a sample.
_CHROMA = ("410", "411", "420", "422", "440", "444")
_PLANAR = frozenset(f"yuv{kind}{chroma}p" for kind in ("", "j", "a") for chroma in _CHROMA) | {
  *("gray", "nv12", "nv21")
}
# Codec -> the decoder that is used instead of FFmpeg's own, which goes on after what cannot be: in
# VP9 a flipped bit makes everything after it nonsense, and only libvpx looks whether a tile ended
# where its data end.
STRICT = {"vp9": "libvpx-vp9"}
_STARTS = 300  # seconds that a child may take to start
_ORPHANED = 2.0  # seconds between two looks at the parent
_POLL = 0.2  # seconds between two looks at a child's memory


class DecodeError(MediaError):
  """A file that is not curated; `code` is what it is counted under."""

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code

  def __reduce__(self):
    return DecodeError, (self.code, str(self))


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one file may cost.

  Attributes:
    pixels: of one frame; 8K is 33 million.
    duration: seconds that a header may claim.
    memory: bytes of the child; above that it is killed.
    slowest: seconds of work for one second of video, before the child is killed.
    patience: seconds that even the shortest file gets.
  """

  pixels: int = 36_000_000
  duration: float = 6 * 3600.0
  memory: int = 3 << 30
  slowest: float = 20.0
  patience: float = 60.0


def refuse_link(path: str | os.PathLike, root: str | os.PathLike) -> None:
  """Raises DecodeError (linked_outside) if `path` leads out of the folder `root`."""
  if not Path(path).resolve().is_relative_to(Path(root).resolve()):
    raise DecodeError("linked_outside", f"{path} is a link out of {root}; copy the file there.")


# One file, in the child


class Forms:
  """The forms of one decoded frame that observers ask for, each made at most once.

  It may outlive its container, so it holds no stream; `aspect` is that of the stream's pixels.
  """

  def __init__(self, frame: av.VideoFrame, aspect: float):
    self.frame = frame
    self._aspect = aspect
    self._known: dict[tuple[str, int | None], np.ndarray] = {}

  def __call__(self, form: str, width: int | None) -> np.ndarray:
    key = (form, width)
    if key not in self._known:
      self._known[key] = self._luma(width) if form == "luma" else self._rgb(width)
    return self._known[key]

  def without_copies(self, widest: int) -> "Forms":
    """The same picture to be kept for a while: no wider than that, nothing cached."""
    frame = self.frame
    if frame.width > widest:
      height = max(2, round(frame.height * widest / frame.width))
      frame = reformatter().reformat(
        frame, width=widest, height=height, format="yuv420p",
        interpolation=Interpolation.AREA | EXACT, threads=1,
      )  # fmt: skip
    return Forms(frame, self._aspect)

  def _size(self, width):
    """(width, height) as displayed, no wider than `width`."""
    full = display_size(self.frame, self._aspect)
    if width is None or width >= full[0]:
      return full
    return width, max(1, round(full[1] * width / full[0]))

  def _luma(self, width):
    if width is not None:
      return self._shrunk(width)
    frame = self.frame
    if frame.format.name not in _PLANAR:
      frame = reformatter().reformat(frame, format="yuv420p", interpolation=EXACT, threads=1)
    plane = frame.planes[0]
    luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    luma = luma[: frame.height, : frame.width]
    turns = self.frame.rotation // 90 % 4
    return np.ascontiguousarray(np.rot90(luma, turns)) if turns else luma

  def _shrunk(self, width):
    """Halved while it can be, which is far quicker, then averaged down to the size."""
    size = self._size(width)
    luma, halvings = self("luma", None), 0
    while min(luma.shape) > 1 and luma.shape[1] >= 2 * size[0] and luma.shape[0] >= 2 * size[1]:
      halvings += 1
      luma = self._known.get(("half", halvings))
      if luma is None:
        larger = self._known["half", halvings - 1] if halvings > 1 else self("luma", None)
        half = larger.shape[1] // 2, larger.shape[0] // 2
        luma = cv2.resize(larger[: 2 * half[1], : 2 * half[0]], half, interpolation=cv2.INTER_AREA)
        self._known["half", halvings] = luma
    if luma.shape[::-1] == size:
      return luma
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)

  def _rgb(self, width):
    size = None if width is None else self._size(width)[::-1]
    return frame_to_rgb(self.frame, self._aspect, size)


def explain(error: Exception, path: str) -> DecodeError:
  """The DecodeError of what reading `path` raised."""
  if isinstance(error, DecodeError):
    return error
  if isinstance(error, MemoryError):  # FFmpeg's own is one too
    return DecodeError("out_of_memory", f"{path} needs more memory than a file may.")
  text = str(error)
  code = "damaged"
  for words, name in (
    ("no video track", "no_video"),
    ("no decoder", "no_video"),
    ("cannot be opened", "not_media"),
    ("truncated", "truncated"),
  ):
    if words in text:
      code = name
      break
  if isinstance(error, av.FFmpegError):
    said = f": {error.log[2].strip()}" if error.log else ""
    text = f"{path} is damaged ({error.strerror}{said}); copy it again."
  return DecodeError(code, text)


def open_checked(path: str, limits: Limits):
  """`open_media` with a limit to what the decoder may allocate for a frame."""
  return open_media(path, max_pixels=str(limits.pixels))


def check_stream(container, stream, path: str, limits: Limits) -> float:
  """Refuses what the header says; returns its duration in seconds.

  Raises DecodeError: too_large, too_long; MediaError if truncated.
  """
  context = stream.codec_context
  if context.width * context.height > limits.pixels:
    raise DecodeError(
      "too_large",
      f"{path} says that its frames are {context.width} x {context.height} pixels; at most"
      f" {limits.pixels:,} pixels are read.",
    )
  duration = track_duration(stream) or header_duration(container, stream)
  claimed = max(duration, header_duration(container, stream))
  if claimed > limits.duration:
    raise DecodeError(
      "too_long",
      f"{path} says that it lasts {claimed:.0f} s; at most {limits.duration:.0f} s are read.",
    )
  refuse_truncated(stream, path)
  # A damaged frame is a fault of the file, not something to guess over.
  context.options = {"err_detect": "explode", "max_pixels": str(limits.pixels)}
  return duration


def track_duration(stream) -> float:
  """Seconds of the video alone; 0 if only the length of the whole file is stated."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  parts = stream.metadata.get("DURATION", "").split(":")  # Matroska's, of when it ends
  try:
    hours, minutes, seconds = map(float, parts)
  except ValueError:
    return 0.0
  end = 3600 * hours + 60 * minutes + seconds
  return max(0.0, end - float((stream.start_time or 0) * stream.time_base))


def decode_frames(
  path: str, limits: Limits, start: float = 0.0, end: float | None = None, vectors: bool = False
) -> Iterator[tuple[float, int, Forms]]:
  """(seconds from the first frame, pts, forms) of the frames in [start, end), in order.

  With `vectors` the frames carry the motion vectors that the encoder stored.

  Raises DecodeError for whatever is wrong with the file; of a whole file also if its last frame is
  long before the end that its header promises.
  """
  if start > 1.0:  # less is quicker to decode than to seek
    frames = _frames(path, limits, start, end, vectors, seek=True)
    try:
      first = next(frames, None)
    except DecodeError:  # what follows a key frame may need what comes before it
      first = None
    if first is not None:
      yield first
      yield from frames
      return
  yield from _frames(path, limits, start, end, vectors, seek=False)


def _frames(path, limits, start, end, vectors, seek) -> Iterator[tuple[float, int, Forms]]:
  try:
    with open_checked(path, limits) as container:
      stream = video_stream(container, path)
      duration = check_stream(container, stream, path, limits)
      if vectors:
        stream.codec_context.flags2 |= av.codec.context.Flags2.export_mvs
      expect((end or duration) - (start if seek else 0.0))
      base, aspect = float(stream.time_base), pixel_aspect(stream)
      first = stream.start_time
      if seek:
        container.seek(int(start / base) + (first or 0), stream=stream)
      step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
      time, count = None, 0
      for frame in _decoded(container, stream):
        count += 1
        if frame.is_corrupt:
          raise DecodeError("damaged", f"{path} is damaged after {time or 0:.2f} s.")
        if frame.pts is None:  # some AVI files have no time stamps: count on
          last, time = time, 0.0 if time is None else time + step
          pts = round(time / base)
        else:
          first = frame.pts if first is None else first
          last, time = time, (frame.pts - first) * base
          pts = frame.pts
        if last is None and seek and time > start:
          return  # too far
        if last is not None and time <= last:
          continue  # the picture of a moment is its first
        if end is not None and time >= end - 1e-6:
          return
        if time >= start - 1e-6:
          yield time, pts, Forms(frame, aspect)
      if time is None:
        raise DecodeError("damaged", f"{path} has no frame that can be decoded.")
      _refuse_lost(container, stream, path, None if seek else count)
      if _promised(container, stream, duration) - time > 2 * step:
        raise DecodeError(
          "truncated",
          f"{path} ends at {time:.2f} s, its header says {duration:.2f} s; copy it again.",
        )
  except (av.FFmpegError, MediaError, MemoryError, OSError) as error:
    raise explain(error, path) from error


def _decoded(container, stream) -> Iterator[av.VideoFrame]:
  """The frames of a stream, by the decoder that notices most damage."""
  strict = STRICT.get(stream.codec_context.name)
  if strict is None:
    yield from container.decode(stream)
    return
  usual, context = stream.codec_context, av.codec.Codec(strict, "r").create()
  context.thread_count, context.options = 1, dict(usual.options)
  context.extradata = usual.extradata
  turned = None  # until the first frame; only the usual decoder hears of it from the container
  for packet in container.demux(stream):
    if turned is not False:
      shown = usual.decode(packet)
      turned = bool(shown[0].rotation) if turned is None and shown else turned
    yield from shown if turned else context.decode(packet)


def _refuse_lost(container, stream, path, count: int | None) -> None:
  """Refuses an AVI of which fewer than its header and its index list were decoded.

  In AVI a frame has a place and no time stamp, so one that is lost shifts all that follow; others
  tell by their time stamps. Empty places are frames that a recorder left out.
  """
  if container.format.name != "avi" or count is None or not stream.frames:
    return
  listed = sum(entry.size > 0 for entry in stream.index_entries)
  lost = min(stream.frames, listed) - count
  if lost > bool(stream.codec_context.has_b_frames):
    raise DecodeError(
      "damaged", f"{path} lists {count + lost} frames, but {lost} of them cannot be found."
    )


def _promised(container, stream, duration) -> float:
  """Seconds at which the last frame must have ended, by a header that says `duration`."""
  if track_duration(stream):
    return duration - 0.1
  if container.streams.audio:
    return 0.0  # it may be the length of the sound
  # It may count from before the first frame.
  return duration - 0.5 - max(0.0, float((stream.start_time or 0) * stream.time_base))


# The child

_announce: Any = None  # in the child: tells the parent how much there is to do


def expect(seconds: float) -> None:
  """Tells the parent, if there is one, that as many seconds of video are to be worked on."""
  if _announce is not None:
    _announce(seconds)


def _serve(connection, limits: Limits) -> None:
  """Answers (function, arguments) with ("done", result), ("file", ...) or ("bug", ...)."""
  global _announce

  def announce(seconds: float) -> None:
    connection.send(("length", seconds))

  _announce = announce
  threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
  _limit_memory(limits.memory)
  cv2.setNumThreads(1)  # many files at once keep the cores busier than many threads on a file
  av.logging.set_level(av.logging.PANIC)
  connection.send(("ready", None))
  while True:
    try:
      try:
        function, arguments = connection.recv()
      except EOFError:  # the parent is gone
        return
      answer = ("done", function(*arguments))
    except DecodeError as error:
      answer = ("file", (error.code, str(error)))
    except UserError as error:  # of a setting or another file: a model, a text
      answer = ("user", str(error))
    except Exception as error:
      if _is_hunger(error):
        _limit_memory(None)  # to be able to say so
        connection.send(("file", ("out_of_memory", "A file needs more memory than it may.")))
        return
      connection.send(("bug", traceback.format_exc()))
      raise
    connection.send(answer)


def _is_hunger(error: Exception) -> bool:
  """Whether it comes from a lack of memory, which a folder or a library that is opened reports too:
  as an OSError or an ImportError."""
  return isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error)


def _leave_with(parent: int) -> None:
  """Ends this process when its parent was killed: a file that hangs must not outlive the run."""
  while os.getppid() == parent:
    clock.sleep(_ORPHANED)
  os._exit(1)


def _limit_memory(memory: int | None) -> None:
  """Makes allocations beyond it fail, where the system can; the parent watches it besides.

  None takes the limit back.
  """
  try:
    import resource
  except ImportError:  # not on Windows
    return
  most = resource.getrlimit(resource.RLIMIT_DATA)[1]
  resource.setrlimit(resource.RLIMIT_DATA, (most if memory is None else memory, most))


class Guard:
  """Calls functions on files in a child process, which is started anew whenever it died.

  Use one in each worker process, and close it; it is a context manager too.
  """

  def __init__(self, limits: Limits | None = None):
    self.limits = limits or Limits()
    self.started = 0  # how many children there were
    self._process: multiprocessing.process.BaseProcess | None = None
    self._connection: Any = None

  def __enter__(self) -> "Guard":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def close(self) -> None:
    """Ends the child."""
    if self._process is not None:
      self._connection.close()
      self._process.kill()
      self._process.join()
      self._process = None

  def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns; a function of a module, and plain arguments.

    Raises:
      DecodeError: the file is at fault, or the child crashed, hung or grew over it.
      UserError: as the function raised it, or no child could be started.
      RuntimeError: the function is at fault, with its traceback.
    """
    self._start()
    limits = self.limits
    deadline = clock.monotonic() + limits.patience
    try:
      self._connection.send((function, arguments))
      kind, result = "length", 0.0
      while kind == "length":
        deadline += limits.slowest * result
        while not self._connection.poll(_POLL):
          if clock.monotonic() > deadline:
            raise DecodeError("decode_timeout", "A file was not read within its deadline.")
          if _resident(self._process.pid) > limits.memory:
            raise DecodeError("out_of_memory", "A file needs more memory than it may.")
        kind, result = self._connection.recv()
    except DecodeError:
      self.close()
      raise
    except (EOFError, ConnectionError) as error:
      self._process.join()
      exit_code = self._process.exitcode
      self.close()
      raise DecodeError("crashed", f"A file ended its decoder (exit {exit_code}).") from error
    if kind == "file":
      if result[0] == "out_of_memory":  # it may not have let go of all
        self.close()
      raise DecodeError(*result)
    if kind == "user":
      raise UserError(result)
    if kind == "bug":
      self.close()
      raise RuntimeError(result)
    return result

  def _start(self):
    if self._process is not None and self._process.is_alive():
      return
    self.close()
    # Spawned, not forked: the parent may hold threads (engines do).
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, self.limits), daemon=True)
    self._process.start()
    theirs.close()
    self.started += 1
    # To start is no part of a file's deadline; on a busy machine it takes long.
    try:
      ready = self._connection.poll(_STARTS) and self._connection.recv()
    except EOFError:
      ready = False
    if not ready:
      self.close()
      raise UserError(
        f"The process that decodes did not start within {_STARTS} s or died at it; is"
        f" limits.memory, {self.limits.memory:,} bytes, enough to load the libraries?"
      )


def _resident(pid: int) -> int:
  """Bytes of memory that a process holds; 0 where the system does not say."""
  try:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except (OSError, IndexError):
    return 0
