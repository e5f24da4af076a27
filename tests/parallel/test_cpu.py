"""The settings of a process that computes on its CPU."""

import os
import subprocess
import sys

import jax
import pytest

from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib

PRODUCT = """
import jax, jax.numpy as jnp, numpy as np
from mgen_jax.parallel import cpu
cpu.tune()
cpu.keep_memory()
x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
program = jax.jit(lambda x: x @ x).lower(x).compile()
assert np.abs(program(x) - x @ x).max() < 1e-3
print("onednn" in program.as_text(), flush=True)
"""


def told(**environment: str) -> str:
  """Whether a process of its own has its products from oneDNN."""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
  done = subprocess.run(
    [sys.executable, "-c", PRODUCT], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.mark.skipif(not cpu._has_onednn(), reason="this machine or version of JAX has no oneDNN")
def test_a_command_has_its_products_from_onednn_unless_the_user_says_otherwise():
  assert told() == "True"
  assert told(XLA_FLAGS="--xla_cpu_use_onednn=false") == "False"


def test_flags_that_are_there_come_last_and_simulated_devices_change_nothing():
  several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  cpu.tune(several)
  assert several == {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  flags = {"XLA_FLAGS": "--xla_cpu_use_onednn=false"}
  cpu.tune(flags)
  assert flags["XLA_FLAGS"].split()[-1] == "--xla_cpu_use_onednn=false"


def test_a_version_of_jax_that_is_not_known_is_left_alone(monkeypatch):
  monkeypatch.setattr(jax, "__version_info__", (99, 0, 0))
  environment = {}
  cpu.tune(environment)
  assert not environment


def test_options_are_for_one_device_alone():
  assert cpu.compiler_options(mesh_lib.make_mesh(mesh_lib.MeshConfig())) == {}
  assert cpu.compiler_options(mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])) == {}
