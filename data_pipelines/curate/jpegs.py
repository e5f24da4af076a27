"""Damage in motion JPEG, of which FFmpeg's decoder makes up what it cannot read without a word.

Its frames are images of their own. A flipped bit makes what follows it in an image nonsense, which
then ends before or after its data do; libjpeg notices that. Not here: reading the packets
(`stages.packets`).
"""

import re
from collections.abc import Iterator

import simplejpeg

# Two fields of interlaced video are two images in one packet, perhaps with padding between them.
_BETWEEN_FIELDS = re.compile(rb"(?<=\xff\xd9)\x00*(?=\xff\xd8\xff)")
# libjpeg reads ahead by a machine word, so of fewer bytes too many it tells or not, by chance.
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")
_READ_AHEAD = 8


class Damage:
  """Counts the frames of one video that libjpeg finds fault with.

  Some recorders write every image wrongly (a byte too many before its end is common), and all
  decoders show them well: what most frames have is a habit, what a few have is damage.
  """

  def __init__(self, pixels: int):
    """`pixels` of a frame, of which no image may have more."""
    self._pixels = pixels
    self._frames = self._faulty = 0
    self._first = ""

  def add(self, packet: bytes) -> None:
    """Looks at the next frame."""
    fault = next(_faults(packet, self._pixels), None)
    if fault is not None:
      self._first = self._first or f"number {self._frames}: {fault}"
      self._faulty += 1
    self._frames += 1

  def found(self) -> str | None:
    """What is wrong with which frame; None if nothing is, or if the video's writer is to blame."""
    if not 0 < self._faulty <= self._frames / 2:
      return None
    return f"{self._faulty} of its {self._frames} images are; {self._first}"


def _faults(packet: bytes, pixels: int) -> Iterator[str]:
  for image in _BETWEEN_FIELDS.split(packet):
    try:
      height, width, *_ = simplejpeg.decode_jpeg_header(image, strict=True)
      if height * width > pixels:
        yield f"it says that it has {width} x {height} pixels"
      else:  # the smaller it is shown, the less is done that tells nothing about its data
        simplejpeg.decode_jpeg(image, "GRAY", fastdct=True, min_factor=8, strict=True)
    except ValueError as error:
      fault = str(error).rsplit(": ", 1)[-1]
      extraneous = _EXTRANEOUS.match(fault)
      if not extraneous or int(extraneous[1]) >= _READ_AHEAD:
        yield fault
