"""A program for TPUs is compiled without any, where libtpu is installed (pip install -e .[tpu])."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
  ),
]


def test_a_stage_is_planned_for_a_pod_of_tpus(tmp_path):
  out = tmp_path / "plan"
  done = subprocess.run(
    [
      sys.executable, "-m", "mgen_jax.plan", "--config=tests/tiny.py", "--stage=t2v",
      "--topology=v5p:2x2x2", "--config.stages.t2v.mesh.tensor=2", f"--out={out}",
    ],
    env=os.environ, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "plan.json").read_text())
  assert record["devices"] == 8 and record["fits"]
  assert record["notes"] == []
  # TPUs write products as convolutions, and a loop's trip count stands in its condition only.
  assert 0.98 < record["hlo_flops"] / record["model_flops"] < 1.2
  assert {"tensor", "fsdp"} <= {axis for row in record["collectives"] for axis in row["axes"]}
  assert 0 < record["step_seconds_bound"] < record["step_seconds_serial"]
  low, high = record["mfu_range"]
  assert 0 < low < high < 1


def test_a_shape_that_tpus_do_not_come_in_is_refused_in_one_sentence():
  done = subprocess.run(
    [
      sys.executable, "-m", "mgen_jax.plan", "--config=tests/tiny.py", "--stage=t2v",
      "--topology=v5p:3x3x3",
    ],
    env=os.environ, capture_output=True, text=True, check=False,
  )  # fmt: skip
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2 and len(said) == 1
  assert "v5p:3x3x3" in said[0] and "multiples of 2" in said[0]
