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


def product(rows: int, columns: int = 512, batch: int = 1, dtype=jnp.float32):
  """`rows` x 512 times 512 x `columns`."""
  shapes = [(batch, rows, 512), (batch, 512, columns)]
  shapes = shapes if batch > 1 else [shape[1:] for shape in shapes]
  return jnp.matmul, [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def convolution(rows: int):
  """A convolution whose result a product follows."""

  def program(image, kernel, left, right):
    image = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME")
    return image.sum() + left @ right

  shapes = [(1, 4, 8, 8), (4, 4, 3, 3)]
  return program, [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes] + product(rows)[1]


def scanned(rows: int):
  """A product within a loop."""
  matmul, (left, right) = product(rows)

  def program(left, right):
    return jax.lax.scan(lambda x, _: (matmul(x, right), None), left, length=3)[0]

  return program, [left, right]


@pytest.mark.skipif(not cpu._is_tried(), reason="this machine or version of JAX has no oneDNN")
@pytest.mark.parametrize(
  ("program", "wanted"),
  [
    (product(128), None),  # of a toy
    (product(4096), cpu.ONEDNN),
    (product(4096, dtype=jnp.bfloat16), None),  # the hardware's, which oneDNN is not given
    (scanned(4096), cpu.ONEDNN),
    (product(1 << 16, columns=64), None),  # narrow, as between patches and latents
    (product(64, batch=256), None),  # many small ones, as attention has
    (convolution(128), cpu.CONVOLUTIONS),
    (convolution(4096), cpu.ONEDNN),  # these have the convolutions' options as well
  ],
  ids=["toy", "large", "half", "loop", "narrow", "batch", "convolution", "both"],
)
def test_a_step_is_compiled_by_what_it_computes(monkeypatch, program, wanted):
  function, arguments = program
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  for _ in range(2):  # the same program, the same choice
    assert cpu.chosen_for(jax.jit(function).lower(*arguments), mesh) == wanted
  several = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:2])
  assert cpu.chosen_for(jax.jit(function).lower(*arguments), several) is None


def test_the_work_of_a_program_is_counted():
  def program(x, y):
    return jnp.einsum("bij,bkj->bik", x, y), x.reshape(-1, 5) @ y[0].T

  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4, 5), (3, 6, 5))]
  products, convolutions = cpu.work(jax.jit(program).lower(*arguments))
  assert sorted(products) == [(1, 12, 5, 6, False), (3, 4, 5, 6, False)]
  assert convolutions == 0


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
print("onednn" in chosen.as_text(), given.params["w"].is_deleted())
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
jax.tree.map(close, (new.params, metrics), (plain.params, plain_metrics))
"""


@pytest.mark.skipif(not cpu._is_tried(), reason="this machine or version of JAX has no oneDNN")
def test_a_training_step_of_large_products_is_the_same_step_by_onednn():
  """Within rounding, and its state is still donated."""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", STEP], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["True", "True"]


PAGES = """
import resource, jax, jax.numpy as jnp, numpy as np
from mgen_jax.parallel import cpu
cpu.keep_memory()
program = jax.jit(lambda x: jnp.tanh(jnp.outer(x, x) @ jnp.outer(x, x + 1)).sum())
x = np.ones(2048, np.float32)
faults = []
for _ in range(60):
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(np.median(np.diff(faults)[-30:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_memory_is_kept():
  """48 MiB a call, which else waits for 12,000 pages and more.

  A call now and then still needs a new piece, where what lies between freed ones is in use.
  """
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", PAGES], env=os.environ | flags, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 1_000
