"""How the processes of a run on several hosts find each other: from flags, or from the environment
of SLURM, a JobSet on Kubernetes, or a TPU slice.

`choose` looks and decides, and touches nothing; `start` does what was chosen. What launches the
processes is in `launch/`.
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from absl import logging
from jax.experimental import multihost_utils

from mgen_jax.errors import UserError

CLUSTERS = ("auto", "off", "slurm", "jobset", "tpu")

# The exit code of a process that has waited too long for another (EX_TEMPFAIL of sysexits.h): the
# fault is not its own, and all of them should be started again (launch/codes.sh).
TRY_AGAIN = 75

_PORTS = range(61440, 65536)  # where JAX itself puts the coordinator of a SLURM job


class Cluster(NamedTuple):
  """One process of a run on several hosts."""

  kind: str  # how it was found: "flags" or one of CLUSTERS
  coordinator: str | None = None  # host:port of process 0; None: JAX finds all itself (TPU slices)
  processes: int | None = None
  process: int | None = None  # from 0
  local_device: int | None = None  # the only device of the host that it uses; None: all it sees

  def __str__(self) -> str:
    if self.coordinator is None:
      return f"{self.kind}: as JAX finds it"
    place = f"process {self.process} of {self.processes}"
    return f"{self.kind}: {place}, process 0 at {self.coordinator}"


def choose(
  environment: Mapping[str, str],
  *,
  cluster: str = "auto",
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Cluster | None:
  """What this process is a part of; None: it is the only one.

  Args:
    environment: variables of the process.
    cluster: which kind to look for; "auto": the first that the environment shows; "off": none.
    coordinator, num_processes, process_id: flags, which go before any environment; all or none.

  Raises:
    UserError: flags or variables are missing or cannot be used.
  """
  flags = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) < len(flags):
    if missing:
      raise UserError(f"{' and '.join(missing)} must be set too: the three belong together.")
    return _checked(Cluster("flags", coordinator, num_processes, process_id), "--process_id")
  if cluster == "auto":
    cluster = next((name for name, shown in _SHOWN.items() if shown(environment)), "off")
  if cluster == "off":
    return None
  return _FROM[cluster](environment)


def start(cluster: Cluster | None, *, timeout: int, heartbeat: int) -> None:
  """Joins the other processes; before any device is touched.

  Args:
    cluster: from `choose`; None: there is nothing to join.
    timeout: seconds to wait until all processes are there.
    heartbeat: seconds without a sign of life after which a process counts as lost; the others then
      end as well, whatever they wait for.

  Where they are not all there in time, the process ends with `TRY_AGAIN` and a sentence.
  """
  if cluster is None:
    return
  logging.info("one of several processes (%s)", cluster)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of use on CPUs only
  late = (
    f"the processes of this run did not meet within {timeout} s ({cluster}): see that all were "
    "started, with the same number of processes, and that they reach the coordinator's port."
  )
  with _patience(late, timeout):
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.processes,
      cluster.process,
      local_device_ids=cluster.local_device,
      initialization_timeout=timeout + 60,  # at its own timeout JAX aborts with a core dump
      heartbeat_timeout_seconds=heartbeat,
    )
    jax.devices()  # here the processes tell each other of their devices, and wait again


def barrier(name: str, timeout: float) -> None:
  """Returns when all processes are here; ends this one with `TRY_AGAIN` where they are not in time.

  A wait of the devices for each other cannot be called off, hence the end of the process.

  Args:
    name: what the processes wait at, the same for all.
    timeout: seconds; 0: no limit.
  """
  late = (
    f"process {jax.process_index()} of {jax.process_count()} waited {timeout:.0f} s for the others "
    f"at {name!r}: one of them is stuck or gone; look at the end of their logs, and start all of "
    "them again (the same command continues)."
  )
  with _patience(late, timeout if jax.process_count() > 1 else 0):
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def _patience(late: str, seconds: float) -> Iterator[None]:
  """Ends the process with the sentence `late` after so many seconds; 0: waits for ever."""
  if not seconds:
    yield
    return

  def give_up():
    print(f"error: {late}", file=sys.stderr, flush=True)
    os._exit(TRY_AGAIN)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def first_host(nodes: str) -> str:
  """The first host of a SLURM list: "node[003-005,9],login1" -> "node003".

  Raises:
    UserError: it is none.
  """
  match = re.match(r"([\w.-]+)(?:\[(\w+)[^\]]*\]([\w.-]*))?(?:,|$)", nodes)
  if match is None:
    raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which is no list of hosts.")
  return "".join(part or "" for part in match.groups())


def _slurm(environment: Mapping[str, str]) -> Cluster:
  read = _Reader(environment, "slurm", "start with srun, as launch/slurm.sh does")
  port = environment.get("JAX_COORDINATOR_PORT")
  if port is None:
    port = _PORTS[read.number("SLURM_JOB_ID") % len(_PORTS)]
  made = Cluster(
    "slurm",
    f"{first_host(read.text('SLURM_STEP_NODELIST'))}:{port}",
    read.number("SLURM_NTASKS"),
    read.number("SLURM_PROCID"),
  )
  # Several processes on a host that all see all of its GPUs share them out, one each.
  sees_several = "," in environment.get("CUDA_VISIBLE_DEVICES", "")
  tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
  if sees_several and tasks is not None and int(tasks.group()) > 1:
    made = made._replace(local_device=read.number("SLURM_LOCALID"))
  return _checked(made, "SLURM_PROCID")


def _jobset(environment: Mapping[str, str]) -> Cluster:
  read = _Reader(environment, "jobset", "see the manifests in launch/gke/")
  of_job = read.number("PROCESSES_IN_JOB")
  process = read.number("JOB_COMPLETION_INDEX")
  if process >= of_job:
    raise UserError(
      f"JOB_COMPLETION_INDEX is {process}, but PROCESSES_IN_JOB {of_job}: correct the manifest."
    )
  jobs, job = (read.number(name) if name in environment else least for name, least in _JOBS)
  made = Cluster(
    "jobset", read.text("JAX_COORDINATOR_ADDRESS"), jobs * of_job, job * of_job + process
  )
  return _checked(made, "JOB_INDEX")


def _tpu(environment: Mapping[str, str]) -> Cluster:
  """JAX asks the environment or the metadata server of the slice, several slices included."""
  del environment
  return Cluster("tpu")


_JOBS = (("NUM_JOBS", 1), ("JOB_INDEX", 0))
_FROM = {"slurm": _slurm, "jobset": _jobset, "tpu": _tpu}

# By kind: whether an environment is one of several processes. SLURM_STEP_NODELIST is there in a
# step (srun) only, not in the shell of an allocation, where a plain command is one process.
_SHOWN = {
  "slurm": lambda e: "SLURM_STEP_NODELIST" in e and e.get("SLURM_NTASKS", "1") != "1",
  "jobset": lambda e: "PROCESSES_IN_JOB" in e and "JAX_COORDINATOR_ADDRESS" in e,
  "tpu": lambda e: "," in e.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in e,
}


class _Reader(NamedTuple):
  """Reads variables that must be there."""

  environment: Mapping[str, str]
  kind: str
  fix: str

  def text(self, name: str) -> str:
    if not self.environment.get(name):
      raise UserError(f"--cluster={self.kind}, but {name} is not set: {self.fix}.")
    return self.environment[name]

  def number(self, name: str) -> int:
    text = self.text(name)
    if not text.isdecimal():
      raise UserError(f"{name} is {text!r}, which is no number: {self.fix}.")
    return int(text)


def _checked(cluster: Cluster, source: str) -> Cluster:
  host, _, port = cluster.coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f"the coordinator is {cluster.coordinator!r}: it must be host:port of process 0."
    )
  if not 0 <= cluster.process < cluster.processes:
    raise UserError(
      f"this is process {cluster.process} of {cluster.processes} ({source}): count from 0 to "
      f"{cluster.processes - 1}."
    )
  return cluster
