"""A window of steps under JAX's profiler, by config: for TensorBoard, XProf and Perfetto.

STAGE/profile holds what `tensorboard --logdir` (with the profile plugin) reads, and
perfetto_trace.json.gz for https://ui.perfetto.dev.
"""

import os
from typing import Any

import jax
from absl import logging

FOLDER = "profile"


class Window:
  """Starts and stops the profiler of process 0 at the steps that the config names."""

  def __init__(self, folder: str, start: int, steps: int):
    """`start` is the first step in the window, from 1; 0: no window."""
    self._folder = os.path.join(folder, FOLDER)
    self._first, self._last = start, start + steps - 1
    self._wanted = start > 0 and jax.process_index() == 0
    self._open = False

  def __enter__(self) -> "Window":
    return self

  def __exit__(self, *unused) -> None:
    if self._open:
      self._stop()

  def before(self, step: int) -> None:
    """Step number `step` (from 1) is about to be queued."""
    if self._wanted and step == self._first:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._open = True

  def after(self, step: int, outputs: Any) -> None:
    """It was queued."""
    if not self._open or step < self._last:
      return
    jax.block_until_ready(outputs)
    self._stop()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._open = False
    logging.info("profile of steps %d to %d in %s", self._first, self._last, self._folder)
