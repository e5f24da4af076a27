"""How processes find each other: what is chosen from which environment, and what happens when one
does not come."""

import re
import socket
import subprocess
import sys

import pytest

from mgen_jax import distributed
from mgen_jax.distributed import Cluster
from mgen_jax.errors import UserError

SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[003-005,9],login1",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
JOBSET = {
  "JAX_COORDINATOR_ADDRESS": "films-worker-0-0.films:1234",
  "PROCESSES_IN_JOB": "4",
  "JOB_COMPLETION_INDEX": "3",
  "JOB_INDEX": "1",
  "NUM_JOBS": "2",
}


@pytest.mark.parametrize(
  ("environment", "flags", "expected"),
  [
    ({}, {}, None),
    (SLURM, {}, Cluster("slurm", "gpu003:61441", 4, 2)),
    (SLURM | {"JAX_COORDINATOR_PORT": "99"}, {}, Cluster("slurm", "gpu003:99", 4, 2)),
    (SLURM, {"cluster": "off"}, None),
    ({k: v for k, v in SLURM.items() if "STEP" not in k}, {}, None),  # a shell of an allocation
    (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
    # Four processes on one host that see four GPUs take one each; that see one, take that.
    (
      SLURM
      | {
        "SLURM_STEP_TASKS_PER_NODE": "4",
        "SLURM_LOCALID": "2",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
      },
      {},
      Cluster("slurm", "gpu003:61441", 4, 2, 2),
    ),
    (
      SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"},
      {},
      Cluster("slurm", "gpu003:61441", 4, 2),
    ),
    (JOBSET, {}, Cluster("jobset", "films-worker-0-0.films:1234", 8, 7)),
    (
      {k: v for k, v in JOBSET.items() if k not in ("NUM_JOBS", "JOB_INDEX")},
      {},
      Cluster("jobset", "films-worker-0-0.films:1234", 4, 3),
    ),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, Cluster("tpu")),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),  # one host
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, Cluster("tpu")),
    ({}, {"cluster": "tpu"}, Cluster("tpu")),
    # Flags go before any environment.
    (
      SLURM,
      {"coordinator": "[::1]:7", "num_processes": 2, "process_id": 0},
      Cluster("flags", "[::1]:7", 2, 0),
    ),
  ],
)
def test_what_is_chosen(environment, flags, expected):
  assert distributed.choose(environment, **flags) == expected


@pytest.mark.parametrize(
  ("environment", "flags", "words"),
  [
    ({}, {"coordinator": "a:1"}, "--num_processes and --process_id must be set too"),
    ({}, {"process_id": 0}, "--coordinator and --num_processes must be set too"),
    (
      {},
      {"coordinator": "a", "num_processes": 2, "process_id": 0},
      "coordinator is 'a': it must be host:port",
    ),
    (
      {},
      {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
      "process 2 of 2 (--process_id): count from 0 to 1",
    ),
    ({}, {"cluster": "slurm"}, "--cluster=slurm, but SLURM_JOB_ID is not set: start with srun"),
    (SLURM | {"SLURM_PROCID": "first"}, {}, "SLURM_PROCID is 'first', which is no number"),
    (SLURM | {"SLURM_PROCID": "4"}, {}, "process 4 of 4 (SLURM_PROCID)"),
    (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, {}, "SLURM_STEP_NODELIST is '[1-2]'"),
    (JOBSET | {"JOB_COMPLETION_INDEX": "4"}, {}, "JOB_COMPLETION_INDEX is 4, but PROCESSES_IN_JOB"),
    (JOBSET | {"JOB_INDEX": "2"}, {}, "process 11 of 8 (JOB_INDEX)"),
    ({}, {"cluster": "jobset"}, "--cluster=jobset, but PROCESSES_IN_JOB is not set"),
  ],
)
def test_what_cannot_be_used_is_one_sentence(environment, flags, words):
  with pytest.raises(UserError, match=re.escape(words)):
    distributed.choose(environment, **flags)


@pytest.mark.parametrize(
  ("nodes", "host"),
  [
    ("node001", "node001"),
    ("node001,host2", "node001"),
    ("node[001-015],host2", "node001"),
    ("node[001,007-015]", "node001"),
    ("a-b.c[7-9]x", "a-b.c7x"),
  ],
)
def test_the_first_host_of_a_list(nodes, host):
  assert distributed.first_host(nodes) == host


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start_process(index, port, then="", timeout=3):
  """Process `index` of two, which joins the other and then does something."""
  program = f"""
from mgen_jax import cli, distributed
def main(argv):
  made = distributed.Cluster("flags", "127.0.0.1:{port}", 2, {index})
  distributed.start(made, timeout={timeout}, heartbeat=10)
  print("together", flush=True)
  {then}
cli.run(main)
"""
  return subprocess.Popen(
    [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


@pytest.mark.slow
def test_a_process_that_the_others_do_not_come_to_says_so():
  process = start_process(1, free_port())
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == distributed.TRY_AGAIN, stderr
  said = [line for line in stderr.splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and "did not meet within 3 s (flags: process 1 of 2" in said[0]


@pytest.mark.slow
def test_a_barrier_that_one_does_not_reach_ends_the_others_in_time():
  port = free_port()
  waits = start_process(0, port, "distributed.barrier('the corner', 1)", timeout=30)
  stuck = start_process(1, port, "import time; time.sleep(60)", timeout=30)
  try:
    _, stderr = waits.communicate(timeout=60)
  finally:
    stuck.kill()
    stuck.communicate()
  assert waits.returncode == distributed.TRY_AGAIN, stderr
  assert "process 0 of 2 waited 1 s for the others at 'the corner'" in stderr
  assert "Traceback" not in stderr
