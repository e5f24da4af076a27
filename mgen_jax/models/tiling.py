"""Pieces of long videos: which frames a part of the autoencoder's output depends on, and how pieces
that overlap are joined (Movie Gen, section 3.1.1). Arithmetic only; `coding.py` runs it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from mgen_jax.errors import ConfigError
from mgen_jax.models.autoencoder import AutoencoderConfig, Part

Mode = Literal["blend", "exact"]


@dataclasses.dataclass(frozen=True)
class TilingConfig:
  """How a long video is cut. The defaults are the paper's: 32 frames, decoded with 16 in common."""

  # "blend" is the paper's: pieces are coded alone, and the decoder's are cross-faded. "exact" gives
  # each piece the frames that its result depends on, and equals coding the whole at once.
  mode: str = "blend"
  frames: int = 32  # of a piece
  overlap: int = 16  # frames that neighbouring pieces of the decoder share ("blend")
  side: int = 0  # pixels of square pieces in space; 0: whole frames. "blend" only
  side_overlap: int = 64  # pixels that these share
  batch: int = 1  # pieces coded at once; they are split over the devices

  def check(self, model: AutoencoderConfig) -> None:
    """Raises ConfigError where the pieces do not fit the strides of a model."""
    if self.mode not in ("blend", "exact"):
      raise ConfigError(f"unknown mode {self.mode!r}: use 'blend' or 'exact'")
    stride = model.time_stride
    if self.frames < stride or self.frames % stride or self.overlap % stride or self.overlap < 0:
      raise ConfigError(
        f"pieces of {self.frames} frames that share {self.overlap} do not divide by the "
        f"autoencoder's stride {stride}: use multiples of it"
      )
    if not 2 * self.overlap <= self.frames:
      raise ConfigError(
        f"overlap {self.overlap} is more than half of frames {self.frames}: use at most "
        f"{self.frames // 2}"
      )
    if self.batch < 1:
      raise ConfigError(f"batch is {self.batch}: use 1 or more")
    if self.side and self.mode == "exact":
      raise ConfigError(
        "pieces in space are never exact (norms and attention see whole frames): set side to 0 or "
        "mode to 'blend'"
      )
    for name, step in zip(("height", "width"), model.space_strides, strict=True):
      if self.side % step or self.side_overlap % step or 0 < self.side <= self.side_overlap:
        raise ConfigError(
          f"side {self.side} and side_overlap {self.side_overlap} must be multiples of the stride "
          f"{step} of the {name}, and the first the larger"
        )


def attends_to_all_time(model: AutoencoderConfig) -> bool:
  """Whether the middle of the model sees all frames, so that its reach has no bound."""
  return model.temporal and model.temporal_attention and model.mid_attention


def encoder_input(
  model: AutoencoderConfig, first: int, last: int, part: Part | None = None
) -> tuple[int, int]:
  """The frames (first, last) that latents first..last depend on, before clipping to the video.

  Args:
    model: without attention over all time, or `part` "levels".
    first, last: inclusive.
    part: of the encoder; None for all of it.
  """
  return _backwards(model, _encoder_steps(model, part), first, last)


def decoder_input(
  model: AutoencoderConfig, first: int, last: int, part: Part | None = None
) -> tuple[int, int]:
  """The latents (first, last) that frames first..last depend on, before clipping; as above."""
  return _backwards(model, _decoder_steps(model, part), first, last)


def _encoder_steps(model: AutoencoderConfig, part: Part | None) -> list[str]:
  """What happens to time, from frames to latents."""
  steps = ["patch"] if model.has_patch else ["conv"]
  for level in range(len(model.multipliers)):
    steps += ["conv"] * 2 * model.res_blocks
    if level in model.time_down:
      steps.append("down")
    elif level in model.space_down:
      steps.append("conv")
  return steps if part == "levels" else steps + ["conv"] * 5


def _decoder_steps(model: AutoencoderConfig, part: Part | None) -> list[str]:
  steps = [] if part == "levels" else ["conv"] * 5
  for level in reversed(range(len(model.multipliers))):
    if level in model.time_down:
      steps.append("up")
    if level in model.time_down or level in model.space_down:
      steps.append("conv")
    steps += ["conv"] * 2 * model.decoder_res_blocks
  return [*steps, "unpatch" if model.has_patch else "conv"]


def _backwards(
  model: AutoencoderConfig, steps: list[str], first: int, last: int
) -> tuple[int, int]:
  half = model.temporal_kernel // 2 if model.temporal and model.kernel > 1 else 0
  patch = model.patch[0]
  for step in reversed(steps):
    match step:
      case "conv":
        first, last = first - half, last + half
      case "down":
        first, last = 2 * first - half, 2 * last + half
      case "up":
        first, last = first // 2, last // 2
      case "patch":
        first, last = patch * first, patch * last + patch - 1
      case "unpatch":
        first, last = first // patch, last // patch
  return first, last


def starts(total: int, size: int, step: int) -> Iterator[int]:
  """Where pieces of `size` begin, `step` apart, until one reaches `total`."""
  start = 0
  while True:
    yield start
    if start + size >= total:
      return
    start += step


def fade(overlap: int) -> np.ndarray:
  """Weight of the later of two pieces on the `overlap` frames they share: j / overlap, as in the
  paper (whose formula, as printed, gives it to the earlier one)."""
  return np.arange(overlap, dtype=np.float32) / max(overlap, 1)


def ramp(size: int, before: int, after: int) -> np.ndarray:
  """Weights of a piece along one side: rising over `before`, falling over `after`; never 0."""
  weight = np.ones(size, np.float32)
  weight[:before] = (np.arange(before) + 0.5) / max(before, 1)
  weight[size - after :] *= ((np.arange(after) + 0.5) / max(after, 1))[::-1]
  return weight
