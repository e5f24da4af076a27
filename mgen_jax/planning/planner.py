"""A plan: one bucket of one stage on one topology, trained or sampled, compiled, read and weighed.

Joins the parts of this package into one record that is saved as JSON. Not here: flags and files
(`mgen_jax/plan.py`), how a plan is shown (`report.py`).
"""

import dataclasses
from typing import Any

import jax

from mgen_jax.config import Experiment, TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.planning import compile as compile_lib
from mgen_jax.planning import costs as costs_lib
from mgen_jax.planning import estimate, gathers, hlo, sampling
from mgen_jax.planning import roofline as roofline_lib
from mgen_jax.planning.chips import GIB
from mgen_jax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step needs and how fast it can be. `record` is its JSON (see docs/planning.md)."""

  record: dict[str, Any]
  memory: compile_lib.Memory
  costs: costs_lib.Costs | None  # None: the compiler refused the program

  @property
  def fits(self) -> bool:
    return self.record["fits"]

  def brief(self) -> str:
    """What is said of it while others are still compiled."""
    bound = self.record["step_seconds_bound"]
    said = f"{self.memory.total / GIB:.1f} GiB, {'fits' if self.fits else 'does not fit'}"
    return said if bound is None else f"{said}, bound {bound:.3g} s"


def make_plan(
  experiment: Experiment,
  name: str,
  bucket: Bucket,
  topology: Topology,
  devices: list[jax.Device],
  *,
  advise: bool = True,
) -> Plan:
  """Compiles the step of a stage for one bucket and says what it needs.

  Args:
    experiment: resolved.
    name: of a train stage.
    bucket: one of the stage's.
    topology: the hardware, and `devices`: of it.
    advise: where it does not fit, look for changes that are estimated to make it fit.

  Raises:
    ConfigError: the stage's mesh or batch does not divide over the devices.
  """
  stage: TrainStage = experiment.stages[name]
  task = compile_lib.train_task(experiment, name)
  job = compile_lib.train_job(experiment, name, bucket, topology, devices)
  batch = stage.batches()[bucket].batch
  here = estimate.current(stage, bucket, topology.size)
  about = {
    "experiment": experiment.name,
    "what": "train",
    "stage": name,
    "bucket": bucket.name,
    "remat": here.remat,
    "accumulate": here.accumulate,
    "batch": batch,
    "tokens": task.tokens(bucket),
  }
  plan = _weigh(about, _by_part(task, bucket, batch), job, topology)
  plan.record["largest_gather"] = _gather(plan.costs, stage, bucket, plan.record["mesh"])
  if not plan.fits and advise:
    bound = plan.record["step_seconds_bound"]
    estimator = estimate.Estimator(experiment, name, bucket, topology, plan.memory, bound)
    plan.record["changes"] = [
      {
        "change": str(choice),
        "flags": choice.flags(name, here),
        "estimated_total_gib": memory.total / GIB,
        "estimated_host_gib": memory.host / GIB,
      }
      for choice, memory in estimate.advice(
        estimator, stage, bucket, topology, memory_limit(topology)
      )
    ]
  return plan


def make_sample_plan(
  experiment: Experiment,
  name: str,
  bucket: Bucket,
  topology: Topology,
  devices: list[jax.Device],
  wanted: sampling.Sampling,
) -> Plan:
  """Compiles the program that draws a batch of samples from the model of a stage.

  Its "step" is the whole batch, from noise to latents.

  Args:
    experiment: resolved.
    name: of a train stage whose task can be sampled.
    bucket: any shape that the model can take.
    topology: the hardware, and `devices`: of it.
    wanted: mesh and number of samples.

  Raises:
    UserError: see `sampling.job`.
  """
  stage: TrainStage = experiment.stages[name]
  task = sampling.task_of(stage, name)
  job = sampling.job(stage, name, bucket, devices, wanted)
  seeds = job.arguments[-1]
  samples = seeds.shape[0]
  about = {
    "experiment": experiment.name,
    "what": "sample",
    "stage": name,
    "bucket": bucket.name,
    "remat": None,
    "accumulate": 1,
    "batch": samples,
    "tokens": task.tokens(bucket),
    "sampler": sampling.record(task, samples),
  }
  parts = task.sample_flops_by_part(bucket).items()
  plan = _weigh(about, {part: samples * flops for part, flops in parts}, job, topology)
  plan.record["notes"].append(sampling.NOTE)
  return plan


def _weigh(
  about: dict[str, Any], by_part: dict[str, float], job: compile_lib.Job, topology: Topology
) -> Plan:
  """Compiles a job and makes its record; `by_part`: FLOPs of the model, on all devices."""
  compiled = compile_lib.compile_job(job, topology)
  model_flops = sum(by_part.values())
  costs = None
  if compiled.hlo is not None:
    costs = costs_lib.costs_of(hlo.parse(compiled.hlo), dict(compiled.mesh.shape))
  roof = _roofline(costs, topology, compiled, model_flops)
  limit = memory_limit(topology)
  memory = compiled.memory
  record = {
    **about,
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": topology.size,
    "hosts": topology.hosts,
    "mesh": dict(compiled.mesh.shape),
    "fits": compiled.complaint is None and memory.total <= limit,
    "memory_gib": {k: v / GIB for k, v in compile_lib.memory_dict(memory).items()}
    | {"limit": limit / GIB, "margin": (limit - memory.total) / GIB},
    "model_flops": model_flops,
    "model_flops_by_part": by_part,
    "hlo_flops": costs.flops * topology.size if costs else None,
    "hbm_bytes": costs.bytes if costs else None,
    "collectives": [dataclasses.asdict(row) | {"axes": list(row.axes)} for row in roof.traffic],
    "largest_collectives": _largest(costs),
    "largest_gather": None,  # of a train step
    "step_seconds_bound": roof.bound,
    "step_seconds_terms": roof.terms,
    "critical": roof.critical,
    "step_seconds_serial": roof.serial,
    "mfu_range": list(roof.mfu_range) if roof.mfu_range else None,
    "lower_seconds": compiled.lower_seconds,
    "compile_seconds": compiled.compile_seconds,
    "stablehlo_lines": compiled.stablehlo_lines,
    "jax": jax.__version__,
    "notes": _notes(costs, compiled, memory.total / limit, model_flops / topology.size),
    "changes": [],
  }
  return Plan(record, memory, costs)


def memory_limit(topology: Topology) -> float:
  """Bytes that a program may use on one device; simulated devices share the host's memory."""
  if topology.chip.platform == "cpu":
    return compile_lib.host_memory() / topology.size
  return topology.chip.memory


