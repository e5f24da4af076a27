"""Scaled dot-product attention: one function, its kernel chosen by the platform of the mesh.

The choice never looks at `jax.default_backend()`: a program for a TPU or a GPU may be compiled on
a host that has neither. Not here: projections, norms and position codes (see `models/`).
"""

import jax
import jax.numpy as jnp

from mgen_jax.errors import ConfigError
from mgen_jax.parallel import mesh as mesh_lib


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  context_parallel: str = "all_gather",
) -> jax.Array:
  """Full (bidirectional) attention with fp32 softmax statistics.

  Args:
    q: queries, [batch, queries, heads, head_dim].
    k: keys, [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
    v: values, [batch, keys, kv_heads, head_dim].
    mask: [batch, keys] bool, True where a key may be attended to; None attends to all. A row
      without any True attends to all keys evenly: mask the result where that matters.
    context_parallel: how queries see the keys of other devices on the mesh axis "context".

  Returns:
    [batch, queries, heads, head_dim], in the dtype of `q`.

  Raises:
    ConfigError: a way of context parallelism that is not there.
  """
  mesh = mesh_lib.current()
  if context_parallel != "all_gather" and mesh is not None and mesh.shape["context"] > 1:
    raise ConfigError(f"context_parallel {context_parallel!r} is not there yet: use 'all_gather'")
  # cuDNN has no fp32 kernels: fp32 on a GPU goes through XLA like everything on a CPU.
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  implementation = "cudnn" if mesh_lib.platform() in ("gpu", "cuda") and half else "xla"
  if mask is not None:
    mask = mask[:, None, None, :]  # [B, 1, 1, Nk], broadcast over heads and queries
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
