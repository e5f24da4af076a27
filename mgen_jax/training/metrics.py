"""What a run tells: JSON lines and TensorBoard always, a bar on a terminal or plain lines else.

Each logged line answers questions (does it learn, how fast, what does it wait for, how much
memory), over the steps since the line before. Not here: what is measured by the task (its loss
returns that) and plots.
"""

import hashlib
import json
import os
import resource
import sys
from typing import Any

import jax
import tensorboardX
from absl import logging
from rich import console, progress

from mgen_jax.data import files
from mgen_jax.errors import UserError

FILE_NAME = "metrics.jsonl"


class Metrics:
  """Writes the metrics of one stage. Only process 0 writes; the others may call all the same."""

  def __init__(
    self,
    folder: str,
    stage: str,
    *,
    steps: int,
    start_step: int,
    wandb_project: str | None = None,
  ):
    """Opens the writers.

    Args:
      folder: of the stage; lines of steps after `start_step` (from a run that was cut off after
        its last checkpoint) are dropped, so that the file has one line for each step.
      stage: name, for the display.
      steps: of the whole stage.
      start_step: steps done before.
      wandb_project: Weights & Biases gets the same lines; None: it is not used.

    Raises:
      UserError: W&B is asked for and not installed.
    """
    self._stage = stage
    self._steps = steps
    self._active = jax.process_index() == 0
    self._bar = self._wandb = None
    if not self._active:
      return
    if wandb_project is not None:
      self._wandb = _start_wandb(folder, stage, wandb_project)
    self._path = os.path.join(folder, FILE_NAME)
    _keep_until(self._path, start_step)
    self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (`close` does)
    self._board = tensorboardX.SummaryWriter(
      os.path.join(folder, "tensorboard"),
      purge_step=start_step + 1 if start_step else None,
      max_queue=0,  # no limit: its thread dies of a full disk, and a full queue would wait for it
    )
    if sys.stderr.isatty():
      self._bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[line]}"),
        console=console.Console(stderr=True),
      )
      self._bar_task = self._bar.add_task(stage, total=steps, completed=start_step, line="")
      self._bar.start()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def advance(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(self._bar_task, completed=step)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line; `values` are numbers or None (not known)."""
    if not self._active:
      return
    line = {"step": step, **values}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, int | float) and not isinstance(value, bool):
        self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(line)
    text = describe(values)
    if self._bar is not None:
      self._bar.update(self._bar_task, completed=step, line=text)
    else:
      logging.info("%s %d/%d %s", self._stage, step, self._steps, text)

  def close(self) -> None:
    """Flushes and closes the writers."""
    if not self._active:
      return
    if self._bar is not None:
      self._bar.stop()
    self._file.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def describe(values: dict[str, Any]) -> str:
  """The line for people: a few of the values, rounded."""
  shown = []
  for name, form in (
    ("loss", "loss {:.4f}"),
    ("validation_loss", "validation {:.4f}"),
    ("grad_norm", "grad {:.2f}"),
    ("examples_per_second", "{:.1f} examples/s"),
    ("mfu", "MFU {:.1%}"),
    ("data_wait", "data wait {:.0%}"),
    ("goodput", "goodput {:.0%}"),
    ("peak_memory_gib", "{:.1f} GiB"),
  ):
    if values.get(name) is not None:
      shown.append(form.format(values[name]))
  return " | ".join(shown)


def peak_memory_gib() -> float:
  """Peak memory of the fullest local device; of this process where devices do not say (CPU)."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
  if not peak:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return peak / 2**30


def read(folder: str) -> list[dict[str, Any]]:
  """The lines of a stage, in order; none if it has not logged yet."""
  return files.read_json_lines(os.path.join(folder, FILE_NAME))


def _start_wandb(folder: str, stage: str, project: str) -> Any:
  """A run of Weights & Biases that is the same one whenever this folder is trained on.

  Steps are a metric of their own and not W&B's, which may not go back to a checkpoint. Offline is
  W&B's own switch (WANDB_MODE=offline).
  """
  try:
    import wandb
  except ImportError as error:
    raise UserError(
      f"config.stages.{stage}.observe.wandb is {project!r}, but wandb is not installed: run "
      'pip install -e ".[wandb]", or unset it.'
    ) from error
  identity = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
  run = wandb.init(project=project, name=stage, id=identity, resume="allow", dir=folder)
  run.define_metric("step")
  run.define_metric("*", step_metric="step")
  return run


def _keep_until(path: str, step: int) -> None:
  """Drops lines after `step`, and a last line that was cut short."""
  if not os.path.exists(path):
    return
  kept = [line for line in read(os.path.dirname(path)) if line["step"] <= step]
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(line) + "\n" for line in kept)
  os.replace(path + ".tmp", path)
