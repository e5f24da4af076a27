"""The settings of a process that computes on its CPU."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
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


def product(dtype=jnp.float32):
  return jnp.matmul, [jax.ShapeDtypeStruct((8, 8), dtype)] * 2


def scanned():
  """A product of bf16 within a loop."""
  matmul, (left, right) = product(jnp.bfloat16)

  def program(left, right):
    return jax.lax.scan(lambda x, _: (matmul(x, right), None), left, length=3)[0]

  return program, [left, right]


def convolution(dtype=jnp.float32):
  """A convolution of fp32 whose result a product follows."""

  def program(image, kernel, left, right):
    image = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME")
    return image.sum() + left @ right

  shapes = [(1, 4, 8, 8), (4, 4, 3, 3)]
  return program, [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes] + product(dtype)[1]


@pytest.mark.skipif(not cpu._is_tried(), reason="this machine or version of JAX has no oneDNN")
@pytest.mark.parametrize(
  ("program", "wanted"),
  [
    (product(), cpu.PRODUCTS),
    (product(jnp.bfloat16), cpu.HALF),
    (scanned(), cpu.HALF),
    (convolution(), cpu.CONVOLUTIONS),
    (convolution(jnp.bfloat16), cpu.HALF),
  ],
  ids=["product", "half", "loop", "convolution", "both"],
)
def test_a_step_is_compiled_by_what_it_computes(program, wanted):
  function, arguments = program
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  assert cpu.chosen_for(jax.jit(function).lower(*arguments), mesh) == wanted
  several = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:2])
  assert cpu.chosen_for(jax.jit(function).lower(*arguments), several) == wanted


STEP = """
import jax, jax.numpy as jnp, numpy as np
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import program as program_lib
from mgen_jax.training import state as state_lib
from tests.training import toy

class Wide(toy.ToyTask):
  def init(self, key):
    w = 0.1 * jax.random.normal(key, (512, 512))
    return {"w": w, "b": jnp.zeros((512,))}

  def loss(self, params, batch, keys):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.square(error).mean(), {}

mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
with mesh_lib.use(mesh):
  program = program_lib.make_program(Wide(), toy.stage(), mesh, seed=0)
  rng = np.random.default_rng(0)
  batch = {name: rng.standard_normal((2048, 512)).astype(np.float32) for name in "xy"}
  rows = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
  chosen = program.compile({"rows": rows})["rows"]

  def state():
    made = jax.tree.map(lambda s: jnp.full(s.shape, 1 / 64, s.dtype), program.shapes)
    return jax.device_put(made, program.layout)

  given = state()
  (new, metrics), (plain, plain_metrics) = chosen(given, batch), program.train_step(state(), batch)
print("ynn" in chosen.as_text(), given.params["w"].is_deleted())
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
jax.tree.map(close, (new.params, metrics), (plain.params, plain_metrics))
"""


@pytest.mark.skipif(not cpu._is_tried(), reason="this machine or version of JAX has no oneDNN")
def test_a_training_step_is_the_same_with_its_options():
  """Within rounding, and its state is still donated."""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", STEP], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["False", "True"]


PAGES = """
import resource, jax, jax.numpy as jnp, numpy as np
from mgen_jax.parallel import cpu
cpu.keep_memory()
x = jax.block_until_ready(jnp.ones((6144, 256)))

def program(x):  # far more work than what JAX would do in the calling thread anyway
  return jnp.sort(jnp.tanh(x @ x.T) @ x, axis=0).sum()

program = jax.jit(program)
faults = []
for _ in range(30):
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(np.median(np.diff(faults)[-20:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_memory_is_kept():
  """144 MiB a call, which else wait for 36,000 pages.

  A call now and then still needs a new piece, where what lies between freed ones is in use.
  """
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", PAGES], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 1_000
