"""What the header of a file says, and whether it can be trusted: the first stage of every run.

Nothing is decoded here but what FFmpeg needs to know the streams. Whether all frames can be decoded
shows in the pass over the frames (`decode`).
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import av
import pyarrow as pa

from data_pipelines.curate.containers import declared
from data_pipelines.curate.decode import (
  DecodeError,
  Limits,
  check_stream,
  explain,
  open_checked,
)
from data_pipelines.curate.stage import Rule, SourceStage, threshold
from mgen_jax.data.media import VIDEO_SUFFIXES, MediaError, display_size, pixel_aspect, video_stream

# FFmpeg's name of a container -> the suffixes that belong to it.
_SUFFIXES = {
  "mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".m4v", ".mov", ".3gp"),
  "matroska,webm": (".mkv", ".webm"),
  "avi": (".avi",),
  "mpeg": (".mpg", ".mpeg"),
  "mpegts": (".ts", ".mpg", ".mpeg"),
  "asf": (".wmv", ".asf"),
  "flv": (".flv",),
  "gif": (".gif",),
}


@dataclasses.dataclass(frozen=True)
class Probe(SourceStage):
  """Settings: which headers are refused, and that the suffix must be that of the content."""

  name: ClassVar[str] = "probe"
  code: ClassVar[int] = 2  # headers with a part of no possible name are refused
  columns: ClassVar[dict[str, pa.DataType]] = {
    "container": pa.string(),
    "codec": pa.string(),
    "pixel_format": pa.string(),
    "width": pa.int32(),  # as displayed, like height
    "height": pa.int32(),
    "rotation": pa.int32(),  # degrees counter-clockwise
    "sample_aspect": pa.float64(),  # width of a pixel / its height
    "fps": pa.float64(),  # the average
    "frames": pa.int64(),  # 0 if the header does not say
    "duration": pa.float64(),
    "bit_rate": pa.int64(),
    "has_audio": pa.bool_(),
    "first_pts": pa.int64(),
    "time_base": pa.float64(),  # seconds of one pts
  }

  max_pixels: int = Limits.pixels
  max_duration: float = Limits.duration
  match_suffix: bool = True
  min_seconds: float = threshold(4.0)
  max_seconds: float = threshold(120.0)
  needs_audio: bool = threshold(False)

  def rules(self) -> tuple[Rule, ...]:
    bounds = {"at_least": self.min_seconds, "at_most": self.max_seconds}
    rules = (Rule("duration", "duration", "duration", **bounds),)
    return (*rules, Rule("has_audio", "no_sound", at_least=1)) if self.needs_audio else rules

  def score(self, path: str) -> dict[str, Any]:
    """The columns; of a file that cannot be read only error_code and error."""
    try:
      return {"error_code": "", "error": "", **self._read(os.fspath(path))}
    except DecodeError as error:
      return {**dict.fromkeys(self.columns), "error_code": error.code, "error": str(error)}

  def _read(self, path: str) -> dict[str, Any]:
    limits = Limits(pixels=self.max_pixels, duration=self.max_duration)
    try:
      _check_file(path, limits)
      with open_checked(path, limits) as container:
        if self.match_suffix:
          _check_suffix(path, container.format.name)
        stream = video_stream(container, path)
        duration = check_stream(container, stream, path, limits)
        return _describe(container, stream, path, duration)
    except (av.FFmpegError, MediaError, MemoryError, OSError) as error:
      raise explain(error, path) from error


def _describe(container, stream, path, duration) -> dict[str, Any]:
  context = stream.codec_context
  fps = float(stream.average_rate or stream.guessed_rate or 0)
  if not context.width or not context.height or not fps:
    raise DecodeError("damaged", f"{path} does not say how large or how fast its video is.")
  if not duration:
    duration = stream.frames / fps  # the pass over the frames will know better
  if stream.frames and abs(stream.frames / fps - duration) > max(1.0, 0.1 * duration):
    raise DecodeError(
      "truncated",
      f"{path} says that it lasts {duration:.2f} s, but has {stream.frames} frames at {fps:.2f} a"
      " second.",
    )
  first = _first_frame(container, stream, path)
  aspect = pixel_aspect(stream)
  width, height = display_size(first, aspect)
  return {
    "container": container.format.name.split(",")[0],
    "codec": context.name,
    "pixel_format": context.pix_fmt or "",
    "width": width,
    "height": height,
    "rotation": first.rotation,
    "sample_aspect": aspect,
    "fps": fps,
    "frames": stream.frames,
    "duration": duration,
    "bit_rate": container.bit_rate or 0,
    "has_audio": bool(container.streams.audio),
    "first_pts": stream.start_time if stream.start_time is not None else first.pts or 0,
    "time_base": float(stream.time_base),
  }


def _first_frame(container, stream, path) -> av.VideoFrame:
  for frame in container.decode(stream):
    return frame
  raise DecodeError("damaged", f"{path} has no frame that can be decoded.")


def _check_file(path: str, limits: Limits) -> None:
  """Refuses what need not be opened by FFmpeg.

  Raises DecodeError: not_media, empty, wrong_extension, too_large, too_long, damaged, truncated.
  """
  if not os.path.isfile(path):
    raise DecodeError("not_media", f"{path} is no file.")
  if os.path.getsize(path) == 0:
    raise DecodeError("empty", f"{path} has 0 bytes; copy it again.")
  if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
    raise DecodeError("wrong_extension", f"{path} has not the suffix of a video.")
  with open(path, "rb") as file:
    header = declared(file)
  if header.pixels > limits.pixels:
    raise DecodeError(
      "too_large",
      f"{path} says that its frames have {header.pixels:,} pixels; at most {limits.pixels:,} are"
      " read.",
    )
  if header.seconds > limits.duration:
    raise DecodeError(
      "too_long",
      f"{path} says that it lasts {header.seconds:.0f} s; at most {limits.duration:.0f} s are"
      " read.",
    )
  if header.misnamed:
    raise DecodeError(
      "damaged",
      f"{path} is damaged (a part of its header is named {header.misnamed!r}); copy it again.",
    )
  if header.size > os.path.getsize(path):
    raise DecodeError(
      "truncated",
      f"{path} is truncated (it says that it has {header.size} bytes); copy it again.",
    )


def _check_suffix(path: str, container: str) -> None:
  suffix = Path(path).suffix.lower()
  if suffix not in _SUFFIXES.get(container, (suffix,)):
    raise DecodeError(
      "wrong_extension",
      f"{path} is called {suffix} but holds {container.split(',')[0]}; rename it.",
    )
