"""Scaled dot-product attention: one function, its kernel chosen by the platform of the mesh.

The choice never looks at `jax.default_backend()`: a program for a TPU or a GPU may be compiled on
a host that has neither. Not here: projections, norms and position codes (see `models/`).
"""

import jax
import jax.numpy as jnp

from mgen_jax.parallel import mesh as mesh_lib


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
  """Full (bidirectional) attention with fp32 softmax statistics.

  Args:
    q: queries, [batch, queries, heads, head_dim].
    k: keys, [batch, keys, heads, head_dim].
    v: values, [batch, keys, heads, head_dim].
    mask: [batch, keys] bool, True where a key may be attended to; None attends to all. A row
      without any True attends to all keys evenly: mask the result where that matters.

  Returns:
    [batch, queries, heads, head_dim], in the dtype of `q`.
  """
  # cuDNN has no fp32 kernels: fp32 on a GPU goes through XLA like everything on a CPU.
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  implementation = "cudnn" if mesh_lib.platform() in ("gpu", "cuda") and half else "xla"
  if mask is not None:
    mask = mask[:, None, None, :]  # [B, 1, 1, Nk], broadcast over heads and queries
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
