"""What makes programs fast on a CPU, and is not so by default.

- Memory is kept. XLA asks for the memory of a program anew at every call, and the allocator of
  glibc gives large pieces back to the system at once: each step then waits for hundreds of
  thousands of pages of zeros.
- oneDNN, which is in jaxlib, makes the matrix products of encoders, which are large, and of those
  training steps whose products are (`chosen_for`). What makes them by default, YNNPACK, uses
  several cores worse; for the small ones of a toy's training step it is the better, since it does
  what comes after them as well. Products of bf16 are always its own: on cores with AMX they are the
  hardware's (`linear.py` writes them so), where oneDNN's are of fp32.

The choice follows from the program alone, never from a measurement: a run that is resumed
computes the same.
"""

import ctypes
import math
import platform
import sys
from typing import NamedTuple

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

# A product from which on oneDNN is the faster in a training step: FLOPs, and the least of its
# three sizes (the quickstart's autoencoder has up to 600 million FLOPs at 128 columns: slower).
LARGE = 1 << 27
LEAST = 192
# Of the FLOPs of all products, how many are in large ones where it pays. In a step of the toy
# backbone with 4 x 256 tokens, 0.43, it does; in those of the quickstart's text-to-video stage, up
# to 0.37, it does not: the same on two cores, slower on four.
SHARE = 0.4

_TRIED = ((0, 10), (0, 11), (0, 12))  # versions of JAX: a newer one may not know the options

# The parameters of mallopt(3), with what keeps all that is freed: nothing is trimmed, nothing is
# mapped apart, and no heap of a thread, of 64 MiB at most, is given back when it is empty. Threads
# keep heaps of their own: with one for all, compilation and steps took four times as long.
_KEEP = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20), "M_MMAP_MAX": (-4, 0)}


def keep_memory() -> None:
  """Has this process keep what it frees, for the next step, if it computes on its CPU.

  For commands, which own their process; only glibc's allocator can be told. Not on hosts of
  accelerators: there the memory of programs is elsewhere.
  """
  if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
    return
  libc = ctypes.CDLL(None)
  for parameter, value in _KEEP.values():
    libc.mallopt(parameter, value)


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

  oneDNN's products where large ones do much of the work; else, where it has convolutions, these
  without YNNPACK.
  """
  if compiler_options(mesh) is None:
    return None
  products, convolutions = work(lowered)
  large = sum(one.flops for one in products if one.is_large())
  if large > SHARE * sum(one.flops for one in products):
    return compiler_options(mesh)
  return compiler_options(mesh, convolutions=True) if convolutions else None


class Product(NamedTuple):
  """A batch of matrix products: [batch, rows, summed] times [batch, summed, columns]."""

  batch: int
  rows: int
  summed: int
  columns: int
  half: bool  # of bf16, which XLA's own multiply in hardware: oneDNN is given fp32 for it

  @property
  def flops(self) -> int:
    """Of the whole batch."""
    return 2 * math.prod(self[:4])

  def is_large(self) -> bool:
    """Whether oneDNN is the better for each of them."""
    sizes = self[1:4]
    return not self.half and 2 * math.prod(sizes) >= LARGE and min(sizes) >= LEAST


def work(lowered: jax.stages.Lowered) -> tuple[list[Product], int]:
  """The matrix products of a program as it is written, and how many convolutions it has.

  The body of a loop counts once, and so does a function however often it is called.
  """
  products, convolutions = [], 0

  def visit(operation: ir.Operation) -> ir.WalkResult:
    nonlocal convolutions
    if operation.name == "stablehlo.convolution":
      convolutions += 1
    elif operation.name == "stablehlo.dot_general":
      left, right = (operand.type.shape for operand in operation.operands)
      axes = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
      batch = math.prod(left[axis] for axis in axes.lhs_batching_dimensions)
      summed = math.prod(left[axis] for axis in axes.lhs_contracting_dimensions)
      shared = max(1, batch * summed)  # arrays may be empty
      rows, columns = math.prod(left) // shared, math.prod(right) // shared
      half = all(isinstance(x.type.element_type, ir.BF16Type) for x in operation.operands)
      products.append(Product(batch, rows, summed, columns, half))
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir().operation.walk(visit)
  return products, convolutions


def _is_tried() -> bool:
  known = jax.__version_info__[:2] in _TRIED
  return known and sys.platform == "linux" and platform.machine() == "x86_64"
