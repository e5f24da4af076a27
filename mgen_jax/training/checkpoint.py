"""Checkpoints of a stage: state, data position and meta, saved as one, asynchronously, by Orbax.

A checkpoint is either whole or invisible: Orbax writes beside it and renames. Nothing here falls
back silently: a checkpoint that cannot be read is named, and the run stops.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from mgen_jax.errors import UserError
from mgen_jax.training.state import TrainState, with_layout


class CheckpointError(UserError):
  """A checkpoint that cannot be written, read, or used by this run."""


class Restored(NamedTuple):
  """What a checkpoint held."""

  step: int
  state: TrainState
  data: dict[str, Any]  # position and identity of the data stream
  meta: dict[str, Any]  # what the run needs to be understood later


# Orbax and TensorStore raise plain `Exception` for a data file that is cut short, and several
# other types for damaged metadata: whatever they raise is passed on, with the folder named.


class Checkpoints:
  """The checkpoints of one stage, in `folder`/<step>/."""

  def __init__(self, folder: str, *, keep: int = 2, read_only: bool = False):
    """Opens (and unless `read_only` makes) the folder.

    Args:
      folder: where the steps lie.
      keep: how many checkpoints stay; an older one goes only after a newer one is whole.
      read_only: never writes or deletes.
    """
    self.folder = os.path.abspath(folder)
    if read_only:
      options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
      options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    # Handlers by name, so that metadata can be read before anything is restored.
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
    self._pending: int | None = None
    self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}  # of what was read here, by step

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if error is None:
      self.close()
      return
    try:  # a save that is under way still counts
      self.close()
    except CheckpointError as another:  # the fault that is under way is the one to hear about
      logging.error("%s", another)

  def latest_step(self) -> int | None:
    """The newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Raises:
      CheckpointError: this save could not start or the one before it failed (full disk).
    """
    self.wait()
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(meta),
    )
    self._pending = step
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._write_error(error) from error

  def wait(self) -> None:
    """Returns when the save under way is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._write_error(error) from error
    self._pending = None

  def restore(self, shapes: TrainState, layout: TrainState, step: int | None = None) -> Restored:
    """Reads a checkpoint onto the devices, whatever mesh it was saved from.

    Args:
      shapes: the state as shapes and dtypes.
      layout: the sharding of each leaf.
      step: which; the newest by default.

    Raises:
      CheckpointError: there is none, it is damaged, or it belongs to another model.
    """
    step = self._existing(step)
    target = with_layout(shapes, layout)
    self._check_shapes(step, target)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(target),
      data=ocp.args.JsonRestore(),
      meta=ocp.args.JsonRestore(),
    )
    try:
      items = self._manager.restore(step, args=args)
    except Exception as error:
      raise self._read_error(step, error) from error
    return Restored(step, items["state"], items["data"], items["meta"])

  def restore_ema(self, shapes: Any, layout: Any, step: int | None = None) -> Any:
    """Reads only the averaged parameters: for sampling and for the start of a later stage.

    Those that have no average (they were not trained, or the stage keeps none) are read as they
    are.

    Args:
      shapes: the parameters as shapes and dtypes.
      layout: the sharding of each.
      step: which; the newest by default.

    Raises:
      CheckpointError: there is none, it is damaged, or it belongs to another model.
    """
    step = self._existing(step)
    wanted = traverse_util.flatten_dict(with_layout(shapes, layout), sep="/")
    saved = self._saved_shapes(step)
    averaged = {name.removeprefix("ema/") for name in saved if name.startswith("ema/")}
    names = averaged | {n.removeprefix("params/") for n in saved if n.startswith("params/")}
    self._refuse_other(
      step,
      {n: saved[f"ema/{n}" if n in averaged else f"params/{n}"] for n in names},
      {name: tuple(leaf.shape) for name, leaf in wanted.items()},
    )
    return traverse_util.unflatten_dict(self.restore_tensors(wanted, step), sep="/")

  def restore_tensors(
    self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None
  ) -> dict[str, jax.Array]:
    """Reads some of the averaged parameters, by name.

    Args:
      wanted: shapes, dtypes and shardings by name, all of which the checkpoint has.
      step: which; the newest by default.

    Raises:
      CheckpointError: there is none or it is damaged.
    """
    step = self._existing(step)
    saved = self._saved_shapes(step)
    group = {name: "ema" if f"ema/{name}" in saved else "params" for name in wanted}
    target = traverse_util.unflatten_dict(
      {f"{group[name]}/{name}": leaf for name, leaf in wanted.items()}, sep="/"
    )
    args = ocp.args.PyTreeRestore(
      item=target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(os.path.join(self.folder, str(step), "state"), args=args)
    except Exception as error:
      raise self._read_error(step, error) from error
    flat = traverse_util.flatten_dict(found, sep="/")
    return {name: flat[f"{group[name]}/{name}"] for name in wanted}

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """The meta of a checkpoint, without its arrays.

    Raises:
      CheckpointError: there is none or it is damaged.
    """
    step = self._existing(step)
    try:
      items = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    except Exception as error:
      raise self._read_error(step, error) from error
    return items["meta"]

  def close(self) -> None:
    """Waits for the save under way and lets the folder go."""
    self.wait()
    self._manager.close()

  def _existing(self, step: int | None) -> int:
    step = self.latest_step() if step is None else step
    if step is None or step not in self._manager.all_steps():
      raise CheckpointError(
        f"no checkpoint{'' if step is None else f' of step {step}'} in {self.folder}: run its "
        "stage first, or name another --workdir."
      )
    return step

  def _check_shapes(self, step: int, target: Any) -> None:
    """Compares names and shapes before any array is read."""
    self._refuse_other(step, self._saved_shapes(step), _shapes_by_name(target))

  def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    if step in self._shapes:
      return self._shapes[step]
    try:
      tree = self._manager.item_metadata(step)["state"]
    except Exception as error:
      raise self._read_error(step, error) from error
    if tree is None:
      raise self._read_error(step, FileNotFoundError("its state is missing"))
    self._shapes[step] = _shapes_by_name(tree)
    return self._shapes[step]

  def _refuse_other(
    self, step: int, saved: Mapping[str, tuple], wanted: Mapping[str, tuple]
  ) -> None:
    differ = [
      f"{name}: {saved.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} here"
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)
    ]
    if differ:
      more = f" (and {len(differ) - 5} more)" if len(differ) > 5 else ""
      raise CheckpointError(
        f"checkpoint {self.folder}/{step} belongs to another model: {'; '.join(differ[:5])}{more}; "
        "use the config it was trained with, or another --workdir."
      )

  def _read_error(self, step: int, error: Exception) -> CheckpointError:
    older = [s for s in self._manager.all_steps() if s < step]
    fix = f"to go back to step {max(older)}" if older else "to start this stage again"
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
      f"checkpoint {self.folder}/{step} is damaged ({first_line}): restore that folder from a "
      f"copy, or delete it {fix}."
    )

  def _write_error(self, error: Exception) -> CheckpointError:
    good = [s for s in self._manager.all_steps() if s != self._pending]
    kept = f"the checkpoint of step {max(good)} is whole" if good else "no earlier one exists"
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
      f"checkpoint {self.folder}/{self._pending} could not be written ({first_line}); {kept}: make "
      "room on that disk and run the same command again."
    )


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of the leaves by path; attribute and dict paths read alike, empty nodes are left out."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {}
  for path, leaf in leaves:
    if hasattr(leaf, "shape"):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      named[name] = tuple(leaf.shape)
  return named
