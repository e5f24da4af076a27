"""Batches that are at hand before they are needed, so that a fault in the data ends a run in time.

A step runs on all processes or on none. One whose next batch cannot be read has no step to take
part in, and so cannot save with the others: it must know sooner. With several processes each
therefore keeps as many batches as it takes until all act on what one tells (`interrupt.DELAY`); all
then save at the last step that every process has data for.
"""

import collections
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgen_jax.errors import UserError
from mgen_jax.training import interrupt

Item = TypeVar("Item")


class Ahead:
  """The batches of a stage, of which as many as are needed are drawn early: with one process none.

  Attributes:
    fault: why there are no more after those that are drawn; None: nothing has happened.
    fingerprint: of what decided the order of the batches that were handed out, not of those drawn
      early: a phase that is to come is no part of it.
  """

  def __init__(self, batches: Any, count: int):
    """`batches`: `loop.Batches`; `count`: how many will be needed; no more are drawn."""
    self._batches, self._left = batches, count
    # After a fault all stop DELAY steps after the next one, which has its batch as well.
    self._early = interrupt.DELAY + 1 if jax.process_count() > 1 else 0
    self._begun = False
    self._queue: collections.deque[Any] = collections.deque()
    self.fault: UserError | None = None
    self.fingerprint: str = batches.fingerprint

  def __next__(self) -> Any:
    """The next batch.

    Raises:
      UserError: with one process, that it cannot be read; with several, at the first batch only,
        that one of them, or another process, can read too few to begin.
    """
    if self._early and not self._begun:
      self._begin()
    batch, self.fingerprint = self._queue.popleft() if self._queue else self._draw()
    self._fill(self._early)
    return batch

  def _begin(self) -> None:
    """Draws the batches that are needed before anything that is told is heard: all processes have
    them, or none takes a step. There is nothing to save either."""
    self._begun = True
    self._fill(self._early + 1)
    short = self.fault is not None and len(self._queue) <= interrupt.DELAY
    if multihost_utils.process_allgather(np.int32(short)).any():
      raise self.fault or elsewhere()

  def _fill(self, count: int) -> None:
    """Draws until there are `count`, or a fault."""
    while self.fault is None and self._left and len(self._queue) < count:
      try:
        self._queue.append(self._draw())
      except UserError as error:
        self.fault = error

  def _draw(self) -> tuple[Any, str]:
    """The next batch, and the fingerprint up to it."""
    self._left -= 1
    return next(self._batches), self._batches.fingerprint


def together(items: Iterator[Item]) -> Iterator[Item]:
  """Items that all processes draw alike, until one of them cannot: then all stop at the same one.

  For what is drawn now and then: each item waits for all processes.

  Raises:
    UserError: this process's own fault, or that another one has one.
  """
  while True:
    item, fault = None, None
    try:
      item = next(items, None)
    except UserError as error:
      fault = error
    if jax.process_count() > 1:
      seen = multihost_utils.process_allgather(np.int32(fault is not None))
      if fault is None and seen.any():
        fault = elsewhere()
    if fault is not None:
      raise fault
    if item is None:
      return
    yield item


def elsewhere() -> UserError:
  """What a process says that stops for the data of another one."""
  return UserError(
    "another process of this run cannot read its data: its log says what is missing."
  )
