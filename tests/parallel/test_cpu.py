"""The settings of a process that computes on its CPU."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib

PRODUCT = """
import jax, numpy as np
from mgen_jax.parallel import cpu, mesh
cpu.keep_memory()
x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
options = cpu.compiler_options(mesh.make_mesh(mesh.MeshConfig()))
program = jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()
assert np.abs(program(x) - x @ x).max() < 1e-3
print("onednn" in program.as_text(), flush=True)
"""


def told(devices: int) -> str:
  """Whether a process of its own has its products from oneDNN."""
  flags = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  done = subprocess.run(
    [sys.executable, "-c", PRODUCT], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.mark.skipif(not cpu._is_tried(), reason="this machine or version of JAX has no oneDNN")
def test_products_are_onednns_on_a_single_device():
  assert told(devices=1) == "True"
  assert told(devices=2) == "False"


def test_a_version_of_jax_that_was_not_tried_is_left_alone(monkeypatch):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  assert bool(cpu.compiler_options(mesh)) == cpu._is_tried()
  monkeypatch.setattr(jax, "__version_info__", (99, 0, 0))
  assert cpu.compiler_options(mesh) is None


PAGES = """
import resource, jax, jax.numpy as jnp, numpy as np
from mgen_jax.parallel import cpu
cpu.keep_memory()
program = jax.jit(lambda x: jnp.tanh(jnp.outer(x, x) @ jnp.outer(x, x + 1)).sum())
x = np.ones(2048, np.float32)
faults = []
for _ in range(10):
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-4])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_memory_is_kept():
  """48 MiB a call: three calls else wait for 36,000 pages and more."""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", PAGES], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 3_000
