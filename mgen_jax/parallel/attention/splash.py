"""Attention on TPUs: JAX's splash kernels (Pallas), their tile sizes, padding and masks.

On another platform the kernels are interpreted, which is slow and for tests. Not here: when splash
is used (`kernels.py`).

Shapes: q, out [b, n, h, d]; k, v [b, m, g, d] with h a multiple of g; mask [b, m] bool or None;
lse [b, n, h] fp32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from mgen_jax.errors import ConfigError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.attention import padding

Array = jax.Array

LANES = 128  # of a TPU: tiles are multiples of it


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Upper bounds of the kernels' tiles, in tokens: multiples of 128.

  A tile of the forward kernel is queries x keys scores, of the backward ones likewise. Larger
  tiles read keys less often, until they do not fit the on-chip memory.
  """

  queries: int = 1024
  keys: int = 1024
  backward_queries: int = 1024
  backward_keys: int = 1024


# For heads of 256 bytes a token (128 numbers in bf16), by a substring of `device_kind` in lower
# case; the first match counts. A forward tile does as many FLOPs per byte that it reads as it has
# queries: 1024 are 3 to 6 times what keeps a v5p, v5e or TPU7x busy (peak FLOP/s over bytes/s of
# HBM: 166 to 312), and a v6e needs 560. Each entry compiles within the on-chip memory that XLA
# grants a kernel by default (16 MiB, v6e 32 MiB); none was timed yet.
TABLE: tuple[tuple[str, Blocks], ...] = (
  ("tpu v6", Blocks(queries=2048, keys=2048)),
  ("", Blocks()),
)


