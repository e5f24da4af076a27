"""The linear map of a layer whose kernel is sharded over fsdp and context: FSDP, spelled out.

The kernel is gathered in the dtype of the computation and multiplied with what each device holds
of the activations; in the backward pass its gradient is summed over the devices in fp32, each
keeping its shard (ZeRO-3; Rajbhandari et al., 2020). Left to itself, XLA may rather gather the
activations of hundreds of devices for that gradient, or sum it whole on every one of them.

Not here: which dimension of a kernel is sharded (`rules.py`); the products, and what "tensor"
splits of them, are XLA's to see to.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules

Array = jax.Array

SHARDS = ("fsdp", "context")  # the axes of the mesh that hold parts of a kernel


def multiply(x: Array, kernel: Array, bias: Array | None = None) -> Array:
  """The matrix product [..., d_in] @ [d_in, d_out] (+ [d_out]) -> [..., d_out], as `x` in dtype.

  On a CPU the leading dimensions are made one first. XLA else writes the gradient of the kernel,
  which sums over all of them, as a transposed copy of whatever comes before it, element by
  element: a training step of the toy backbone takes 1.3 times as long. Elsewhere, and where tokens
  are split over devices, which no merged dimension could express, all is left to XLA.
  """
  if mesh_lib.platform() != "cpu" or mesh_lib.shards("context", "tensor") > 1:
    return _plus(x @ kernel.astype(x.dtype), bias)
  rows = x.reshape(-1, x.shape[-1])
  return _on_cpu(rows, kernel, bias).reshape(*x.shape[:-1], kernel.shape[-1])


def _plus(out: Array, bias: Array | None) -> Array:
  return out if bias is None else out + bias.astype(out.dtype)


@jax.custom_vjp
def _on_cpu(x: Array, kernel: Array, bias: Array | None) -> Array:
  """x @ kernel (+ bias) for x [n, d_in], with gradients as XLA's CPU backend is good at them.

  Those of a kernel and a bias, which sum over the rows, are products that have the longer side of
  the kernel last. bf16 it multiplies in hardware only where the result is fp32 and neither side a
  transposed matrix; else it turns both sides into fp32 first, which costs several times as much on
  cores with AMX.
  """
  return _on_cpu_forward(x, kernel, bias)[0]


def _on_cpu_forward(x, kernel, bias):
  # Written out: within a call to `_on_cpu`, no remat policy would see that it is a product.
  out = _plus(_summed(x, kernel.astype(x.dtype), (1, 0)), bias).astype(x.dtype)
  return out, (x, kernel, bias)


def _on_cpu_backward(saved, dy):
  x, kernel, bias = saved
  dx = _summed(dy, kernel.astype(dy.dtype), (1, 1)).astype(x.dtype)
  narrow, wide = (x, dy) if x.shape[1] <= dy.shape[1] else (dy, x)
  if x.dtype == jnp.bfloat16:
    # With a row of ones below it XLA copies the transposed matrix, once, as it should.
    turned = jnp.concatenate([narrow.T, jnp.ones((1, x.shape[0]), x.dtype)])
    dkernel = _summed(turned, wide, (1, 0))[:-1]
  else:
    dkernel = _summed(narrow, wide, (0, 0))
  if narrow is dy:
    # Else XLA takes the transposition into the product, which then has the shorter side last.
    dkernel = jax.lax.optimization_barrier(dkernel).T
  dkernel = dkernel.astype(kernel.dtype)
  if bias is None:
    return dx, dkernel, None
  # A sum over many rows is split into windows and read twice, mostly by one core. With less than
  # eight rows of ones it would be such a sum again.
  dbias = _summed(jnp.ones((8, len(dy)), dy.dtype), dy, (1, 0))[0]
  return dx, dkernel, dbias.astype(bias.dtype)


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def _summed(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """The product of two matrices over these axes, summed in fp32 at least."""
  dims = (((axes[0],), (axes[1],)), ((), ()))
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jax.lax.dot_general(a, b, dims, preferred_element_type=wide)


def linear(
  x: Array,
  kernel: Array,
  bias: Array | None = None,
  *,
  names: Sequence[str | None],
  kernel_names: Sequence[str | None],
) -> Array:
  """x @ kernel (+ bias), in the dtype of `x`.

  Where the mesh shards no kernels, or its axes do not divide the batch, the tokens or the kernel,
  it is a plain product, all of it left to XLA: the result is the same.

  Args:
    x: [batch, tokens, d_in].
    kernel: [d_in, d_out], of any float type.
    bias: [d_out], likewise.
    names: logical names of the first two dimensions of `x` and of the result.
    kernel_names: likewise, of the kernel's two.

  Returns:
    [batch, tokens, d_out].
  """
  mesh = mesh_lib.current()
  if mesh is not None and x.ndim == 3:
    layout = _layout(mesh, x.shape[:2], kernel.shape, names, kernel_names)
    if layout is not None:
      return _plus(_linear(x, kernel, layout), bias)
  return multiply(x, kernel, bias)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Where everything lies."""

  mesh: Mesh
  dim: int  # of the kernel: the one that is sharded
  stored: PartitionSpec  # the kernel
  gathered: PartitionSpec  # and where it is used
  x: PartitionSpec
  y: PartitionSpec
  sums: tuple[str, ...]  # axes of the mesh, beside SHARDS, over which a gradient is summed
  copies: int  # devices along all of these that hold the same rows of x


