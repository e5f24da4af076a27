"""People: who is found by a detector or by what they do, and how large their share shall be.

The paper finds humans by text-to-video retrieval with 600 verbs and expressions, wants at least
60 % of them in its last set, and keeps their frequency when it resamples (Movie Gen 3.2.1). Here:
faces, by OpenCV's cascade without weights or by YuNet with them; and the verbs, as embeddings of
texts in the space of `embedding`'s network, made once by whoever has its text side.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data_pipelines.curate import draws, models, stage
from data_pipelines.curate.stages import sampling
from mgen_jax.errors import ConfigError, UserError

_WIDTH = 320  # of the frame that is searched; a face of a tenth of its height is enough
_SMALLEST = 0.06  # of the short side, for a face


@dataclasses.dataclass(frozen=True)
class Faces(stage.FrameStage):
  """On how many of a few frames there is a face."""

  name = "faces"
  rate = 2.0
  columns = {
    "faces": pa.float64(),  # share of the frames looked at that have one
    "face_size": pa.float64(),  # height of the largest, as a share of the frame's
  }
  needs = ("start", "end")

  model: str = ""  # path of YuNet's .onnx; without: the cascade for frontal faces
  frames: int = 3
  certainty: float = 0.7  # of YuNet

  def __post_init__(self):
    if self.frames < 1:
      raise ConfigError(f"faces.frames is {self.frames}: look at one at least.")

  def scorer(self) -> str:
    if self.model:
      return f"yunet {models.fingerprint(self.model)}"
    return f"opencv {cv2.__version__} frontal cascade"

  def observer(self, row: stage.Row) -> "Observer":
    return Observer(self, sampling.duration(row))


class Observer:
  """Keeps a few small frames and searches them at the end."""

  def __init__(self, settings: Faces, seconds: float):
    self._settings = settings
    self._taker = sampling.Taker(sampling.spread(settings.frames, seconds))
    self._frames = []

  def frame(self, frame: stage.Frame) -> None:
    if self._taker.wants(frame.time):
      self._frames.append(frame.rgb_at(_WIDTH))

  def scores(self) -> dict[str, Any]:
    if not self._frames:
      return dict.fromkeys(Faces.columns)
    settings = self._settings
    detect = _yunet(settings.model, settings.certainty) if settings.model else _cascade()
    heights = [max(detect(rgb), default=0) / rgb.shape[0] for rgb in self._frames]
    return {
      "faces": sum(height > 0 for height in heights) / len(heights),
      "face_size": max(heights),
    }


@functools.lru_cache(maxsize=1)
def _cascade():
  path = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
  classifier = cv2.CascadeClassifier(str(path))

  def detect(rgb) -> list[int]:
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    least = max(20, round(_SMALLEST * min(grey.shape)))
    found = classifier.detectMultiScale(grey, 1.2, 6, minSize=(least, least))
    return [int(height) for _, _, _, height in found]

  return detect


@functools.lru_cache(maxsize=4)
def _yunet(path: str, certainty: float):
  models.fingerprint(path)
  try:
    detector = cv2.FaceDetectorYN.create(path, "", (320, 320), certainty)
  except cv2.error as error:
    raise UserError(f"{path} is not YuNet's network ({error.err}); give its .onnx file.") from error

  def detect(rgb) -> list[float]:
    detector.setInputSize(rgb.shape[1::-1])
    _, found = detector.detect(np.ascontiguousarray(rgb[..., ::-1]))
    return [] if found is None else [float(row[3]) for row in found]

  return detect


@dataclasses.dataclass(frozen=True)
class Humans(stage.RowStage):
  """One number for "there is a person": the larger of what faces and verbs say."""

  name = "humans"
  columns = {
    "human": pa.float64(),  # 0 to 1
    "verb": pa.string(),  # the nearest one, "" without verbs
    "verb_similarity": pa.float64(),  # its cosine with the clip; null without verbs
  }
  needs = ("faces", "embedding")

  verbs: str = ""  # path of a .safetensors: each tensor [d] is an embedding, its name the verb
  verb_cosine: float = 0.25  # from which on a clip is of a person, wholly

  def scorer(self) -> str:
    return f"verbs {models.fingerprint(self.verbs)}" if self.verbs else "faces"

  def score(self, row: stage.Row) -> dict[str, Any]:
    found = {"human": row["faces"] or 0.0, "verb": "", "verb_similarity": None}
    if self.verbs and row["embedding"] is not None:
      names, vectors = load_verbs(self.verbs)
      clip = np.float32(row["embedding"])
      if vectors.shape[1] != len(clip):
        raise UserError(
          f"humans.verbs has vectors of {vectors.shape[1]} numbers and the clips' have {len(clip)}:"
          " both must come from one video-text model (see embedding.model)."
        )
      cosines = vectors @ clip
      best = int(cosines.argmax())
      found |= {"verb": names[best], "verb_similarity": float(cosines[best])}
      found["human"] = max(found["human"], float(np.clip(cosines[best] / self.verb_cosine, 0, 1)))
    return found


@functools.lru_cache(maxsize=4)
def load_verbs(path: str) -> tuple[tuple[str, ...], np.ndarray]:
  """Names and unit rows float32 [n, d] of a file of verbs. Raises UserError."""
  models.fingerprint(path)
  try:
    tensors = load_file(path)
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is no safetensors file ({error}).") from error
  names = tuple(sorted(tensors))
  if not names or len({tensors[name].shape for name in names}) != 1 or tensors[names[0]].ndim != 1:
    raise UserError(f"{path}: write one tensor [d] for each verb, with the verb as its name.")
  return names, models.unit(np.float32([tensors[name] for name in names]))


@dataclasses.dataclass(frozen=True)
class HumanShare(stage.TableStage):
  """Thins out clips without people until those with them have their share.

  Clips with people are never thinned out: the share is a lower bound.
  """

  name = "human_share"
  columns = {"in_human_share": pa.bool_()}
  needs = ("human",)

  share: float = 0.0  # the paper's last set: 0.6; 0: whatever comes
  human_from: float = 0.5  # `human` from which on a clip is of a person
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.share < 1:
      raise ConfigError(f"human_share.share is {self.share}: give a share below 1, or 0 for any.")

  def rules(self) -> tuple[stage.Rule, ...]:
    return (stage.Rule("in_human_share", "human_share", at_least=1),)

  def score(self, table: pa.Table) -> pa.Table:
    human = np.array([each or 0.0 for each in table["human"].to_pylist()]) >= self.human_from
    kept = np.ones(table.num_rows, bool)
    if self.share and human.sum() < self.share * len(kept):
      draw = draws.uniform(self.seed, "humans", table["clip_id"].to_pylist())
      kept = draws.to_share(draw, kept, human, self.share)
    return pa.table({"in_human_share": kept})
