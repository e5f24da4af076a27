"""Says what a run waits for when it waits long: slow storage looks like a run that hangs."""

import contextlib
import threading
import time
from collections.abc import Iterator

from absl import logging


class Patience:
  """While entered, a thread that says every so often what has been waited for since when.

  Args:
    seconds: of waiting, after which and after each of which it says so.
  """

  def __init__(self, seconds: float = 30.0):
    self._seconds = seconds
    self._waiting: tuple[str, float] | None = None  # for what, since when
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)

  def __enter__(self) -> "Patience":
    self._thread.start()
    return self

  def __exit__(self, *unused) -> None:
    self._closed.set()
    self._thread.join()

  @contextlib.contextmanager
  def over(self, what: str) -> Iterator[None]:
    """Around a wait for `what`."""
    self._waiting = (what, time.monotonic())
    try:
      yield
    finally:
      self._waiting = None

  def _watch(self) -> None:
    while not self._closed.wait(self._seconds):
      waiting = self._waiting
      if waiting is not None and time.monotonic() - waiting[1] >= self._seconds:
        logging.warning(
          "has waited %.0f s for %s: the storage is slow or hangs; the run goes on when it comes",
          time.monotonic() - waiting[1],
          waiting[0],
        )
