"""Attention through XLA in bounded memory: a slice of the queries at a time against all keys.

Both passes are written out. The backward one computes each slice's probabilities again from the
log-sum-exp, as in FlashAttention (Dao et al., 2022, section 3.1), and so nothing as large as the
scores is kept. The log-sum-exp that it is given may be that over more keys than it sees: a ring
over blocks of keys uses `forward` and `backward` on each. Not here: when it is used (`kernels.py`).

Shapes: q, out [b, n, h, d]; k, v [b, m, g, d] with h a multiple of g; mask [b, m] bool or None;
lse [b, n, h] fp32. In a slice of c queries: q [b, c, g, h / g, d], scores [b, g, h / g, c, m].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Of keys that may not be attended to: far below any score, and still finite when subtracted.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(q: Array, k: Array, v: Array, mask: Array | None, limit: int, saved_name: str) -> Array:
  """Attention with at most about `limit` scores in memory; `saved_name` names its residuals."""
  del saved_name
  return forward(q, k, v, mask, limit=limit)[0]


def _attend_forward(q, k, v, mask, limit, saved_name):
  out, lse = (checkpoint_name(x, saved_name) for x in forward(q, k, v, mask, limit=limit))
  return out, (q, k, v, mask, out, lse)


def _attend_backward(limit, saved_name, saved, dout):
  del saved_name
  return (*backward(*saved, dout, limit=limit), None)


attend.defvjp(_attend_forward, _attend_backward)


def forward(q: Array, k: Array, v: Array, mask: Array | None, *, limit: int) -> tuple[Array, Array]:
  """The result in the dtype of q, and the log-sum-exp of each row."""
  groups = k.shape[2]

  def one(q):
    scores = _scores(q, k, mask)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = _product("bgrcm,bmgd->bcgrd", (weights / total).astype(v.dtype), v)
    lse = (top + jnp.log(total))[..., 0]  # [b, g, r, c]
    return out.astype(q.dtype), jnp.moveaxis(lse, 3, 1)

  count = _slices(q, k, limit)
  out, lse = jax.lax.map(one, _split(_grouped(q, groups), count))
  return (
    _join(out, q.shape[1]).reshape(q.shape[:3] + v.shape[3:]),
    _join(lse, q.shape[1]).reshape(q.shape[:3]),
  )


def backward(
  q: Array,
  k: Array,
  v: Array,
  mask: Array | None,
  out: Array,
  lse: Array,
  dout: Array,
  *,
  limit: int,
) -> tuple[Array, Array, Array]:
  """The gradients of q, k and v, in their dtypes."""
  groups = k.shape[2]
  # The part of the gradient of a score that all keys share: FlashAttention's D, [b, n, h].
  shared = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

  def one(sums, rows):
    dk, dv = sums
    q, lse, shared, dout = rows
    scores = _scores(q, k, mask)
    weights = jnp.exp(scores - jnp.moveaxis(lse, 1, 3)[..., None])
    dweights = _product("bcgrd,bmgd->bgrcm", dout, v)
    dscores = weights * (dweights - jnp.moveaxis(shared, 1, 3)[..., None])
    dscores = (dscores * q.shape[-1] ** -0.5).astype(q.dtype)
    dv += _product("bgrcm,bcgrd->bmgd", weights.astype(dout.dtype), dout)
    dk += _product("bgrcm,bcgrd->bmgd", dscores, q)
    return (dk, dv), _product("bgrcm,bmgd->bcgrd", dscores, k).astype(q.dtype)

  count = _slices(q, k, limit)
  rows = tuple(_split(_grouped(x, groups), count) for x in (q, lse, shared, dout))
  zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(one, zeros, rows)
  return _join(dq, q.shape[1]).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _product(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, mask: Array | None) -> Array:
  scores = _product("bcgrd,bmgd->bgrcm", q, k) * q.shape[-1] ** -0.5
  return scores if mask is None else jnp.where(mask[:, None, None, None], scores, MASKED)


def _slices(q: Array, k: Array, limit: int) -> int:
  """Into how many slices the queries go."""
  row = q.shape[0] * q.shape[2] * k.shape[1]
  return math.ceil(q.shape[1] / max(1, limit // row))


def _grouped(x: Array, groups: int) -> Array:
  """[b, n, h, ...] -> [b, n, g, h / g, ...]."""
  return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _split(x: Array, count: int) -> Array:
  """[b, n, ...] -> [count, b, ceil(n / count), ...], with zeros behind."""
  size = -(-x.shape[1] // count)
  x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
  """The inverse of `_split`: [count, b, c, ...] -> [b, length, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
