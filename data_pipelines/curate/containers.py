"""What a container says of itself, read without a decoder: from its first bytes, and its checksums.

FFmpeg believes the coded stream rather than the container, so only here does it show that a header
lies or that a file was cut short. MP4 and its kin, Matroska and AVI; of others nothing is known.
"""

import dataclasses
import os
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_VISUAL = {b"avc1", b"avc3", b"hvc1", b"hev1", b"mp4v", b"vp09", b"av01", b"jpeg", b"ap4h"}
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_CHECKSUM = b"\xbf\x84"  # four bytes of CRC-32, the first thing in an element that has one
_PIECE = 1 << 20  # bytes read at once
_DEEPEST = 64  # boxes looked at on a level
_BOXES = {b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"edts"}  # hold nothing but boxes
_LEVELS = 5  # moov, trak, mdia, minf, stbl
# Every name that is registered, and those of phones and cameras. After zeros, which end a list in
# QuickTime, comes no name.
_NAME = re.compile(rb"[A-Za-z0-9 _.\-\xa9]{4}|\x00.{3}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Declared:
  """What a header claims; 0 where it does not say."""

  pixels: int = 0  # of the largest frame
  seconds: float = 0.0
  size: int = 0  # bytes
  misnamed: bytes = b""  # the first part of an MP4's header whose name no part can have


def declared(file: BinaryIO) -> Declared:
  """Reads the claims of a file's header; damaged headers claim nothing."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  head = file.read(12)
  if head[:4] == _EBML:
    return Declared(size=_matroska_size(file))
  if head[:4] == b"RIFF":
    return Declared(size=8 + int.from_bytes(head[4:8], "little"))
  pixels, seconds = [0], [0.0]
  for start, end in _inside(file, 0, size, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")):
    pixels += _pixels(file, start, end)
  for path in ((b"moov", b"mvhd"), (b"moov", b"trak", b"mdia", b"mdhd")):
    for start, _ in _inside(file, 0, size, path):
      seconds.append(_seconds(file, start))
  misnamed = [
    name
    for start, end in _inside(file, 0, size, (b"moov",))
    for name in _misnamed(file, start, end)
  ]
  return Declared(max(pixels), max(seconds), misnamed=next(iter(misnamed), b""))


def _misnamed(file, start, end, levels=_LEVELS) -> Iterator[bytes]:
  """Names of boxes within that cannot be: players skip what they do not know, damage too."""
  for kind, body, stop in _boxes(file, start, end):
    if not _NAME.fullmatch(kind):
      yield kind
    if kind in _BOXES and levels > 1:
      yield from _misnamed(file, body, stop, levels - 1)


def _inside(file, start, end, path) -> Iterator[tuple[int, int]]:
  """Where the contents of the boxes at `path` start and end."""
  for kind, body, stop in _boxes(file, start, end):
    if kind != path[0]:
      continue
    if len(path) == 1:
      yield body, stop
    else:
      yield from _inside(file, body, stop, path[1:])


def _boxes(file, start, end) -> Iterator[tuple[bytes, int, int]]:
  """(name, start, end of the contents) of the boxes of one level."""
  for _ in range(_DEEPEST):
    if start + 8 > end:
      return
    file.seek(start)
    head = file.read(16)
    if len(head) < 8:
      return
    size, kind, body = int.from_bytes(head[:4], "big"), head[4:8], start + 8
    if size == 1 and len(head) == 16:
      size, body = int.from_bytes(head[8:], "big"), start + 16
    size = size or end - start
    if size < 8:
      return
    yield kind, body, min(start + size, end)
    start += size


def _pixels(file, start, end) -> list[int]:
  """Of a sample description: 8 bytes of version and count, then one visual entry a codec."""
  file.seek(start + 8)
  entry = file.read(36)
  if start + 44 > end or len(entry) < 36 or entry[4:8] not in _VISUAL:
    return []
  return [int.from_bytes(entry[32:34], "big") * int.from_bytes(entry[34:36], "big")]


def _seconds(file, start) -> float:
  """Of mvhd and mdhd, which start alike; the largest number means that it is not known."""
  file.seek(start)
  body = file.read(32)
  if len(body) < 32:
    return 0.0
  at, width = (20, 8) if body[0] == 1 else (12, 4)
  scale = int.from_bytes(body[at : at + 4], "big")
  duration = int.from_bytes(body[at + 4 : at + 4 + width], "big")
  return duration / scale if scale and duration < 2 ** (8 * width) - 1 else 0.0


def _matroska_size(file) -> int:
  """Where the segment ends; it follows the header. Live streams do not know."""
  file.seek(4)
  header = _number(file)
  if header is None:
    return 0
  file.seek(header, os.SEEK_CUR)
  if file.read(4) != _SEGMENT:
    return 0
  length = _number(file)
  return file.tell() + length if length is not None else 0


def wrong_part(file: BinaryIO) -> int | None:
  """Where the first part of a Matroska file is that does not have the checksum it states, or does
  not fit into the file; None if there is none, or it is another kind of file.

  FFmpeg gives every part of an mkv a checksum; other writers may not, and in WebM there is none.
  """
  file.seek(0)
  end = _matroska_size(file) if file.read(4) == _EBML else 0
  while 0 < (start := file.tell()) < end:
    file.seek(_id_length(file.read(1)) - 1, os.SEEK_CUR)
    size = _number(file)
    if size is None:  # as long as what follows
      return None
    stop = file.tell() + size
    if stop > end or not _is_whole(file, size):
      return start
    file.seek(stop)
  return None


def _id_length(first: bytes) -> int:
  return 9 - first[0].bit_length() if first and first[0] else 1


def _is_whole(file, size) -> bool:
  """Whether the next `size` bytes have the checksum that they begin with, if they do."""
  head = file.read(6)
  if not head.startswith(_CHECKSUM) or size < len(head):
    return True
  found, left = 0, size - len(head)
  while left > 0 and (piece := file.read(min(_PIECE, left))):
    found, left = zlib.crc32(piece, found), left - len(piece)
  return found == int.from_bytes(head[2:], "little")


def _number(file) -> int | None:
  """A number of EBML: as many bytes as the first has leading zeros; None if all bits are set."""
  first = file.read(1)
  if not first or not first[0]:
    return None
  count = 8 - first[0].bit_length()
  rest = file.read(count)
  value = (first[0] & (1 << (7 - count)) - 1) << (8 * count) | int.from_bytes(rest, "big")
  return value if len(rest) == count and value != (1 << (7 * (count + 1))) - 1 else None
