"""What makes programs fast on a CPU, and is not so by default.

- Memory is kept. XLA asks for the memory of a program anew at every call, and the allocator of
  glibc gives large pieces back to the system at once: each step then waits for hundreds of
  thousands of pages of zeros.
- YNNPACK, which XLA hands products, sums and convolutions to, uses several cores worse than what
  XLA had before, and takes seconds for its first calls. It keeps products of bf16, which on cores
  with AMX are the hardware's (`linear.py` writes them so), and the sums of what convolves.
- oneDNN, which is in jaxlib, makes the matrix products of encoders, which are large and many in a
  row. In a training step it is no faster, and no program that has it can be kept in a cache.

The choice follows from the program alone, never from a measurement: a run that is resumed
computes the same.
"""

import ctypes
import platform
import sys

import jax
from jax.extend.mlir import ir

# Options of XLA, for training steps of fp32, ...
PRODUCTS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
# ... for those with products of bf16, ...
HALF: dict[str, str | bool] = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
# ... and for all that convolves in fp32: with YNNPACK's convolutions an autoencoder takes four
# times as long on four cores (they use one), without its sums 1.2 times.
CONVOLUTIONS: dict[str, str | bool] = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}
# For encoders. Each product is a call of its own: where XLA fuses more into it, jaxlib 0.10.2
# ends the process. No such program can be kept in a cache: JAX warns of it, and compiles it anew.
ONEDNN: dict[str, str | bool] = {
  **CONVOLUTIONS,
  "xla_cpu_use_onednn": True,
  "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}

_TRIED = ((0, 10), (0, 11), (0, 12))  # versions of JAX: a newer one may not know the options

# The parameters of mallopt(3), with what keeps all that is freed: nothing is trimmed, nothing is
# mapped apart, and no heap of a thread, of 64 MiB at most, is given back when it is empty. Threads
# keep heaps of their own: with one for all, compilation and steps took four times as long.
_KEEP = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20), "M_MMAP_MAX": (-4, 0)}


def keep_memory() -> None:
  """Has this process keep what it frees, for the next step, if it computes on its CPU.

  For commands, which own their process, before JAX has any devices; only glibc's allocator can be
  told. Not on hosts of accelerators: there the memory of programs is elsewhere.

  What is freed is kept for the thread that freed it, so programs then run in the thread that calls
  them, as long as what they are given is there. Others get memory that is theirs alone, and a piece
  of more than 64 MiB they give back, whatever they were told.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() != "cpu":
    return
  libc = ctypes.CDLL(None)
  for parameter, value in _KEEP.values():
    libc.mallopt(parameter, value)


def compiler_options(
  mesh: jax.sharding.Mesh, *, convolutions: bool = False
) -> dict[str, str | bool] | None:
  """For `jax.jit` of an encoder, or of convolutions, where an x86-64 CPU is the only device."""
  only = jax.local_device_count() == mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
  if not only or not _is_tried():
    return None
  return dict(CONVOLUTIONS if convolutions else ONEDNN)


def chosen_for(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> dict[str, str | bool] | None:
  """For `lowered.compile` of a training step, by what is in it.

  None, which leaves XLA its own: anywhere but on an x86-64 CPU, and for a JAX that was not tried.
  The same for one device and for several simulated ones, which so round alike.
  """
  if mesh.devices.flat[0].platform != "cpu" or not _is_tried():
    return None
  convolutions, half = contents(lowered)
  return dict(HALF if half else CONVOLUTIONS if convolutions else PRODUCTS)


def contents(lowered: jax.stages.Lowered) -> tuple[bool, bool]:
  """Whether a program has convolutions, and whether it has products of bf16."""
  convolutions = half = False

  def visit(operation: ir.Operation) -> ir.WalkResult:
    nonlocal convolutions, half
    convolutions |= operation.name == "stablehlo.convolution"
    half |= operation.name == "stablehlo.dot_general" and all(
      isinstance(x.type.element_type, ir.BF16Type) for x in operation.operands
    )
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir().operation.walk(visit)
  return convolutions, half


def _is_tried() -> bool:
  known = jax.__version_info__[:2] in _TRIED
  return known and sys.platform == "linux" and platform.machine() == "x86_64"
