"""Draws that depend on nothing but the clip: who is kept where only a share shall be.

A draw is a hash of (seed, what for, clip id), so it is the same for any number of workers, any
engine and any order, and a clip keeps its draw when others come or go. Not here: which share is
wanted of whom (the stages that choose).
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def uniform(seed: int, salt: str, ids: Sequence[str]) -> np.ndarray:
  """float64 [n] in [0, 1), one for each id; `salt` keeps the draws for two purposes apart."""
  found = np.empty(len(ids))
  for index, each in enumerate(ids):
    digest = hashlib.blake2b(f"{seed}|{salt}|{each}".encode(), digest_size=8).digest()
    found[index] = (int.from_bytes(digest, "big") >> 11) / 2**53
  return found


def smallest(draws: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
  """bool [n]: the `count` members of `among` (bool [n]) with the smallest draws."""
  places = np.flatnonzero(among)
  chosen = places[np.argsort(draws[places], kind="stable")[:count]]
  found = np.zeros(len(draws), bool)
  found[chosen] = True
  return found


def to_share(draws: np.ndarray, kept: np.ndarray, wanted: np.ndarray, share: float) -> np.ndarray:
  """Thins out whichever side has too many, until `share` of what is left is `wanted`.

  Args:
    draws: float [n]; a clip goes the earlier the larger its draw is.
    kept: bool [n], the clips that are there.
    wanted: bool [n], of which kind each is.
    share: of the wanted kind, above 0 and below 1.

  Returns:
    bool [n], a subset of `kept`. Where one of the two kinds is missing, nothing is thinned out:
    no share could be reached but by keeping nothing.
  """
  first, second = kept & wanted, kept & ~wanted
  n, m = int(first.sum()), int(second.sum())
  if not n or not m:
    return kept.copy()
  if n > share * (n + m):
    first = smallest(draws, first, round(share * m / (1 - share)))
  else:
    second = smallest(draws, second, round((1 - share) * n / share))
  return first | second
