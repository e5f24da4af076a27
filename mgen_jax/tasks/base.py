"""The Task protocol: what a capability must say so that one loop, one planner and one sampler
serve it. No task is in here."""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from mgen_jax.data.buckets import Bucket


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """One entry of a batch: its shape (batch first), dtype and logical axis names."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str | None, ...]


class Task(Protocol):
  """WHAT is learned. A task holds its config and modules, never arrays.

  All methods but `prepare` are pure and traceable. `keys` holds one random key for each example,
  so that the noise of an example depends neither on the mesh nor on gradient accumulation.
  """

  config: Any
  source: Literal["media", "latents"]  # what kind of records it learns from

  def init(self, key: jax.Array) -> Any:
    """Random parameters, in boxes that carry logical axis names."""

  def adapt(self, params: Any, fresh: Any) -> Any:
    """Parameters of an earlier stage for this task's model, which may be larger.

    `fresh` are parameters of this model at its start, both bare trees; shapes that still differ
    afterwards are a fault of the user's.
    """

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over the batch and scalar metrics. `keys` is [batch]."""

  # A task whose losses change with the step, or that has several players, also has
  # `loss_at(params, batch, keys, step) -> (losses by player, metrics)`, which training descends in
  # place of `loss`: each player's loss has a gradient for its own part of the parameters only. One
  # with parts that come from files has `pretrained(have) -> arrays by name`, and one with parts
  # that are never trained names them in `untrained`.

  # A task whose loss is an average over times (noise levels) also has `time_bins(count)`, times
  # evenly spread over its own with the share of the training's draws that falls to each, and
  # `losses_at(params, batch, keys, times)`, the loss of each example at a time of its own, without
  # dropout, both [B]: validation looks at them.

  def sample(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array, bucket: Bucket, **options: Any
  ) -> jax.Array:
    """What the task makes of its conditions, one result for each key."""

  def batch_spec(self, bucket: Bucket, examples: int) -> dict[str, ArraySpec]:
    """The entries of a batch of `examples` examples of a bucket."""

  def flops(self, bucket: Bucket) -> float:
    """Exact model FLOPs of training on one example (forward and backward, no recomputation)."""

  # A task may also have frozen parameters, which a step reads and never changes (text encoders):
  # `frozen_shapes(mesh)`, shapes with shardings or None; `load_frozen(mesh)`, the arrays; and
  # `embed(frozen, batch)`, the batch as `loss` wants it. See `complete`.
  #
  # It may have `flops_by_part(bucket) -> dict[str, float]`, the parts of that sum: the
  # planner shows them.

  def tokens(self, bucket: Bucket) -> int:
    """Positions that the model works on for one example, the unit of tokens/s."""

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """Turns one record (see `data/records.py`) into its row of the batch, on the host."""


@runtime_checkable
class JointTask(Protocol):
  """A task that learns from images beside its clips."""

  def images(self, bucket: Bucket) -> int:
    """How many come beside one example of a bucket; "images" of what `prepare` is given."""


@runtime_checkable
class ImportTask(Protocol):
  """A task that can start from the weights of others."""

  def from_weights(self, flat: dict[str, np.ndarray], fresh: Any) -> Any:
    """Parameters from arrays by their names there; `fresh` are this task's own at its start.

    Raises UserError where they do not fit.
    """


def complete(task: Task, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The batch as the losses of a task want it; `frozen` None: it has no such parameters.

  What frozen parameters make is an input of the loss, outside of its gradient: cached or made here,
  it is the same training step.
  """
  return batch if frozen is None else task.embed(frozen, batch)


def frozen_shapes(task: Task, mesh: jax.sharding.Mesh | None) -> Any:
  """The frozen parameters of a task as shapes (with shardings on a mesh); None: it has none."""
  return task.frozen_shapes(mesh) if hasattr(task, "frozen_shapes") else None
