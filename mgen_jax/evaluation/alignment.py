"""Does a video show what its prompt names? Accuracies of colour, shape and direction, with chance.

Videos come from anywhere; prompts are those of the Marbles world, whose judge tells from pixels
alone what is seen. Not here: how well real videos fit free text (that needs a trained encoder).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mgen_jax.data.marbles import COMPASS, Prompt, WorldConfig, judge

ATTRIBUTES = ("colour", "shape", "direction")

# What the judge should see of a motion that is no compass direction. "bounces" is not here: its
# direction changes, so it is not asked for.
_SEEN_AS = {**{motion: motion for motion in COMPASS}, "stays still": "stays still"}
_SEEN_AS["falls"] = "moves down"

_Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution


@dataclasses.dataclass(frozen=True)
class Check:
  """One attribute of one video; `wanted` None: the prompt does not say, so it does not count."""

  attribute: str
  wanted: str | None
  seen: str | None

  @property
  def right(self) -> bool | None:
    """Whether it is as the prompt says; None where that does not count."""
    return None if self.wanted is None else self.wanted == self.seen


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a prompt asks for and what its video shows."""

  prompt: str
  checks: tuple[Check, ...]

  @property
  def all_right(self) -> bool:
    """No attribute that counts is wrong."""
    return all(check.right is not False for check in self.checks)

  def to_json(self) -> dict[str, Any]:
    """Plain values: prompt, wanted and seen by attribute, right by attribute and for all."""
    return {
      "prompt": self.prompt,
      "wanted": {check.attribute: check.wanted for check in self.checks},
      "seen": {check.attribute: check.seen for check in self.checks},
      "right": {check.attribute: check.right for check in self.checks} | {"all": self.all_right},
    }


def judge_video(video: np.ndarray, prompt: Prompt | None, config: WorldConfig) -> Verdict:
  """Judges uint8 [T, H, W, 3] by the words of a world; an image is asked for no direction.

  Without a prompt it only says what is seen.
  """
  return compare(judge(video, config), prompt, len(video))


def compare(seen: Any, prompt: Prompt | None, frames: int = 2) -> Verdict:
  """What the judge saw (its `colour`, `shape`, `direction`) beside what the prompt says."""
  if prompt is None:
    names = ATTRIBUTES if frames > 1 else ATTRIBUTES[:-1]
    return Verdict("", tuple(Check(name, None, getattr(seen, name)) for name in names))
  wanted = {
    "colour": prompt.colour,
    "shape": prompt.shape,
    "direction": _SEEN_AS.get(prompt.motion) if frames > 1 else None,
  }
  checks = tuple(Check(name, wanted[name], getattr(seen, name)) for name in ATTRIBUTES)
  return Verdict(prompt.text, checks)


def of_world(verdicts: Sequence[Verdict], config: WorldConfig) -> float:
  """The share of videos that show a colour, a shape and a direction of the world: 1 of real ones.

  Says whether a model draws objects at all, also one that is asked for nothing. A direction does
  not count of an image, nor in a world where some motion has none ("bounces").
  """
  words = {"colour": config.colours, "shape": config.shapes}
  if all(motion in _SEEN_AS for motion in config.motions):
    words["direction"] = tuple(_SEEN_AS[motion] for motion in config.motions)
  known = [
    all(
      check.seen in words[check.attribute] for check in verdict.checks if check.attribute in words
    )
    for verdict in verdicts
  ]
  return sum(known) / len(known)


def accuracies(verdicts: Sequence[Verdict]) -> dict[str, Any]:
  """Shares of videos that are right, 0 to 1: by attribute and "all" three at once.

  Returns:
    {"colour", "shape", "direction", "all": share (None where no video counts), "prompts": number of
    videos, "counted": how many count, by attribute, "interval": Wilson 95 % bounds by attribute}.
  """
  rights: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
  for verdict in verdicts:
    for check in verdict.checks:
      if check.right is not None:
        rights[check.attribute].append(check.right)
  rights["all"] = [
    verdict.all_right
    for verdict in verdicts
    if any(check.right is not None for check in verdict.checks)
  ]
  shares = {name: sum(values) / len(values) if values else None for name, values in rights.items()}
  return {
    **shares,
    "prompts": len(verdicts),
    "counted": {name: len(values) for name, values in rights.items()},
    "interval": {
      name: wilson(sum(values), len(values)) if values else None for name, values in rights.items()
    },
  }


def chance(config: WorldConfig) -> dict[str, float]:
  """What guessing evenly among the words of the world would reach, keys as in `accuracies`."""
  directions = {_SEEN_AS[motion] for motion in config.motions if motion in _SEEN_AS}
  shares = {
    "colour": 1 / len(config.colours),
    "shape": 1 / len(config.shapes),
    "direction": 1 / max(1, len(directions)),
  }
  return {**shares, "all": math.prod(shares.values())}


def wilson(right: int, count: int) -> tuple[float, float]:
  """The 95 % score interval of a share (Wilson, 1927): sound for few trials and near 0 and 1."""
  share, z2 = right / count, _Z95**2
  centre = (share + z2 / (2 * count)) / (1 + z2 / count)
  half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
  return max(0.0, centre - half), min(1.0, centre + half)
