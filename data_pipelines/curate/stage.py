"""What a stage of curation is: settings, thresholds, the columns it writes, and a pure function.

A stage scores; it never decides. Its rules say which scores are enough, and `select` applies them
to the stored scores, so another threshold costs a query and not a decode. A stage sees one thing
at a time (a file, a frame, a row, the whole table) and knows no engine, no partition and no folder:
each can be tested alone. Not here: the order of the stages and their defaults (`config`), decoding
(`decode`), running (`run`).
"""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

Row = Mapping[str, Any]

UNSEEN = "unseen"  # among an observer's scores: the pictures that a network is still to see

_CLIPS = uuid.UUID("9a0f3a8c-64ad-5d5c-a5f5-3c8f6ae4a1d7")  # names our clips; never change it


def threshold(default: Any) -> Any:
  """A dataclass field that only decides: changing it does not change the stage's version."""
  return dataclasses.field(default=default, metadata={"threshold": True})


@dataclasses.dataclass(frozen=True)
class Rule:
  """Keep a clip if `at_least` <= column <= `at_most`; booleans count as 0 and 1.

  A null score was not computed (an earlier rule rejected the clip, or its file failed): such a clip
  is neither kept nor counted as failing here.

  Attributes:
    column: of a stage.
    reason: what a clip that fails is listed under, for example "low_motion".
    row: the row of the paper's Table 38 that it belongs to ("" for none), see `ROWS`.
    at_least, at_most: bounds; at least one of them.
    strict: the bounds themselves fail too (for the paper's "> 2.0" and "< 0.85").
  """

  column: str
  reason: str
  row: str = ""
  at_least: float | None = None
  at_most: float | None = None
  strict: bool = False


# The rows of Movie Gen's Table 38, in its order; `Rule.row` is one of these keys.
ROWS: Mapping[str, str] = {
  "duration": "duration",
  "resolution": "resolution",
  "aspect": "aspect ratio",
  "text": "no text",
  "border": "no border",
  "scene": "no scene change",
  "aesthetics": "aesthetics",
  "motion": "no slow motion",
  "jitter": "no jitter",
  "duplicates": "no duplicates",
  "concepts": "concept resampling",
}


@dataclasses.dataclass(frozen=True)
class Stage:
  """The settings and the thresholds of one step; subclasses are frozen dataclasses too.

  Class attributes:
    name: of its folder, of its key in the config and in reports.
    code: raised whenever equal settings give other scores.
    columns: what it writes, unique over all stages.
    needs: columns of earlier stages that it reads.
    beside: it reads files beside the video, which may change when the video does not.
  """

  name: ClassVar[str] = ""
  code: ClassVar[int] = 1
  columns: ClassVar[Mapping[str, pa.DataType]] = {}
  needs: ClassVar[tuple[str, ...]] = ()
  beside: ClassVar[bool] = False

  def rules(self) -> tuple[Rule, ...]:
    """What a clip must meet, from this stage's thresholds."""
    return ()

  def scorer(self) -> str:
    """Which scorer decides ("rapidocr 3.10", "laplacian"); part of the version, and reported."""
    return ""

  def settings(self) -> dict[str, Any]:
    """All fields that change scores, as JSON keeps them (thresholds are not among them)."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if not field.metadata.get("threshold")
    }

  def version(self, inputs: Mapping[str, str]) -> str:
    """12 hexadecimal digits over code, settings, scorer and the versions of its inputs."""
    content = [self.name, self.code, self.settings(), self.scorer(), dict(inputs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def clip_id(source: Row, clip: Row) -> str:
  """A name that depends on the bytes of the source and the span, not on where the file is."""
  which = f"{source['source_id']}|{source['copy']}|{clip['start_pts']}|{clip['end_pts']}"
  return str(uuid.uuid5(_CLIPS, which))


class SourceStage(Stage):
  """One row for each file, from the file itself without decoding all of it (probe)."""

  def score(self, path: str) -> dict[str, Any]:
    """The columns of the file at `path`; a fault of the file is its "error_code", not raised."""
    raise NotImplementedError


class SplitStage(Stage):
  """The clips of a source: rows with at least start and end in seconds, start_pts and end_pts."""

  def clips(self, source: Row) -> list[dict[str, Any]]:
    """The clips, in order of time; may be none. `source` holds all columns of the source."""
    raise NotImplementedError


class RowStage(Stage):
  """From one clip's scores alone (aspect ratio, bucket, caption)."""

  def score(self, row: Row) -> dict[str, Any]:
    """Its columns; `row` holds those of its source, and all that stages before it wrote."""
    raise NotImplementedError