def _layout(mesh: Mesh, rows, shape, names, kernel_names) -> _Layout | None:
  """None where the product is left to XLA."""
  stored = tuple(rules.sharding(mesh, kernel_names, shape).spec)
  dims = [dim for dim, axes in enumerate(stored) if axes == SHARDS]
  lead = tuple(rules.sharding(mesh, names, rows).spec)
  if (
    math.prod(mesh.shape[axis] for axis in SHARDS) == 1
    or not dims
    or lead != tuple(rules.spec(names))
  ):
    return None
  gathered = [None if dim in dims else axes for dim, axes in enumerate(stored)]
  reduced = set(mesh.axis_names) - set(gathered)
  held = {axis for axes in lead for axis in ((axes,) if isinstance(axes, str) else axes or ())}
  return _Layout(
    mesh,
    dims[0],
    PartitionSpec(*stored),
    PartitionSpec(*gathered),
    PartitionSpec(*lead, gathered[0]),
    PartitionSpec(*lead, gathered[1]),
    tuple(a for a in mesh.axis_names if a in reduced - set(SHARDS) and mesh.shape[a] > 1),
    math.prod(mesh.shape[axis] for axis in reduced - held),
  )


# Compiled programs name these once for each shape, however many kernels have it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, kernel: Array, layout: _Layout) -> Array:
  return _forward(x, kernel, layout)


@functools.partial(jax.jit, static_argnums=2)
def _forward(x, kernel, layout):
  return x @ _gather(kernel.astype(x.dtype), layout)


@functools.partial(jax.jit, static_argnums=3)
def _backward(x, kernel, dy, layout):
  dx = dy @ _gather(kernel.astype(x.dtype), layout).T
  return dx, _kernel_gradient(x, dy, layout).astype(kernel.dtype)


_linear.defvjp(
  # The kernel is gathered anew for the way back.
  lambda x, kernel, layout: (_forward(x, kernel, layout), (x, kernel)),
  lambda layout, saved, dy: _backward(*saved, dy, layout),
)


def _turns(mesh: Mesh) -> list[tuple[str, ...]]:
  """The axes that a gather runs over, all at once or, on TPUs, one after another.

  Over the whole of a torus XLA writes a gather or a scatter as an all-reduce, twice the traffic;
  over one axis of the mesh it stays what it is. The innermost axis comes first: its parts are
  neighbours in the kernel.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return [SHARDS]
  return [(axis,) for axis in reversed(SHARDS) if mesh.shape[axis] > 1]


def _gather(kernel: Array, layout: _Layout) -> Array:
  """The kernel as it is used, from the one that is stored."""

  def local(shard):
    for axes in _turns(layout.mesh):
      shard = jax.lax.all_gather(shard, axes, axis=layout.dim, tiled=True)
    return shard

  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=layout.stored,
    out_specs=layout.gathered,
    check_vma=False,
  )(kernel)


def _kernel_gradient(x: Array, dy: Array, layout: _Layout) -> Array:
  """The gradient of the stored kernel, fp32: in bf16 a sum over a thousand devices is lost."""
  # The dimension that is scattered comes first, the only place where a TPU scatters small parts.
  product = "bni,bno->io" if layout.dim == 0 else "bni,bno->oi"

  def local(x, dy):
    mine = jnp.einsum(product, x, dy, preferred_element_type=jnp.float32)
    mine = mine / layout.copies if layout.copies > 1 else mine
    for axes in reversed(_turns(layout.mesh)):
      parts = math.prod(layout.mesh.shape[axis] for axis in axes)
      mine = mine.reshape(parts, -1, mine.shape[1])
      mine = jax.lax.psum_scatter(mine, axes, scatter_dimension=0)
    mine = jax.lax.psum(mine, layout.sums) if layout.sums else mine
    return mine if layout.dim == 0 else mine.T

  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(layout.x, layout.y),
    out_specs=layout.stored,
    check_vma=False,
  )(x, dy)
