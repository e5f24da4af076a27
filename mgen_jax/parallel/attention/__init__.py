"""Scaled dot-product attention: one function for every platform, mesh and sequence length.

The kernel follows the platform of the mesh, never `jax.default_backend()`: a program for a TPU or
a GPU may be compiled on a host that has neither. The pieces:

  __init__   the function, its checks, and how its arrays are spread over the mesh
  context    the three ways to attend across devices that hold parts of the tokens
  kernels    the choice of a kernel for the arrays that one device holds
  blockwise  XLA in bounded memory
  splash     TPU (Pallas)

Not here: projections, norms and position codes (see `models/`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mgen_jax.errors import ConfigError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.parallel.attention import context, kernels, padding
from mgen_jax.parallel.attention.splash import Blocks

__all__ = ["Blocks", "attention"]


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  context_parallel: str | None = "all_gather",
  split_keys: bool | None = None,
  kernel: str | None = None,
  blocks: Blocks | None = None,
) -> jax.Array:
  """Full (bidirectional) attention with fp32 softmax statistics (movie_gen 2.4, 4.2).

  On a mesh of several devices the batch is split over replica and fsdp, heads over tensor and
  queries over context; a batch that does not divide stays whole, tokens that do not are padded.

  Args:
    q: queries, [batch, queries, heads, head_dim].
    k: keys, [batch, keys, kv_heads, head_dim]; kv_heads divides heads, and each of them serves
      heads / kv_heads consecutive query heads (grouped-query attention).
    v: values, like `k`.
    mask: [batch, keys] bool, True where a key may be attended to; None attends to all. A row
      without any True attends to all keys evenly: mask the result where that matters.
    context_parallel: how queries meet the keys of the other shards of the context axis:
      "all_gather" of keys and values (the paper's, section 3.1.6), "ring" (keys and values travel
      around, two shards of them are held) or "ulysses" (all-to-all between tokens and
      heads). None: this is no sequence to split (frames of an autoencoder, short texts); tokens
      stay whole, and so do heads that do not divide.
    split_keys: whether the keys are split over context like the queries (self-attention), or whole
      on each of its devices (cross-attention, where all methods are one); None: split if there
      are as many keys as queries. It changes what is communicated and never the result.
    kernel: a name of `kernels.KERNELS`, to override the platform's choice.
    blocks: of the splash kernel, to override its table.

  Returns:
    [batch, queries, heads, head_dim], in the dtype of `q`.

  Raises:
    ConfigError: a method or kernel that does not exist; heads that do not divide over kv_heads, or
      over tensor (for Ulysses, tensor x context); blocks that the kernel does not have.
  """
  heads, kv_heads = q.shape[2], k.shape[2]
  kernels.check(kernel)
  context.check(context_parallel)
  if heads % kv_heads:
    raise ConfigError(
      f"{heads} attention heads do not share {kv_heads} key-value heads evenly: use "
      f"{_nearest_divisor(heads, kv_heads)} key-value heads"
    )
  options = kernels.Options(kernel, blocks)
  mesh = mesh_lib.current()
  if mesh is None or mesh.size == 1:
    return kernels.attend(q, k, v, mask, options)

  split = split_keys if split_keys is not None else q.shape[1] == k.shape[1]
  parts = mesh.shape["context"] if context_parallel is not None else 1
  tensor = _head_parts(mesh, heads, context_parallel, split)
  # Fewer key-value heads than devices: each head is given to several of them.
  k, v = (_repeat_heads(x, math.lcm(kv_heads, tensor)) for x in (k, v))

  queries, keys = q.shape[1], k.shape[1]
  q = padding.longer(q, padding.rounded(queries, parts))
  if split:
    k, v, mask = (
      x if x is None else padding.longer(x, padding.rounded(keys, parts)) for x in (k, v, mask)
    )

  batch = rules.BATCH_AXES if q.shape[0] % mesh_lib.batch_shards(mesh) == 0 else None
  tokens = "context" if context_parallel is not None else None
  key_tokens = tokens if split else None
  by_head = "tensor" if tensor == mesh.shape["tensor"] else None
  across = context.METHODS[context_parallel] if split and parts > 1 else context.local
  # Pallas kernels are opaque to the partitioner, and so the whole mesh is manual here. They do not
  # state over which axes their results vary either: nothing to check (check_vma).
  out = jax.shard_map(
    functools.partial(across, options=options, keys=keys),
    mesh=mesh,
    in_specs=(
      PartitionSpec(batch, tokens, by_head),
      PartitionSpec(batch, key_tokens, by_head),
      PartitionSpec(batch, key_tokens, by_head),
      PartitionSpec() if mask is None else PartitionSpec(batch, key_tokens),
    ),
    out_specs=PartitionSpec(batch, tokens, by_head),
    check_vma=False,
  )(q, k, v, mask)
  return out[:, :queries]


def _head_parts(mesh: Mesh, heads: int, method: str | None, split: bool) -> int:
  """Over how many devices of the tensor axis the heads are split: all of them, or one."""
  tensor, parts = mesh.shape["tensor"], mesh.shape["context"]
  if method is None:
    return tensor if heads % tensor == 0 else 1
  if heads % tensor:
    raise ConfigError(
      f"{heads} attention heads do not divide over tensor={tensor} of the mesh: set tensor to "
      f"{_nearest_divisor(heads, tensor)}"
    )
  if method == "ulysses" and split and heads % (tensor * parts):
    raise ConfigError(
      f"{heads} attention heads do not divide over tensor={tensor} x context={parts}, which "
      f"context_parallel='ulysses' splits them over: set context to "
      f"{_nearest_divisor(heads // tensor, parts)}, or use 'all_gather' or 'ring'"
    )
  return tensor


def _nearest_divisor(number: int, wanted: int) -> int:
  """The divisor of `number` that is nearest to `wanted`; of two, the larger."""
  divisors = [d for d in range(1, number + 1) if number % d == 0]
  return min(divisors, key=lambda d: (abs(d - wanted), -d))


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
  """[batch, n, h, d] -> [batch, n, heads, d]; `heads` is a multiple of h."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