def blocks_for(kind: str, head_dim: int, dtype: jnp.dtype) -> Blocks:
  """The table's blocks for a kind of device, halved for each doubling of a head's row.

  Args:
    kind: `device_kind` of the mesh.
    head_dim: of a head.
    dtype: of queries, keys and values.
  """
  blocks = next(blocks for name, blocks in TABLE if name in kind.lower())
  row = head_dim * jnp.dtype(dtype).itemsize
  while row > 2 * LANES:
    row /= 2
    blocks = Blocks(*(max(LANES, size // 2) for size in dataclasses.astuple(blocks)))
  return blocks


def attend(
  q: Array, k: Array, v: Array, mask: Array | None, *, blocks: Blocks | None, saved_name: str
) -> Array:
  """Attention; its result and log-sum-exp carry `saved_name` for remat policies."""
  kernel, arrays, segments = _prepare(q, k, v, mask, blocks, residual_checkpoint_name=saved_name)
  return _rows(jax.vmap(kernel)(*arrays, segments), q.shape[1])


def forward(
  q: Array, k: Array, v: Array, mask: Array | None, *, blocks: Blocks | None
) -> tuple[Array, Array]:
  """The result in the dtype of q, and the log-sum-exp of each row; not differentiable."""
  kernel, arrays, segments = _prepare(q, k, v, mask, blocks, save_residuals=True)
  out, (lse,) = jax.vmap(kernel)(*arrays, segments)
  return _rows(out, q.shape[1]), _rows(lse, q.shape[1])


def backward(
  q: Array,
  k: Array,
  v: Array,
  mask: Array | None,
  out: Array,
  lse: Array,
  dout: Array,
  *,
  blocks: Blocks | None,
) -> tuple[Array, Array, Array]:
  """The gradients of q, k and v, in their dtypes, where out and lse may be over more keys.

  Raises:
    ConfigError: this version of JAX does not have the kernel where it was.
  """
  # JAX has no public name for the gradient at given statistics, which is what a ring needs.
  run = getattr(splash_lib, "_splash_attention_bwd", None)
  if run is None:
    raise ConfigError(
      f"context_parallel='ring' does not know the splash kernel of JAX {jax.__version__}: use "
      "'all_gather' or 'ulysses'"
    )
  kernel, arrays, segments = _prepare(q, k, v, mask, blocks)
  padded = arrays[0].shape[2]
  rows = tuple(_tokens(x, padded) for x in (out, lse, dout))

  def one(q, k, v, segments, out, lse, dout):
    masks = kernel.dq_mask_info, kernel.dkv_mask_info
    saved = (q, k, v, segments, None, out, lse, *masks)
    return run(res=saved, do=dout, **kernel.kwargs)[3:6]

  dq, dk, dv = jax.vmap(one)(*arrays, segments, *rows)
  return _rows(dq * _scale(q), q.shape[1]), _rows(dk, k.shape[1]), _rows(dv, k.shape[1])


def _prepare(q, k, v, mask, blocks, **options):
  """The kernel, its arrays [b, h, tokens, d] with scaled queries, and segment ids (or None)."""
  n, m = q.shape[1], k.shape[1]
  sizes = _sizes(n, m, _checked(blocks) or blocks_for(_device_kind(), q.shape[3], q.dtype))
  padded_n, padded_m = padding.rounded(n, sizes.block_q), padding.rounded(m, sizes.block_kv)
  kernel = splash_lib.make_splash_mha(
    mask_lib.MultiHeadMask([mask_lib.FullMask((padded_n, padded_m))] * q.shape[2]),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    interpret=mesh_lib.platform() != "tpu",
    **options,
  )
  arrays = _tokens(q * _scale(q), padded_n), _tokens(k, padded_m), _tokens(v, padded_m)
  if mask is None and padded_m == m:
    return kernel, arrays, None
  # A token attends to those of its own segment: queries are in segment 1, and so are the keys that
  # may be attended to. Queries that pad attend like others, and are cut off.
  allowed = jnp.ones(k.shape[:2], jnp.int32) if mask is None else mask.astype(jnp.int32)
  allowed = padding.longer(allowed, padded_m)
  queries = jnp.ones((q.shape[0], padded_n), jnp.int32)
  return kernel, arrays, splash_lib.SegmentIds(q=queries, kv=allowed)


def _sizes(n: int, m: int, blocks: Blocks) -> splash_lib.BlockSizes:
  """Tiles for n queries and m keys: all of them divide the padded lengths."""
  queries, keys = _block(n, blocks.queries), _block(m, blocks.keys)
  # The backward kernels run on the same padded arrays.
  back_queries = _divisor(padding.rounded(n, queries), blocks.backward_queries)
  back_keys = _divisor(padding.rounded(m, keys), blocks.backward_keys)
  return splash_lib.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_kv_compute=_divisor(keys, 512),
    block_q_dkv=back_queries,
    block_kv_dkv=back_keys,
    block_kv_dkv_compute=_divisor(back_keys, 512),
    block_q_dq=back_queries,
    block_kv_dq=back_keys,
  )


def _block(length: int, limit: int) -> int:
  """The largest tile up to the limit that adds at most a sixteenth to a length."""
  least = padding.rounded(length, LANES)
  sizes = range(LANES, min(limit, least) + 1, LANES)
  return max(size for size in sizes if 16 * padding.rounded(length, size) <= 17 * least)


def _divisor(length: int, limit: int) -> int:
  """The largest multiple of 128 up to the limit that divides a length (a multiple of 128)."""
  sizes = range(LANES, min(limit, length) + 1, LANES)
  return max(size for size in sizes if length % size == 0)


def _checked(blocks: Blocks | None) -> Blocks | None:
  for field, size in dataclasses.asdict(blocks).items() if blocks else ():
    if size < LANES or size % LANES:
      nearest = max(LANES, round(size / LANES) * LANES)
      raise ConfigError(
        f"attention block {field}={size} is not a multiple of {LANES}, as tiles of a TPU are: "
        f"use {nearest}"
      )
  return blocks


def _device_kind() -> str:
  mesh = mesh_lib.current()
  return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).device_kind


def _scale(q: Array) -> float:
  return q.shape[3] ** -0.5


def _tokens(x: Array, padded: int) -> Array:
  """[b, n, h, ...] -> [b, h, padded, ...], with zeros behind."""
  return jnp.swapaxes(padding.longer(x, padded), 1, 2)


def _rows(x: Array, length: int) -> Array:
  """The inverse of `_tokens`: [b, h, padded, ...] -> [b, length, h, ...]."""
  return jnp.swapaxes(x, 1, 2)[:, :length]
