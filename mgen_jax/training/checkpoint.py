"""Checkpoints of a stage: state, data position and meta, saved as one, asynchronously, by Orbax.

A checkpoint is either whole or invisible: Orbax writes beside it and renames. Then the checksums of
its files are written (`checksums.py`), and compared before it is used. Nothing here falls back
silently: a checkpoint that cannot be read is named, and the run stops unless it was told to take
an older one. Checkpoints are ordered by step, never by a clock.
"""

import os
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from mgen_jax.errors import UserError
from mgen_jax.training import checksums
from mgen_jax.training.interrupt import lost_process
from mgen_jax.training.state import TrainState, with_layout

SET_ASIDE = "damaged"  # beside the folder: where `fall_back` moves what it passes over


class CheckpointError(UserError):
  """A checkpoint that cannot be written, read, or used by this run."""


class DamagedError(CheckpointError):
  """A checkpoint that is not what was written."""


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

  def __init__(
    self, folder: str, *, keep: int = 2, read_only: bool = False, fall_back: bool = False
  ):
    """Opens (and unless `read_only` makes) the folder.

    Args:
      folder: where the steps lie.
      keep: how many checkpoints stay; an older one goes only after a newer one is whole.
      read_only: never writes or deletes.
      fall_back: `restore` moves a damaged checkpoint out of the way and takes the one before.
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
    self._fall_back = fall_back
    self._pending: int | None = None
    self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}  # of what was read here, by step
    self._verified: set[int] = set()  # steps whose files have been compared with their checksums
    # One thread, in which each save ends: Orbax's commit, then our checksums.
    self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
    self._under_way: futures.Future | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if lost_process(error):  # a save that is under way lacks its part
      return
    if error is None:
      self.close()
      return
    try:  # a save that is under way still counts
      self.close()
    except CheckpointError as another:  # the fault that is under way is the one to hear about
      logging.error("%s", another)

  def latest_step(self) -> int | None:
    """The newest whole checkpoint, once the save under way has ended; None: there is none."""
    self.wait()
    return self._newest()

  def _newest(self) -> int | None:
    steps = [step for step in self._manager.all_steps() if step != self._pending]
    return max(steps, default=None)

  def go_back(self, step: int) -> int | None:
    """Deletes what is newer than the newest checkpoint of `step` or before; the oldest one stays.

    Returns:
      The step of the newest checkpoint that is left; None: there was none.
    """
    self.wait()
    steps = sorted(self._manager.all_steps())
    if not steps:
      return None
    target = max((s for s in steps if s <= step), default=steps[0])
    for newer in reversed(steps):  # the newest first: what is left has no gap at any time
      if newer > target:
        self._manager.delete(newer)
    return target

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
    self._verified.discard(step)
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._write_error(error) from error
    self._under_way = self._thread.submit(self._end_save, step)

  def wait(self) -> None:
    """Returns when the save under way is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    under_way, self._under_way = self._under_way, None
    if under_way is not None:
      try:
        under_way.result()
      except Exception as error:
        raise self._write_error(error) from error

  def _end_save(self, step: int) -> None:
    """In a thread of its own: Orbax's writing and commit, then the checksums."""
    self._manager.wait_until_finished()
    self._pending = None  # whole
    checksums.write(self._path(step), jax.process_index(), jax.process_count())

  def restore(self, shapes: TrainState, layout: TrainState) -> Restored:
    """Reads the newest checkpoint onto the devices, whatever mesh it was saved from.

    Args:
      shapes: the state as shapes and dtypes.
      layout: the sharding of each leaf.

    Raises:
      CheckpointError: there is none, it is damaged (and there is no older one, or it is not to be
        fallen back to), or it belongs to another model.
    """
    target = with_layout(shapes, layout)
    while True:
      step = self._existing(None)
      try:
        return self._restore(step, target)
      except DamagedError as error:
        if not self._fall_back or not [s for s in self._manager.all_steps() if s < step]:
          raise
        logging.error("%s It is passed over, as fall_back says.", error)
        self._set_aside(step)

  def _restore(self, step: int, target: TrainState) -> Restored:
    self.verify(step)
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
    self.verify(step)
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
    """Reads some of the averaged parameters, by name; `verify` first.

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
        found = reader.restore(self._path(step) / "state", args=args)
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

  def digest(self, step: int | None = None) -> tuple[int, str]:
    """The step of a checkpoint (the newest by default) and one checksum of all of it.

    Raises:
      CheckpointError: there is none or it is damaged.
    """
    step = self._existing(step)
    try:
      return step, checksums.digest(self._path(step))
    except (checksums.Damaged, OSError) as error:
      raise self._read_error(step, error) from error

  def close(self) -> None:
    """Waits for the save under way and lets the folder go."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
    try:
      self._manager.close()
    except Exception as error:  # of a save that failed: Orbax tells it once more
      raise self._write_error(error) from error

  def _path(self, step: int) -> Path:
    return Path(self.folder) / str(step)

  def verify(self, step: int | None = None) -> None:
    """Compares the files with their checksums, once; all processes come to the same end."""
    step, damage = self._existing(step), None
    if step in self._verified:
      return
    try:
      checksums.verify(self._path(step), jax.process_index(), jax.process_count())
    except (checksums.Damaged, OSError) as error:
      damage = error
    if jax.process_count() > 1:
      seen = multihost_utils.process_allgather(np.int32(damage is not None))
      if seen.any() and damage is None:
        damage = checksums.Damaged(f"says process {int(np.argmax(seen))}")
    if damage is not None:
      raise self._read_error(step, damage)
    self._verified.add(step)

  def _set_aside(self, step: int) -> None:
    """Moves a checkpoint out of the way; nothing is deleted."""
    if jax.process_index() == 0:
      place = Path(self.folder).parent / SET_ASIDE / str(step)
      while place.exists():
        place = place.with_name(place.name + "-again")
      place.parent.mkdir(parents=True, exist_ok=True)
      os.rename(self._path(step), place)
    multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
    self._manager.reload()

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

  def _read_error(self, step: int, error: Exception) -> DamagedError:
    older = [s for s in self._manager.all_steps() if s < step]
    fix = "to start this stage again"
    if older:
      fix = f"(or set fall_back) to go back to step {max(older)}"
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return DamagedError(
      f"checkpoint {self.folder}/{step} is damaged ({first_line}): restore that folder from a "
      f"copy, or delete it {fix}."
    )

  def _write_error(self, error: Exception) -> CheckpointError:
    good = self._newest()
    what = f"checkpoint {self.folder}/{self._pending}"
    if self._pending is None:
      what = f"the list of checksums of checkpoint {self.folder}/{good}"
    kept = f"the checkpoint of step {good} is whole" if good is not None else "no other one exists"
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
      f"{what} could not be written ({first_line}); {kept}: make room on that disk and run the "
      "same command again."
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
