"""The keys of a train stage that say how it is trained: optimizer, schedule, averages, adapters.

Not here: what is trained on which data (see `stages.py`) and the code that does it (`training/`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from mgen_jax.errors import ConfigError, check_ranges


@dataclasses.dataclass(frozen=True)
class PlateauConfig:
  """When the validation loss counts as flat, and what then happens to the learning rate.

  Movie Gen lowers its rate at each plateau (section 3.2.2, Table 3) and gives no rule for what a
  plateau is: this one is ours.
  """

  factor: float = 0.5  # of the learning rate, at each plateau
  patience: int = 3  # validations in a row without progress
  threshold: float = 0.002  # progress is a loss below (1 - threshold) times the best one
  floor: float = 0.01  # the rate never falls below this share of what it started with

  def __post_init__(self):
    if not 0 < self.factor < 1:
      raise ConfigError(f"factor is {self.factor}: it must lie between 0 and 1.")
    if self.patience < 1:
      raise ConfigError(f"patience is {self.patience}: it must be 1 or more.")
    if not 0 <= self.threshold < 1 or not 0 <= self.floor <= 1:
      raise ConfigError("threshold must lie in [0, 1) and floor in [0, 1].")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with a clipped gradient and a schedule.

  The papers state learning rates (movie_gen 4.4) and neither betas, weight decay nor clipping:
  the defaults are what the field uses for transformers of this kind.
  """

  # "muon" orthogonalises the updates of matrices and leaves the rest to Adam.
  name: Literal["adamw", "muon"] = "adamw"
  lr: float = 1e-4  # peak learning rate
  muon_lr: float = 0.02  # of the matrices under muon, on the same schedule
  # Matrices that muon leaves to Adam too, by name, * for anything ("latte/patch_in"): it makes
  # every matrix grow alike, and a first one that has grown drowns positions that are not learned.
  adam: tuple[str, ...] = ()
  # After the warm-up. "steps" changes it at fixed steps (`lr_steps`), "plateau" lowers it whenever
  # the validation loss is flat (`plateau`; needs validate_every).
  schedule: Literal["constant", "cosine", "linear", "steps", "plateau"] = "constant"
  warmup_steps: int = 0  # linear, from 0
  end_factor: float = 0.0  # the schedule ends at lr * end_factor (cosine and linear)
  lr_steps: tuple[tuple[int, float], ...] = ()  # ((step, learning rate from there on), ...)
  plateau: PlateauConfig = PlateauConfig()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0  # decoupled; for matrices only (not norms, biases, tables of vectors)
  clip_norm: float = 1.0  # global norm of the gradient; 0 switches clipping off
  clip_from: int = 0  # the first step whose gradient is clipped

  def __post_init__(self):
    check_ranges(
      self,
      natural=(
        *("lr", "muon_lr", "warmup_steps", "end_factor", "eps", "weight_decay"),
        *("clip_norm", "clip_from"),
      ),
    )
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}: it must lie in [0, 1).")
    if self.adam and self.name != "muon":
      raise ConfigError(f'adam is {self.adam}: it is of name "muon", which leaves them to Adam.')
    if bool(self.lr_steps) != (self.schedule == "steps"):
      raise ConfigError(
        f'lr_steps is {self.lr_steps} and schedule is "{self.schedule}": give steps for "steps", '
        "and for no other."
      )
    check_changes("lr_steps", self.lr_steps, after=self.warmup_steps - 1)
    if self.lr_steps and not self.lr:
      raise ConfigError("lr is 0: the rates of lr_steps are reached from it.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (Hu et al., 2021): only W + (alpha / rank) A B's A and B are trained."""

  rank: int = 0  # 0: none
  alpha: float | None = None  # None: as the rank
  # Paths of kernels, as in WORKDIR's log and in `frozen`; * stands for anything.
  kernels: tuple[str, ...] = ("*attention/*/kernel",)
  # Whether checkpoints hold the base as well. Without, they name the stage that it comes from with
  # its checksum, and cannot be used when that is gone; a base of no stage, or one that was grown to
  # this model, is always held.
  save_base: bool = False

  def __post_init__(self):
    if self.rank < 0:
      raise ConfigError(f"rank is {self.rank}: it cannot be negative (0: no adapters).")
    if self.rank and not self.kernels:
      raise ConfigError("kernels is empty: name those that get an adapter, or set rank to 0.")
    check_ranges(self, positive=("alpha",))


@dataclasses.dataclass(frozen=True)
class PartConfig:
  """How one of several sets of data takes part in a stage."""

  # Its share of the examples is weight / sum of the weights; 0: all have their size as weight.
  weight: float = 0.0
  from_step: int = 0  # the first step that draws from it
  until_step: int | None = None  # the first that no longer does; None: it stays

  def __post_init__(self):
    if self.weight < 0 or self.from_step < 0:
      raise ConfigError(
        f"weight is {self.weight} and from_step {self.from_step}: neither can be negative."
      )
    if self.until_step is not None and self.until_step <= self.from_step:
      raise ConfigError(
        f"until_step is {self.until_step}: it must come after from_step {self.from_step}."
      )

  def at(self, step: int) -> bool:
    """Whether it is drawn from at a step."""
    return self.from_step <= step and (self.until_step is None or step < self.until_step)


def check_changes(name: str, changes: Sequence[tuple[int, Any]], after: int = 0) -> None:
  """Raises ConfigError for (step, value) pairs that do not rise, or values that are not above 0."""
  for step, value in changes:
    if step <= after:
      raise ConfigError(
        f"{name} has step {step} after {after}: its steps must rise (and lie after the warm-up)."
      )
    if value <= 0:
      raise ConfigError(f"{name} has {value} at step {step}: it must be more than 0.")
    after = step
