"""What makes programs fast on a CPU, and is not so by default.

- Memory is kept. XLA asks for the memory of a program anew at every call, and the allocator of
  glibc gives large pieces back to the system at once: each step then waits for hundreds of
  thousands of pages of zeros.
- oneDNN, which is in jaxlib, makes the matrix products of encoders, which are large, and of those
  training steps whose products are (`chosen_for`). What makes them by default, YNNPACK, uses
  several cores worse; for the small ones of a toy's training step it is the better, since it does
  what comes after them as well.

The choice follows from the program alone, never from a measurement: a run that is resumed
computes the same.
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import platform
import sys

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

# Options of XLA. Without YNNPACK's convolutions an autoencoder is four times as fast on four cores:
# they use one. Reductions stay with it.
CONVOLUTIONS: dict[str, str | bool] = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}
# Each product is a call of its own: where XLA fuses more into it, jaxlib 0.10.2
# ends the process. No such program can be kept in a cache: JAX warns of it, and compiles it anew.
ONEDNN: dict[str, str | bool] = {
  **CONVOLUTIONS,
  "xla_cpu_use_onednn": True,
  "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}

# FLOPs of a product from which on oneDNN is the faster in a training step. Those of Latte S/2 have
# 1.2 billion and more, those of a toy's 50 to 200 million.
LARGE = 1 << 29

_TRIED = ((0, 10), (0, 11), (0, 12))  # versions of JAX: a newer one may not know the options

# The parameters of mallopt(3), with what keeps all that is freed: nothing is trimmed, nothing is
# mapped apart, and all threads share one heap (a thread's own one is bounded, and maps the rest).
_KEEP = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def keep_memory() -> None:
  """Has this process keep what it frees, for the next step, if it computes on its CPU.

  For commands, which own their process, before JAX has started its backend: the heap of a thread
  that already runs is bounded for good. Only glibc's allocator can be told. Not on hosts of
  accelerators: there the memory of programs is elsewhere, and the threads that read data are
  better off with heaps of their own.
  """
  if platform.libc_ver()[0] != "glibc" or not _computes_here():
    return
  libc = ctypes.CDLL(None)
  for parameter, value in _KEEP.values():
    libc.mallopt(parameter, value)


def _computes_here() -> bool:
  """Whether JAX will compute on the CPU; starts its backend only where that cannot be told."""
  if asked := jax.config.jax_platforms:
    return asked.split(",")[0] == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not plugins and importlib.util.find_spec("libtpu") is None:
    return True
  return jax.default_backend() == "cpu"


def compiler_options(
  mesh: jax.sharding.Mesh, *, convolutions: bool = False
) -> dict[str, str | bool] | None:
  """For `jax.jit` of large products, or of convolutions, where an x86-64 CPU is the only device."""
  only = jax.local_device_count() == mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
  if not only or not _is_tried():
    return None
  return dict(CONVOLUTIONS if convolutions else ONEDNN)


def chosen_for(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> dict[str, str | bool] | None:
  """For `lowered.compile`, by what the program has; None: XLA's own, as where it is no such CPU.

  oneDNN's products where large ones do most of the work of all products; else, where it has
  convolutions, these without YNNPACK.
  """
  if compiler_options(mesh) is None:
    return None
  products, convolutions = work(lowered)
  large = sum(size * count for size, count in products if size >= LARGE)
  if 2 * large > sum(size * count for size, count in products):
    return compiler_options(mesh)
  return compiler_options(mesh, convolutions=True) if convolutions else None


def work(lowered: jax.stages.Lowered) -> tuple[list[tuple[int, int]], int]:
  """What a program multiplies, as it is written: the body of a loop counts once.

  Returns:
    FLOPs of each matrix product and how many of it are a batch; the number of convolutions.
  """
  products, convolutions = [], 0

  def visit(operation: ir.Operation) -> ir.WalkResult:
    nonlocal convolutions
    if operation.name == "stablehlo.convolution":
      convolutions += 1
    elif operation.name == "stablehlo.dot_general":
      left, out = operation.operands[0].type.shape, operation.results[0].type.shape
      axes = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
      summed = math.prod(left[axis] for axis in axes.lhs_contracting_dimensions)
      batch = math.prod(left[axis] for axis in axes.lhs_batching_dimensions)
      products.append((2 * summed * math.prod(out) // max(1, batch), batch))
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir().operation.walk(visit)
  return products, convolutions


def _is_tried() -> bool:
  known = jax.__version_info__[:2] in _TRIED
  return known and sys.platform == "linux" and platform.machine() == "x86_64"
