"""From a caption to the number of a class: exactly, or by words in order."""

import functools
from collections.abc import Sequence

from mgen_jax.errors import UserError, nearest


class ClassLabels:
  """The classes of a model, in the order of their numbers."""

  def __init__(self, names: Sequence[str]):
    self.names = tuple(names)
    self._numbers = {name: number for number, name in enumerate(self.names)}
    self._words = [tuple(name.lower().split()) for name in self.names]
    self._find = functools.lru_cache(maxsize=65536)(self._search)

  def number(self, caption: str) -> int:
    """The class of a caption.

    The name itself, in any case; otherwise the class with the most words of which the caption has
    all, in their order ("a small red circle moves up and left" is of "circle moves up and left"
    and not of "circle moves up").

    Raises:
      UserError: there is none, or two fit alike; names the nearest.
    """
    return self._find(caption)

  def __getstate__(self):
    return self.names  # a cache does not travel to worker processes

  def __setstate__(self, names):
    self.__init__(names)

  def _search(self, caption: str) -> int:
    if caption in self._numbers:
      return self._numbers[caption]
    words = caption.lower().split()
    fitting = [n for n, name in enumerate(self._words) if _in_order(name, words)]
    longest = max((len(self._words[n]) for n in fitting), default=0)
    best = [n for n in fitting if len(self._words[n]) == longest]
    if len(best) == 1:
      return best[0]
    if best:
      names = ", ".join(repr(self.names[n]) for n in best[:3])
      raise UserError(f"{caption!r} is of several classes ({names}): name one of them.")
    raise UserError(
      f"{caption!r} is none of the {len(self.names)} classes: {self._nearest(caption)}"
    )

  def _nearest(self, caption: str) -> str:
    lower = {name.lower(): name for name in self.names}
    near = nearest(caption.lower(), lower, 3)
    if near:
      return f"did you mean {' or '.join(repr(lower[name]) for name in near)}?"
    few = ", ".join(map(repr, self.names[:5]))
    return f"they are {few}{', ...' if len(self.names) > 5 else '.'}"


def _in_order(wanted: Sequence[str], words: Sequence[str]) -> bool:
  """Whether all of `wanted` stand in `words`, in this order."""
  left = iter(words)
  return bool(wanted) and all(any(word == other for other in left) for word in wanted)
