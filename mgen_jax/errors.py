"""The one exception type for faults a user can fix; commands print it as a sentence and exit.

Everything else that is raised is a bug in mgen_jax and keeps its traceback. Here too: how such a
sentence guesses what was meant.
"""

import difflib
from collections.abc import Iterable


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