def _roofline(
  costs: costs_lib.Costs | None,
  topology: Topology,
  compiled: compile_lib.Compiled,
  model_flops: float,
) -> roofline_lib.Roofline:
  if costs is not None:
    return roofline_lib.roofline(costs, topology, compiled.mesh.devices, model_flops)
  if not topology.chip.flops:
    return roofline_lib.Roofline({}, None, None, None, None, ())
  # No program to read: what the model needs at least.
  seconds = model_flops / (topology.size * topology.chip.flops)
  return roofline_lib.Roofline({"compute": seconds}, seconds, "compute", None, None, ())


def _largest(costs: costs_lib.Costs | None, count: int = 5) -> list[dict[str, Any]]:
  """The instructions that send most, with the place in the Python program they come from."""
  sending = [op for op in (costs.ops if costs else ()) if op.collective is not None]
  sending.sort(key=lambda op: -op.collective.wire * op.times)
  return [
    {
      "kind": op.collective.kind,
      "axes": list(op.collective.axes),
      "count": op.times,
      "wire": op.collective.wire * op.times,
      "source": op.source or op.name,
    }
    for op in sending[:count]
  ]


def _gather(costs, stage: TrainStage, bucket: Bucket, mesh: dict[str, int]) -> dict | None:
  """The largest all-gather beside the most that a layer needs (`gathers.py`)."""
  found = gathers.largest(costs) if costs else None
  return found and found | {"limit": gathers.limit(stage, bucket, mesh)}


def _by_part(task: Any, bucket: Bucket, batch: int) -> dict[str, float]:
  if not hasattr(task, "flops_by_part"):
    return {"model": batch * float(task.flops(bucket))}
  return {part: batch * float(flops) for part, flops in task.flops_by_part(bucket).items()}


def _notes(
  costs: costs_lib.Costs | None,
  compiled: compile_lib.Compiled,
  filled: float,
  model_flops: float,
) -> list[str]:
  """What a reader must know before trusting the figures.

  `filled`: share of the memory in use; `model_flops`: of one device.
  """
  notes = []
  if costs is not None and costs.flops < 0.9 * model_flops:
    notes.append(
      "The compiled program has fewer FLOPs than the model: some kernel could not be counted, and "
      "the bound of the step is too low."
    )
  if 0.93 < filled <= 1:
    notes.append(
      f"{100 * filled:.0f} % of the memory is in use: what the driver, the collectives' own "
      "buffers and fragmentation take may be more than what is left."
    )
  if compiled.complaint is not None:
    first = " ".join(compiled.complaint.split())[:300]
    notes.append(f"The compiler refused the program, so it could not be read: {first}")
  if costs is not None and costs.unknown_loops:
    notes.append(
      f"{len(costs.unknown_loops)} loops have no trip count that can be read and count once: "
      f"{', '.join(costs.unknown_loops[:3])}."
    )
  if costs is not None and costs.unknown_kernels:
    notes.append(f"Kernels counted as 0 FLOPs: {', '.join(costs.unknown_kernels)}.")
  return notes
