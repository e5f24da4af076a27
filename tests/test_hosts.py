"""The whole main job on several hosts: processes of this machine that share nothing but a folder.

All runs have four devices, of one, two or four processes, so that they must do the very same. The
two find each other by flags, the four by what an emulated SLURM tells them, under launch/slurm.sh.
"""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from mgen_jax.training import goodput, metrics
from tests.launch import slurm

pytestmark = pytest.mark.slow

DEVICES = 4
FLAGS = ("--config=tests/least.py",)


def environment(processes):
  """Of one process. Less optimized programs are the same job, compiled in half the time."""
  return {
    **os.environ,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PLATFORMS": "cpu",
  }


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  command = [sys.executable, "-m", "mgen_jax.main", *FLAGS, f"--workdir={workdir}"]
  done = subprocess.run(
    command, env=environment(1), capture_output=True, text=True, check=False, timeout=500
  )
  assert done.returncode == 0, done.stderr
  return workdir


def check_same(found, expected, processes):
  """The same steps with the same losses, written once, checkpoints written by all."""
  for stage in ("autoencoder", "t2v"):
    lines, wanted = metrics.read(str(found / stage)), metrics.read(str(expected / stage))
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for name in ("loss", "validation_loss", "grad_norm"):
      np.testing.assert_allclose(
        [line[name] for line in lines if name in line],
        [line[name] for line in wanted if name in line],
        rtol=1e-5,
      )
    assert {line["run"] for line in goodput.read(str(found / stage))} == {1}
    (state,) = (found / stage / "checkpoints").glob(f"{lines[-1]['step']}/state")
    writers = sorted(path.name for path in state.glob("ocdbt.process_*"))
    assert writers == [f"ocdbt.process_{index}" for index in range(processes)]
  assert (found / "report.html").exists()


def test_two_processes_are_one_run(alone, tmp_path):
  port = free_port()
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "mgen_jax.main", *FLAGS, f"--workdir={tmp_path}"),
        *(f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"),
      ],
      env=environment(2),
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in processes:
    _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
  check_same(tmp_path, alone, 2)


def test_four_processes_under_slurm_are_one_run(alone, tmp_path):
  workdir = tmp_path / "run"
  job = slurm.install(tmp_path / "slurm", tasks=4, job=7)
  job = {**environment(4), **job, "XLA_FLAGS": environment(4)["XLA_FLAGS"]}
  job["JAX_COORDINATOR_PORT"] = str(free_port())
  done = subprocess.run(
    ["launch/slurm.sh", *FLAGS, f"--workdir={workdir}"],
    env=job, capture_output=True, text=True, check=False, timeout=500,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "process 3 of 4, process 0 at 127.0.0.1" in done.stderr
  assert "start number" not in done.stderr  # it went well the first time
  check_same(workdir, alone, 4)
