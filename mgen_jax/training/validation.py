"""The loss on held-out data, always on the same examples, noise and times: as one figure, and as a
curve over the times (movie_gen 6.3: it follows what people judge).

The figure of a generator is the mean over its times, weighted as training draws them, so that it
can be held against the training loss. Not here: what is done with it (`plateau.py`, the loop).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure

from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import rules
from mgen_jax.tasks.base import Task, complete
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training import step as step_lib

LOSS = "validation_loss"
AT = LOSS + "_t"  # and the time, like validation_loss_t0.06
PICTURE_NAME = "validation.png"
_CURVES = 6  # in the picture: the first, the last, and some between

Rows = tuple[Bucket, dict[str, np.ndarray]]


class Validator:
  """Measures parameters on held-out data; compiled once for each shape of a batch, ahead with
  `compile`, or else when it first comes."""

  def __init__(self, task: Task, mesh: jax.sharding.Mesh, *, seed: int, bins: int):
    """`bins`: times to look at; 0, or of a task without times: as training draws them."""
    self._timed = bins > 0 and hasattr(task, "time_bins")
    self._mesh = mesh
    self._program = jax.jit(
      _timed_program(task, seed, bins) if self._timed else _drawn_program(task, seed),
      out_shardings=rules.replicated(mesh),
    )
    self._times, self._weights = task.time_bins(bins) if self._timed else (None, None)
    self._compiled: dict[tuple[Bucket, int], Callable[..., jax.Array]] = {}

  def compile(
    self, params: Any, batches: Mapping[tuple[Bucket, int], Mapping[str, Any]], *frozen: Any
  ) -> None:
    """Compiles for batches of these shapes, so that the first validation need not.

    Args:
      params: arrays, or shapes with shardings.
      batches: likewise, of each bucket and number of examples.
      frozen: parameters that complete a batch, if the task has such.
    """
    start = np.int32(0)
    lowered = {
      key: self._program.lower(params, dict(rows), start, start, *frozen)
      for key, rows in batches.items()
    }
    self._compiled |= step_lib.compile_side_by_side(lowered, self._mesh)

  def __call__(
    self,
    params: Any,
    batches: Iterator[Rows],
    put: Callable[[Bucket, Mapping[str, np.ndarray]], Any],
    *frozen: Any,
  ) -> dict[str, float]:
    """The metrics of some parameters.

    Args:
      params: averaged, if there is an average.
      batches: held-out examples, the same at every call.
      put: a host's rows of a batch onto the devices.
      frozen: parameters that complete a batch, if the task has such.

    Returns:
      {"validation_loss"} and of a generator "validation_loss_t..." for each time.
    """
    found, seen = [], 0
    for index, (bucket, rows) in enumerate(batches):
      examples = len(next(iter(rows.values()))) * jax.process_count()
      key, batch = (bucket, examples), put(bucket, rows)
      if key not in self._compiled:
        self.compile(params, {key: batch}, *frozen)
      found.append(self._compiled[key](params, batch, np.int32(index), np.int32(seen), *frozen))
      seen += examples
    found = jax.device_get(found)
    if not self._timed:
      return {LOSS: float(np.mean(found))}
    sums, counts = np.sum(found, axis=0, dtype=np.float64)  # [bins] each
    measured = counts > 0  # few examples do not reach all times
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=measured)
    weights = self._weights * measured
    curve = {
      f"{AT}{t:.3g}": float(m) for t, m, ok in zip(self._times, means, measured, strict=True) if ok
    }
    return {LOSS: float(np.nansum(weights * means) / weights.sum()), **curve}


def _drawn_program(task: Task, seed: int) -> Callable[..., jax.Array]:
  def program(params, batch, index, seen, frozen=None):
    del seen
    examples = jax.tree.leaves(batch)[0].shape[0]
    keys = state_lib.example_keys(seed, "validation", index, examples)
    return task.loss(params, complete(task, frozen, batch), keys)[0]

  return program


def _timed_program(task: Task, seed: int, bins: int) -> Callable[..., jax.Array]:
  """Sums of losses and numbers of examples at each time, [2, bins]."""
  times = np.asarray(task.time_bins(bins)[0], np.float32)

  def program(params, batch, index, seen, frozen=None):
    examples = jax.tree.leaves(batch)[0].shape[0]
    keys = state_lib.example_keys(seed, "validation", index, examples)
    # One time for each example: the curve costs no more than the figure.
    which = (seen + jnp.arange(examples)) % bins
    losses = task.losses_at(params, complete(task, frozen, batch), keys, jnp.asarray(times)[which])
    hits = jax.nn.one_hot(which, bins, dtype=jnp.float32)  # [B, bins]
    return jnp.stack([losses @ hits, hits.sum(0)])

  return program


def draw(folder: str) -> Path | None:
  """The picture of a stage's validations, from its metrics: loss by step, and by time.

  Returns:
    Its path; None where nothing was validated yet.
  """
  lines = [line for line in metrics_lib.read(folder) if LOSS in line]
  if not lines:
    return None
  made = figure.Figure(figsize=(10, 4), layout="constrained")
  by_step, by_time = made.subplots(1, 2)
  by_step.plot([line["step"] for line in lines], [line[LOSS] for line in lines], marker=".")
  by_step.set(xlabel="step", ylabel="loss on held-out data", title="over the stage")
  by_step.grid(alpha=0.3)
  for index in sorted({round(i) for i in np.linspace(0, len(lines) - 1, _CURVES)}):
    curve = {float(k.removeprefix(AT)): v for k, v in lines[index].items() if k.startswith(AT)}
    label = f"step {lines[index]['step']}"
    by_time.plot(list(curve), list(curve.values()), marker="o", label=label)
  by_time.set(xlabel="time t", ylabel="loss", title="by time, same noise")
  by_time.grid(alpha=0.3)
  by_time.legend()
  path = Path(folder) / PICTURE_NAME
  made.savefig(path, dpi=100)
  return path
