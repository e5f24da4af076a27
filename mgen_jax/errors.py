"""The one exception type for faults a user can fix; commands print it as a sentence and exit.

Everything else that is raised is a bug in mgen_jax and keeps its traceback. Here too: how such a
sentence guesses what was meant, and the ranges that the numbers of a config keep.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
  """A fault that the user can fix.

  The message is one sentence that names the value at fault, where it comes from and the fix.
  """


class ConfigError(UserError):
  """A key or a value of an experiment that cannot be used."""


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
  """Up to `count` of the known words that are most like a word, the closest first."""
  return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def suggest(word: str, known: Iterable[str]) -> str:
  """'did you mean "x"?' or the list of what is known."""
  known = list(known)
  near = nearest(word, known)
  if near:
    return f'did you mean "{near[0]}"?'
  return f"known: {', '.join(sorted(known)) or 'none'}."


def check_ranges(
  config: Any,
  *,
  positive: Iterable[str] = (),
  natural: Iterable[str] = (),
  share: Iterable[str] = (),
) -> None:
  """Checks the numbers of a config, on its own: what two fields say together is not seen here.

  Args:
    config: a dataclass. A field that is None passes; of a tuple every number counts.
    positive: fields that are more than 0 (whole numbers: 1 or more).
    natural: fields that are 0 or more.
    share: fields that lie in [0, 1].

  Raises:
    ConfigError: one lies outside of its range, or is NaN or no number.
  """
  for name in positive:
    value = getattr(config, name)
    numbers = _numbers(name, value)
    if not all(number > 0 for number in numbers):
      least = "1 or more" if isinstance(numbers[0], int) else "more than 0"
      raise ConfigError(f"{name} is {value}: it must be {least}.")
  for name in natural:
    value = getattr(config, name)
    if not all(number >= 0 for number in _numbers(name, value)):
      raise ConfigError(f"{name} is {value}: it cannot be negative.")
  for name in share:
    value = getattr(config, name)
    if not all(0 <= number <= 1 for number in _numbers(name, value)):
      raise ConfigError(f"{name} is {value}: it must lie in [0, 1].")


def _numbers(name: str, value: Any) -> list[int | float]:
  """The numbers of a field, those of tuples in tuples too."""
  if isinstance(value, tuple | list):
    return [number for item in value for number in _numbers(name, item)]
  if value is not None and not isinstance(value, int | float):
    raise ConfigError(f"{name} is {value!r}: it must be a number.")
  return [] if value is None else [value]
