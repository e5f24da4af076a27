"""Text in the picture: captions, logos and titles burned into it (Movie Gen, Table 38).

A clip has text if on any of a few frames the product of how surely there is a word (detection) and
how surely it was read (recognition) reaches 0.6. The reader is RapidOCR, whose networks come inside
its package; another one is a class with a method `read`. Three guards against what is no text,
found by measuring: a box over most of the frame, a box as high as wide (one sign: a star and a
cross are read as such), a word of fewer than two letters or digits.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa

from data_pipelines.curate import stage
from data_pipelines.curate.stages import sampling
from mgen_jax.errors import ConfigError

_CHANGED = 6.0  # mean difference of luma, in levels, between a frame read and the next to read
_THUMB = (32, 32)
_SAME_TEXT = 0.6  # share of their letters that two words have in common; of two letters, both
_SAME_PLACE = 0.3  # intersection over union; boxes of one word differ in their margins


@dataclasses.dataclass(frozen=True)
class Word:
  """What a reader found: a polygon [4, 2] (x, y) in pixels, the text, and two certainties."""

  box: np.ndarray
  text: str
  detection: float
  recognition: float


class Reader(Protocol):
  """Finds and reads words."""

  def read(self, rgb: np.ndarray, keep: Callable[[np.ndarray], bool]) -> list[Word]:
    """Words in uint8 [H, W, 3]; only boxes for which keep(box [4, 2]) holds need be read."""


@dataclasses.dataclass(frozen=True)
class Text(stage.FrameStage):
  """Sampling adapts to the clip: a frame that looks like the last one read is not read again."""

  name = "text"
  rate = 2.0
  code = 1
  columns = {
    "text_score": pa.float64(),  # highest detection x recognition
    "text_coverage": pa.float64(),  # largest share of a frame that words cover
    "text_found": pa.string(),  # the words of the frame with the highest score
    "text_frames": pa.int32(),  # frames that were read
  }
  needs = ("width", "height", "start", "end")

  reader: str = "rapidocr"
  frames: int = 3  # at most, spread over the clip
  side: int = 416  # longer side that is read, in pixels; less is cheaper and misses small print
  largest_box: float = 0.6  # share of the frame; more is no word
  least_elongation: float = 1.25  # longer over shorter side of a box
  least_letters: int = 2
  # On how many of the sampled frames a word must be, in the same place. 1 is the paper's rule; more
  # finds overlays only, and is not deceived by what moves through the picture.
  steady: int = 1
  max_score: float = stage.threshold(0.6)

  def __post_init__(self):
    if self.reader not in READERS:
      raise ConfigError(f'text.reader is "{self.reader}": known: {", ".join(READERS)}.')
    if not 1 <= self.steady <= self.frames:
      raise ConfigError(
        f"text.steady is {self.steady} and text.frames {self.frames}: 1 <= steady <= frames."
      )
    if self.side < 32:
      raise ConfigError(f"text.side is {self.side}: nothing can be read below 32 pixels.")

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("text_score", "text", "text", at_most=self.max_score, strict=True),)

  def scorer(self) -> str:
    return f"{self.reader} {importlib.metadata.version(self.reader)}"

  def observer(self, row: stage.Row) -> "Observer":
    width, height = row["width"] or self.side, row["height"] or self.side
    fitted = max(32, round(self.side * min(1.0, width / height)))
    return Observer(self, fitted, sampling.duration(row))


class Observer:
  """Keeps the few frames that are to be read; reading is dear, so it waits until it is asked."""

  def __init__(self, settings: Text, width: int, seconds: float):
    self._settings, self._width = settings, width
    self._taker = sampling.Taker(sampling.spread(settings.frames, seconds))
    self._frames: list[np.ndarray] = []
    self._last = None

  def frame(self, frame: stage.Frame) -> None:
    if not self._taker.wants(frame.time):
      return
    rgb = frame.rgb_at(self._width)
    thumb = cv2.resize(rgb[..., 1], _THUMB, interpolation=cv2.INTER_AREA).astype(np.float32)
    known = self._last is not None and np.abs(thumb - self._last).mean() < _CHANGED
    # Who asks what stays in its place needs to see the same picture twice.
    if not known or self._settings.steady > 1:
      self._frames.append(rgb)
      self._last = thumb

  def scores(self) -> dict[str, Any]:
    if not self._frames:
      return dict.fromkeys(Text.columns)
    reader = READERS[self._settings.reader](self._settings.side)
    found = [words(rgb, reader, self._settings) for rgb in self._frames]
    found = lasting(found, self._settings.steady)
    best = max(found, key=score)
    height, width = self._frames[0].shape[:2]
    return {
      "text_score": score(best),
      "text_coverage": max(covered(each, height, width) for each in found),
      "text_found": " ".join(word.text for word in best),
      "text_frames": len(found),
    }


def words(rgb: np.ndarray, reader: Reader, settings: Text) -> list[Word]:
  """What can be a word in uint8 [H, W, 3]."""
  height, width = rgb.shape[:2]

  def plausible(box):
    sides = np.linalg.norm(box - np.roll(box, 1, axis=0), axis=1)
    across, along = sorted((sides[0] + sides[2], sides[1] + sides[3]))
    area = cv2.contourArea(np.float32(box)) / (height * width)
    return area <= settings.largest_box and along >= settings.least_elongation * max(across, 1e-6)

  return [
    word
    for word in reader.read(rgb, plausible)
    if sum(letter.isalnum() for letter in word.text) >= settings.least_letters
  ]


def score(found: Sequence[Word]) -> float:
  """The highest detection x recognition."""
  return max((word.detection * word.recognition for word in found), default=0.0)


def lasting(found: Sequence[Sequence[Word]], steady: int) -> list[list[Word]]:
  """The words of each frame that are on at least `steady` of the frames."""
  return [
    [
      word
      for word in here
      if sum(any(is_same(word, w) for w in there) for there in found) >= steady
    ]
    for here in found
  ]


def is_same(first: Word, second: Word) -> bool:
  """Whether they lie in the same place and read alike: a reader errs in single letters."""
  alike = difflib.SequenceMatcher(None, first.text, second.text, autojunk=False).ratio()
  return alike >= _SAME_TEXT and overlap(first.box, second.box) >= _SAME_PLACE


def overlap(first: np.ndarray, second: np.ndarray) -> float:
  """Intersection over union of the upright rectangles around two boxes [4, 2]."""
  low = np.maximum(first.min(axis=0), second.min(axis=0))
  high = np.minimum(first.max(axis=0), second.max(axis=0))
  both = np.prod(np.maximum(high - low, 0))
  areas = np.prod(np.ptp(first, axis=0)) + np.prod(np.ptp(second, axis=0))
  return float(both / (areas - both)) if areas > both else 0.0


def covered(found: Sequence[Word], height: int, width: int) -> float:
  """The share of a frame under the union of the words' boxes."""
  mask = np.zeros((height, width), np.uint8)
  for word in found:  # one by one: fillPoly leaves out what two of its polygons share
    cv2.fillPoly(mask, [np.int32(np.round(word.box))], 1)
  return float(mask.mean())


