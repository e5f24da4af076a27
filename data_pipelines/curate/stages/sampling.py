"""Which few frames of a clip an observer takes, by their time, while all of them go by.

How long a clip really is shows only at its end, so a frame is taken when its time has come, by the
duration that the row states. Not an observer itself.
"""

from collections.abc import Sequence
from typing import Any


def duration(row: Any) -> float:
  """Seconds of the clip of a row; 0 if nobody knows."""
  if row.get("start") is not None and row.get("end") is not None:
    return float(row["end"]) - float(row["start"])
  return float(row.get("duration") or 0)


def spread(count: int, seconds: float) -> list[float]:
  """`count` times in the middles of equal parts of a clip: one is the middle of the clip."""
  return [(i + 0.5) * seconds / count for i in range(count)]


class Taker:
  """Says of each frame as it comes whether it is wanted: the first one at or after each time."""

  def __init__(self, times: Sequence[float]):
    self._times = sorted(times)
    self._next = 0

  def wants(self, time: float) -> bool:
    """Call it with the time of every frame, in order."""
    wanted = False
    while self._next < len(self._times) and time >= self._times[self._next] - 1e-6:
      self._next += 1
      wanted = True
    return wanted