class TableStage(Stage):
  """From all clips at once (duplicates, concepts): the only kind that is not split up."""

  def score(self, table: pa.Table) -> pa.Table:
    """Its columns for every row of `table` (clip_id, `needs`), in the same order."""
    raise NotImplementedError


class Frame:
  """One decoded frame, shared by all observers; each form of it is computed at most once.

  Attributes:
    index: 0 for the first frame of what is observed.
    time: when it is shown, in seconds from the start of what is observed.
    pts: the same in the stream's time base, from the stream's own zero.
    native: what the decoder gave (an av.VideoFrame), for observers that feed a filter graph.
  """

  def __init__(
    self,
    index: int,
    time: float,
    pts: int,
    read: Callable[[str, int | None], np.ndarray],
    native: Any = None,
  ):
    """`read(form, width)` gives "luma" [H, W] or "rgb" [H, W, 3] uint8, at a width or whole."""
    self.index = index
    self.time = time
    self.pts = pts
    self.native = native
    self._read = read
    self._known: dict[tuple[str, int | None], np.ndarray] = {}

  @property
  def luma(self) -> np.ndarray:
    """uint8 [H, W]; read-only."""
    return self._form("luma", None)

  def luma_at(self, width: int) -> np.ndarray:
    """uint8 [h, width], the aspect kept; never enlarged. Read-only."""
    return self._form("luma", width)

  def rgb(self) -> np.ndarray:
    """uint8 [H, W, 3]; read-only."""
    return self._form("rgb", None)

  def rgb_at(self, width: int) -> np.ndarray:
    """uint8 [h, width, 3], the aspect kept; never enlarged. Read-only."""
    return self._form("rgb", width)

  def _form(self, form: str, width: int | None) -> np.ndarray:
    if (form, width) not in self._known:
      array = self._read(form, width)
      array.flags.writeable = False
      self._known[form, width] = array
    return self._known[form, width]


class Observer(Protocol):
  """Sees the frames of one source or clip in order, once, and then says the scores."""

  def frame(self, frame: Frame) -> None: ...

  def scores(self) -> dict[str, Any]:
    """The columns of its stage; also after no frame at all.

    Where a network decides, it may leave columns out and give `UNSEEN`: uint8 [h, w, 3] each.
    """
    ...


class FrameStage(Stage):
  """From frames; all observers are fed by one decode.

  Class attributes:
    level: "source" or "clip".
    rate: frames a second that a clip's observer needs, as few as will do: it gets the first frame
      at or after each k / rate seconds, at most 1920 px wide. None is every frame.
    live: a clip's observer of every frame that does not read the row's "end", so that it can watch
      before anybody knows where the clip ends. Neither `rate` nor `live` costs a second decode.
    native: whether it reads motion vectors of `Frame.native` that the encoder stored.
  """

  level: ClassVar[str] = "clip"
  rate: ClassVar[float | None] = None
  live: ClassVar[bool] = False
  native: ClassVar[bool] = False

  def needs_frames(self) -> bool:
    """Whether, with these settings, an observer must see frames before it is asked for scores."""
    return True

  def see(self, clips: Sequence[Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    """The columns that observers left out, of many clips at once, from their `UNSEEN` pictures."""
    raise NotImplementedError

  def observer(self, row: Row) -> Observer:
    """A new observer; `row` holds the scores so far (width, height, fps, duration, start, end)."""
    raise NotImplementedError
