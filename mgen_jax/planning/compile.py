"""Compiles a program for a topology, from shapes alone: no array is ever made.

`train_job` is the step that the loop would run (`training.program.make_program`): loss, gradients,
accumulation, optimizer, EMA, donation, on the mesh of the stage for that number of devices. Not
here: what else can be planned (`sampling.py`), what the compiled program says (`hlo.py`) and how
long it may take (`roofline.py`).
"""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax

from mgen_jax import config as config_lib
from mgen_jax import tasks
from mgen_jax.config import Experiment, TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.planning.topologies import Topology
from mgen_jax.tasks.base import Task, frozen_shapes
from mgen_jax.training import program as program_lib
from mgen_jax.training import state as state_lib

# Kernels are timed against each other on a GPU that is here; without one the defaults are taken.
_GPU_OPTIONS = {"xla_gpu_autotune_level": "0"}

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device, by what they are for. `total` is what must fit the device.

  `state`: parameters, optimizer and EMA come from shapes and shardings alone; `temp` holds
  activations, gradients and work space, and what the compiler pads the arguments by.
  """

  parameters: int
  optimizer: int
  ema: int
  batch: int
  temp: int
  code: int
  host: int  # of the host's memory, for this device (offloaded activations)
  frozen: int = 0  # parameters that no step changes (text encoders)

  @property
  def total(self) -> int:
    state = self.parameters + self.optimizer + self.ema + self.frozen
    return state + self.batch + self.temp + self.code


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be compiled."""

  mesh: jax.sharding.Mesh
  program: Any  # jitted
  arguments: tuple[Any, ...]  # trees of shapes with shardings
  sizes: dict[str, int]  # bytes of one device by the parts of `Memory` that are arguments


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program, compiled or (`hlo` is None) found not to fit by the compiler itself."""

  mesh: jax.sharding.Mesh
  memory: Memory
  hlo: str | None
  complaint: str | None  # the compiler's words where it does not fit
  stablehlo_lines: int
  lower_seconds: float
  compile_seconds: float


def train_job(
  experiment: Experiment, name: str, bucket: Bucket, topology: Topology, devices: list[jax.Device]
) -> Job:
  """The step of stage `name` for one bucket.

  Args:
    experiment: resolved.
    name: of a train stage.
    bucket: one of its buckets.
    topology: what is planned for.
    devices: of the topology.

  Raises:
    ConfigError: a mesh that does not fit the devices, a batch that does not divide.
  """
  only = dataclasses.replace(experiment, recipe=(name,))
  config_lib.check_devices(only, len(devices), topology.hosts)
  stage: TrainStage = experiment.stages[name]
  task = tasks.make(stage.task)
  mesh = mesh_lib.make_mesh(stage.mesh, devices)
  program = program_lib.make_program(task, stage, mesh, experiment.seed)
  state = state_lib.with_layout(program.shapes, program.layout)
  batch = program_lib.batch_shapes(task, {bucket: stage.batches()[bucket].batch}, mesh)[bucket]
  frozen = frozen_shapes(task, mesh)
  sizes = state_bytes(state) | {"batch": tree_bytes(batch), "frozen": tree_bytes(frozen)}
  arguments = (state, batch) if frozen is None else (state, batch, frozen)
  return Job(mesh, program.train_step, arguments, sizes)


def compile_job(job: Job, topology: Topology) -> Compiled:
  """Lowers and compiles a program for the hardware of its mesh."""
  began = time.perf_counter()
  with mesh_lib.use(job.mesh):
    lowered = job.program.lower(*job.arguments)
  lines = lowered.as_text().count("\n")
  lowered_at = time.perf_counter()
  compiled, complaint = None, None
  try:
    with mesh_lib.use(job.mesh):
      options = _GPU_OPTIONS if topology.chip.platform == "gpu" else None
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    complaint = str(error)
    if "RESOURCE_EXHAUSTED" not in complaint:
      raise
  ended = time.perf_counter()
  if compiled is None:
    memory = _complained(job.sizes, complaint)
  else:
    memory = _measured(job.sizes, compiled.memory_analysis(), topology.chip.platform)
  return Compiled(
    job.mesh,
    memory,
    compiled.as_text() if compiled else None,
    complaint,
    lines,
    lowered_at - began,
    ended - lowered_at,
  )


def state_bytes(state: state_lib.TrainState) -> dict[str, int]:
  """Bytes of a state on one device, by part, from shapes (or arrays) and their shardings."""
  return {
    "parameters": tree_bytes(state.params),
    "optimizer": tree_bytes((state.opt_state, state.step, state.history)),
    "ema": tree_bytes(state.ema),
  }


def tree_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays or shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def memory_dict(memory: Memory) -> dict[str, int]:
  """All parts by name, and the total."""
  return dataclasses.asdict(memory) | {"total": memory.total}


def _measured(sizes: dict[str, int], analysis: Any, platform: str) -> Memory:
  """The compiler's figures: its arguments include padding, its outputs reuse donated arguments.

  CPU and GPU reserve the temporaries as one block. TPU does not: what must fit there is the peak
  (its sum of the temporaries may be more than the memory that the compiler itself just accepted).
  """
  arguments = analysis.argument_size_in_bytes
  outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
  total = arguments + analysis.temp_size_in_bytes + outputs
  if platform == "tpu" and analysis.peak_memory_in_bytes:
    total = max(arguments, analysis.peak_memory_in_bytes)
  return Memory(
    **sizes,
    temp=max(0, total - sum(sizes.values())),
    code=analysis.generated_code_size_in_bytes,
    host=analysis.host_argument_size_in_bytes
    + analysis.host_temp_size_in_bytes
    + max(0, analysis.host_output_size_in_bytes - analysis.host_alias_size_in_bytes),
  )


def _complained(sizes: dict[str, int], complaint: str) -> Memory:
  """From the compiler's refusal: the largest amount that it names is what was needed in all.

  It says "Used 120.0G of 95.7G hbm", or "the total memory required for HLO temporaries (113.15G)",
  which includes the arguments, whatever it says.
  """
  amounts = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", complaint)
  largest = max((float(number) * _UNITS[unit] for number, unit in amounts), default=0.0)
  return Memory(**sizes, temp=max(0, int(largest) - sum(sizes.values())), code=0, host=0)


def host_memory() -> int:
  """Bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def train_task(experiment: Experiment, name: str) -> Task:
  """The task of a train stage."""
  return tasks.make(experiment.stages[name].task)
