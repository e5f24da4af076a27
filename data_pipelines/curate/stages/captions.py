"""Captions: a mixture of two captioners, and the prompt that training will read.

70 % of the paper's clips have their caption from the smaller captioner and 30 % from the larger; a
camera move that the classifier was sure of stands before it, and the frame rate before that (Movie
Gen 3.2.1, 3.4). What is stored is the bare caption, with the move and the rate beside it: the text
encoders put the three together (`mgen_jax.data.prompts`). `prompt` is that text, to look at.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.curate import captioners, draws, stage
from data_pipelines.curate.stages import sampling
from mgen_jax.data.files import sha256_file
from mgen_jax.data.prompts import Prompt, compose
from mgen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Captions(stage.FrameStage):
  """Best gated: a server is the dearest of all stages, and a rejected clip needs no caption."""

  name = "captions"
  rate = 2.0
  columns = {
    "caption": pa.string(),
    "caption_words": pa.int32(),
    "captioner": pa.string(),  # which of the two wrote it
  }
  needs = (
    *("source_id", "copy", "path", "source_caption"),
    *("width", "height", "fps", "start", "end", "start_pts", "end_pts"),
  )

  first: captioners.CaptionerConfig = captioners.CaptionerConfig(kind="sidecar")
  second: captioners.CaptionerConfig | None = captioners.CaptionerConfig(kind="template")
  # Of clips that the first one captions; the paper's mixture is 0.7. Where one has nothing to say
  # the other is asked.
  first_share: float = 1.0
  seed: int = 0
  min_words: int = stage.threshold(1)

  def __post_init__(self):
    if not 0 <= self.first_share <= 1:
      raise ConfigError(f"captions.first_share is {self.first_share}: a share is from 0 to 1.")

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("caption_words", "no_caption", at_least=self.min_words),)

  def settings(self) -> dict[str, Any]:
    made = super().settings()
    for name in ("first", "second"):
      if made[name] is not None:
        made[name] = dataclasses.asdict(made[name])
    return made

  def scorer(self) -> str:
    both = [each for each in (self.first, self.second) if each is not None]
    return " + ".join(
      f"{each.label} {sha256_file(Path(each.file))[:12]}" if each.kind == "batch" else each.label
      for each in both
    )

  def choice(self, clip_id: str) -> tuple[captioners.CaptionerConfig, ...]:
    """The captioners of a clip, in the order they are asked."""
    if self.second is None:
      return (self.first,)
    if draws.uniform(self.seed, "captioner", [clip_id])[0] < self.first_share:
      return self.first, self.second
    return self.second, self.first

  def needs_frames(self) -> bool:
    return any(each is not None and each.kind == "server" for each in (self.first, self.second))

  def observer(self, row: stage.Row) -> "Observer":
    return Observer(self, row)


class Observer:
  """Keeps frames only for a server, and asks at the end."""

  def __init__(self, settings: Captions, row: stage.Row):
    # While a clip passes for the first time it has no id yet.
    self._row = {**row, "clip_id": stage.clip_id(row, row)}
    self._choice = settings.choice(self._row["clip_id"])
    server = next((each for each in self._choice if each.kind == "server"), None)
    self._side = server.side if server else 0
    times = sampling.spread(server.frames, sampling.duration(row)) if server else []
    self._taker = sampling.Taker(times)
    self._frames = []

  def frame(self, frame: stage.Frame) -> None:
    if self._taker.wants(frame.time):
      self._frames.append(frame.rgb_at(self._side))

  def scores(self) -> dict[str, Any]:
    for config in self._choice:
      text = captioners.make(config).caption(self._row, self._frames)
      if text:
        return {"caption": text, "caption_words": len(text.split()), "captioner": config.label}
    return {"caption": "", "caption_words": 0, "captioner": ""}


@dataclasses.dataclass(frozen=True)
class Prompts(stage.RowStage):
  """The camera's move if it is sure enough, and the whole prompt."""

  name = "prompts"
  columns = {"caption_camera": pa.string(), "prompt": pa.string()}
  needs = ("caption", "camera", "camera_confidence", "bucket_fps")

  # Of the classifier, from which on its class is told. The paper says "high confidence".
  min_confidence: float = 0.8

  def score(self, row: stage.Row) -> dict[str, Any]:
    # A clip that was rejected before it was captioned has no such column.
    sure = (row.get("camera_confidence") or 0.0) >= self.min_confidence
    camera = (row["camera"] or "") if sure else ""
    prompt = Prompt(row.get("caption") or "", row.get("bucket_fps") or 0.0, camera)
    return {"caption_camera": camera, "prompt": compose(prompt, fps_prefix=True)}