class RapidOcr:
  """RapidOCR's detector and recogniser, one thread, with the networks of its package."""

  def __init__(self, side: int):
    from rapidocr import RapidOCR  # an extra; importing it takes a second

    engine = "EngineConfig.onnxruntime"
    self._ocr = RapidOCR(
      params={
        "Global.log_level": "error",
        f"{engine}.intra_op_num_threads": 1,
        f"{engine}.inter_op_num_threads": 1,
        "Det.limit_type": "max",
        "Det.limit_side_len": side,
        # The certainty of a box is then the mean over the word itself, not over a box around it,
        # which would halve that of short words.
        "Det.score_mode": "slow",
        "Det.use_dilation": False,
      }
    )

  def read(self, rgb: np.ndarray, keep: Callable[[np.ndarray], bool]) -> list[Word]:
    # In two steps: done in one, it tells the certainty of the recognition alone.
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    found = self._ocr(bgr, use_det=True, use_cls=False, use_rec=False)
    if found.boxes is None:
      return []
    words = []
    for box, detection in zip(found.boxes, found.scores, strict=True):
      if keep(box):
        said = self._ocr(cut_out(bgr, box), use_det=False, use_cls=False, use_rec=True)
        for text, recognition in zip(said.txts or (), said.scores or (), strict=True):
          words.append(Word(np.asarray(box), text, float(detection), float(recognition)))
    return words


def cut_out(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
  """What a box [4, 2], clockwise from its top left, shows: upright, and lying if it is high."""
  sides = np.linalg.norm(box - np.roll(box, -1, axis=0), axis=1)
  width, height = max(1, round(max(sides[0], sides[2]))), max(1, round(max(sides[1], sides[3])))
  corners = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
  matrix = cv2.getPerspectiveTransform(np.float32(box), corners)
  cut = cv2.warpPerspective(
    picture, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
  )
  return np.ascontiguousarray(np.rot90(cut)) if height >= 1.5 * width else cut


@functools.lru_cache(maxsize=2)
def _rapidocr(side: int) -> Reader:
  return RapidOcr(side)


READERS = {"rapidocr": _rapidocr}
