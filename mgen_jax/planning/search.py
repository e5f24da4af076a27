"""Tries meshes, remat policies and accumulations of a stage, and ranks them.

Every choice that divides evenly is estimated; the most promising ones are compiled, and only those
are ranked. Not here: the estimate itself (`estimate.py`).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from mgen_jax.config import Experiment, TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.planning import estimate, planner, sampling
from mgen_jax.planning.chips import GIB
from mgen_jax.planning.planner import Plan
from mgen_jax.planning.topologies import Topology

# What an estimate may be off by before a choice is left out for its memory.
_TOLERANCE = 1.15


# Plans what the flags of a choice say, in some other way than in this process (`apart.plan`).
PlanApart = Callable[[str], Plan]


@dataclasses.dataclass(frozen=True)
class Trial:
  """A choice that was compiled."""

  choice: estimate.Choice | str  # str: the mesh of a sampler
  flags: str  # that make the stage so
  plan: Plan
  estimated_gib: float | None  # None: nothing was estimated

  def seconds(self) -> float:
    """What trials are ranked by: between the bound and a step without any overlap; of a sampler
    for each sample, as meshes differ in how many they draw at a time."""
    record = self.plan.record
    each = record["sampler"]["count"] if "sampler" in record else 1
    if record["step_seconds_serial"] is None:  # no rates are known (cpu): the FLOPs must do
      return (record["hlo_flops"] or float("inf")) / each
    return (record["step_seconds_bound"] + record["step_seconds_serial"]) / 2 / each

  def record(self) -> dict[str, Any]:
    """The line of the saved ranking."""
    keys = ("fits", "step_seconds_bound", "step_seconds_serial", "critical", "mfu_range")
    record = {key: self.plan.record[key] for key in keys}
    return record | {
      "batch": self.plan.record["batch"],
      "choice": str(self.choice),
      "flags": self.flags,
      "total_gib": self.plan.memory.total / GIB,
      "estimated_gib": self.estimated_gib,
      "host_gib": self.plan.memory.host / GIB,
      "hlo_flops": self.plan.record["hlo_flops"],
    }


def search(
  experiment: Experiment,
  name: str,
  bucket: Bucket,
  topology: Topology,
  devices: list[jax.Device],
  base: Plan,
  tries: int,
  *,
  apart: PlanApart | None = None,
  after_each: Callable[[list[Trial]], None] = lambda trials: None,
) -> list[Trial]:
  """Compiles the `tries` most promising choices; best first, those that fit before those that
  do not. The stage as it stands is one of them.

  Args:
    experiment: resolved.
    name: of a train stage.
    bucket: one of the stage's.
    topology: the hardware, and `devices`: of it.
    base: the plan of the stage as it stands; estimates are scaled from it.
    tries: programs to compile, the base not counted.
    apart: plans a choice; by default it is done here.
    after_each: is given the ranking so far, so that a search which is stopped leaves something.
  """
  stage: TrainStage = experiment.stages[name]
  here = estimate.current(stage, bucket, topology.size)
  estimator = estimate.Estimator(
    experiment, name, bucket, topology, base.memory, base.record["step_seconds_bound"]
  )
  trials = [Trial(here, here.flags(name, here), base, base.memory.total / GIB)]
  chosen = shortlist(estimator, stage, bucket, topology, here, tries)
  for number, (choice, memory) in enumerate(chosen, start=1):
    flags = choice.flags(name, here)
    where = f"{number} of {len(chosen)}: {choice}"
    logging.info("trying %s (estimate: %.1f GiB)", where, memory.total / GIB)
    began = time.perf_counter()
    try:
      if apart is not None:
        plan = apart(flags)
      else:
        changed = estimate.apply(experiment, name, choice)
        plan = planner.make_plan(changed, name, bucket, topology, devices, advise=False)
    except UserError as error:  # the model has a rule of its own about meshes or policies
      logging.warning("left out %s: %s", where, error)
      continue
    trials.append(Trial(choice, flags, plan, memory.total / GIB))
    logging.info("tried %s: %s, in %.0f s", where, plan.brief(), time.perf_counter() - began)
    after_each(rank(trials))
  return rank(trials)


def search_sampling(
  experiment: Experiment,
  name: str,
  bucket: Bucket,
  topology: Topology,
  devices: list[jax.Device],
  base: Plan,
  wanted: sampling.Sampling,
  tries: int,
  *,
  apart: PlanApart | None = None,
  after_each: Callable[[list[Trial]], None] = lambda trials: None,
) -> list[Trial]:
  """Plans sampling on up to `tries` other meshes than that of `base`; best first. `apart` and
  `after_each`: see `search`."""
  here = MeshConfig(**base.record["mesh"])
  trials = [_sampled(here, base)]
  for mesh in sampling.meshes(experiment.stages[name], name, bucket, topology):
    if mesh == here or (wanted.samples or mesh.fsdp) % mesh.fsdp:
      continue
    if len(trials) > tries:
      break
    where = f"{len(trials)} of {tries}: {sampling.flags(mesh)}"
    logging.info("trying %s", where)
    began = time.perf_counter()
    if apart is not None:
      plan = apart(sampling.flags(mesh))
    else:
      changed = dataclasses.replace(wanted, mesh=mesh)
      plan = planner.make_sample_plan(experiment, name, bucket, topology, devices, changed)
    trials.append(_sampled(mesh, plan))
    logging.info("tried %s: %s, in %.0f s", where, plan.brief(), time.perf_counter() - began)
    after_each(rank(trials))
  return rank(trials)


def _sampled(mesh: MeshConfig, plan: Plan) -> Trial:
  flags = sampling.flags(mesh)
  return Trial(flags.removeprefix("--mesh="), flags, plan, None)


def shortlist(
  estimator: estimate.Estimator,
  stage: TrainStage,
  bucket: Bucket,
  topology: Topology,
  here: estimate.Choice,
  tries: int,
) -> list[tuple[estimate.Choice, Any]]:
  """The choices to compile: estimated to fit, in the order of estimated time, at most a third of
  them on one mesh, so that a search never looks at one idea only."""
  limit = planner.memory_limit(topology) * _TOLERANCE
  entries = []
  for choice in estimate.choices(stage, bucket, topology):
    memory = estimator.memory(choice)
    if choice != here and memory.total <= limit:
      seconds = estimator.seconds(choice)
      entries.append((memory.total if seconds is None else seconds, choice, memory))
  entries.sort(key=lambda entry: entry[0])
  taken: dict[tuple[int, ...], int] = {}
  found = []
  for _, choice, memory in entries:
    if taken.get(choice.mesh, 0) < max(1, tries // 3):
      taken[choice.mesh] = taken.get(choice.mesh, 0) + 1
      found.append((choice, memory))
  return found[:tries]


def rank(trials: list[Trial]) -> list[Trial]:
  """Those that fit first, each group by time."""
  return sorted(trials, key=lambda trial: (not trial.plan.fits, trial.seconds()))
