"""What a clip is recognised by: a perceptual hash of its frames, or a network's embedding.

The hash is PDQ (256 bits a frame), a few frames a second, kept with their order, so that a copy
that starts later is found too. It withstands another encoding, another size and another brightness;
it does not withstand crops, mirrors and bars. An embedding made for copy detection does (SSCD,
which the paper uses): give its ONNX file. Not here: who is a copy of whom (`copies`).
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pdqhash
import pyarrow as pa

from data_pipelines.curate import models, stage
from data_pipelines.curate.stages import sampling
from mgen_jax.errors import ConfigError

BITS = 256
BLANK = bytes(BITS // 8)  # the hash of a frame without anything to recognise: black, or one colour
_QUALITY = 5  # of PDQ's 0 to 100, below which a frame is blank
_WIDTH = 256  # of the frame that is hashed, in pixels; PDQ looks at 64 x 64 of it


@dataclasses.dataclass(frozen=True)
class Hashes(stage.FrameStage):
  """Hashes of frames spread evenly over the clip, and the mean embedding of three of them."""

  name = "hashes"
  rate = 4.0
  columns = {
    "copy_hashes": pa.list_(pa.binary(BITS // 8)),
    "copy_hash_rate": pa.float64(),  # hashes a second
    "copy_embedding": pa.list_(pa.float32()),  # of length 1; null without a network
  }
  needs = ("start", "end")

  per_second: float = 4.0
  model: str = ""  # path of an .onnx network for copy detection
  model_frames: int = 3

  def __post_init__(self):
    if not 0 < self.per_second <= self.rate or self.model_frames < 1:
      raise ConfigError(
        f"hashes.per_second is {self.per_second} and hashes.model_frames {self.model_frames}: take"
        f" up to {self.rate:g} frames a second, and at least one for the network."
      )

  def scorer(self) -> str:
    hashed = f"pdqhash {importlib.metadata.version('pdqhash')}"
    return f"{hashed}, onnx {models.fingerprint(self.model)}" if self.model else hashed

  def observer(self, row: stage.Row) -> "Observer":
    return Observer(self, sampling.duration(row))

  def see(self, clips: Sequence[Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    return [{"copy_embedding": mean} for mean in models.means(_tower(self.model), clips)]


def _tower(model: str) -> models.ImageModel:
  return models.onnx(model, models.IMAGENET_MEAN, models.IMAGENET_STD)


class Observer:
  """Keeps the hashes, and the few frames that the network is to see."""

  def __init__(self, settings: Hashes, seconds: float):
    self._settings = settings
    count = max(1, round(seconds * settings.per_second))
    self._taker = sampling.Taker([i / settings.per_second for i in range(count)])
    wanted = sampling.spread(settings.model_frames, seconds) if settings.model else []
    self._shown = sampling.Taker(wanted)
    self._hashes, self._frames = [], []

  def frame(self, frame: stage.Frame) -> None:
    if self._taker.wants(frame.time):
      self._hashes.append(pdq(frame.rgb_at(_WIDTH)))
    if self._shown.wants(frame.time):
      self._frames.append(_tower(self._settings.model).fit(frame.rgb()))

  def scores(self) -> dict[str, Any]:
    if not self._hashes:
      return dict.fromkeys(Hashes.columns)
    later = {stage.UNSEEN: self._frames} if self._frames else {"copy_embedding": None}
    return {"copy_hashes": self._hashes, "copy_hash_rate": self._settings.per_second, **later}


def pdq(rgb: np.ndarray) -> bytes:
  """The 32 bytes of PDQ of uint8 [H, W, 3], or BLANK."""
  smallest = min(rgb.shape[:2])
  if smallest < 64:  # PDQ reads 64 x 64 points
    scale = 64 / smallest
    rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
  bits, quality = pdqhash.compute(np.ascontiguousarray(rgb))
  return np.packbits(bits).tobytes() if quality >= _QUALITY else BLANK
