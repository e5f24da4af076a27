"""Attention through XLA in bounded memory: a slice of the queries at a time against all keys.

Both passes are written out. The backward one computes each slice's probabilities again from the
log-sum-exp, as in FlashAttention (Dao et al., 2022, section 3.1), and so nothing as large as the
scores is kept. The log-sum-exp that it is given may be that over more keys than it sees: a ring
over blocks of keys uses `forward` and `backward` on each. Not here: when it is used (`kernels.py`).

Shapes: q, out [b, n, h, d]; k, v [b, m, g, d] with h a multiple of g; mask [b, m] bool or None;
lse [b, n, h] fp32. Inside, heads come first, so that every product is one of plain matrices: the
rows of a slice of c queries are [b, g, h / g * c, d], its scores [b, g, h / g * c, m].
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.attention import padding

Array = jax.Array

# Of keys that may not be attended to: far below any score, and still finite when subtracted.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
  q: Array, k: Array, v: Array, mask: Array | None, limit: int, saved_name: str, parts: int = 1
) -> Array:
  """Attention with at most about `limit` scores in memory; `saved_name` names its residuals.

  The batch is taken in `parts`, none of which waits for another. XLA's CPU backend makes all
  matrices of a batched product on one core, one after another, but several products at a time.
  """
  return _attend_forward(q, k, v, mask, limit, saved_name, parts)[0]


def _attend_forward(q, k, v, mask, limit, saved_name, parts):
  made = _in_parts(forward, parts, limit, q, k, v, mask)
  out, lse = (checkpoint_name(x, saved_name) for x in made)
  return out, (q, k, v, mask, out, lse)


def _attend_backward(limit, saved_name, parts, saved, dout):
  del saved_name
  return (*_in_parts(backward, parts, limit, *saved, dout), None)


attend.defvjp(_attend_forward, _attend_backward)


def _in_parts(function, parts, limit, *arrays):
  """The results of `function` for the examples of each part, put together."""
  batch = arrays[0].shape[0]
  parts = min(parts, batch)
  if parts == 1:
    return function(*arrays, limit=limit)
  ends = [batch * part // parts for part in range(parts + 1)]
  made = [
    function(*jax.tree.map(lambda x, a=a, b=b: x[a:b], arrays), limit=limit // parts)
    for a, b in itertools.pairwise(ends)
  ]
  return tuple(jnp.concatenate(pieces) for pieces in zip(*made, strict=True))


def forward(q: Array, k: Array, v: Array, mask: Array | None, *, limit: int) -> tuple[Array, Array]:
  """The result in the dtype of q, and the log-sum-exp of each row."""
  scale = q.shape[-1] ** -0.5
  keys, values = _heads_first(k), _heads_first(v)

  def one(q):
    scores = _scores(q, keys, mask)
    top = _largest(scores)
    weights = jnp.exp((scores - top) * scale)
    total = weights.sum(-1, keepdims=True)
    out = _product(weights.astype(v.dtype), values) / total
    return out.astype(q.dtype), top * scale + jnp.log(total)

  out, lse = jax.lax.map(one, _split(q, k, limit))
  return _join(out, q), _join(lse, q)[..., 0]


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
  scale = q.shape[-1] ** -0.5
  keys, values = _heads_first(k), _heads_first(v)
  # The part of the gradient of a score that all keys share: FlashAttention's D, [b, n, h].
  shared = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

  def one(sums, rows):
    dk, dv = sums
    q, lse, shared, dout = rows
    weights = jnp.exp(_scores(q, keys, mask) * scale - lse)
    dscores = weights * (_against(dout, values) - shared) * scale
    dscores = dscores.astype(q.dtype)
    # Summed over the rows as [d, m]: XLA's CPU backend takes twice as long for [m, d].
    dv += _product(_flip(dout), weights.astype(dout.dtype))
    dk += _product(_flip(q), dscores)
    return (dk, dv), _product(dscores, keys).astype(q.dtype)

  rows = tuple(_split(x, k, limit) for x in (q, lse[..., None], shared[..., None], dout))
  zeros = (jnp.zeros(_flip(x).shape, jnp.float32) for x in (keys, values))
  (dk, dv), dq = jax.lax.scan(one, tuple(zeros), rows)
  dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))  # [b, g, d, m] -> [b, m, g, d]
  return _join(dq, q), dk.astype(k.dtype), dv.astype(v.dtype)


def _product(a: Array, b: Array) -> Array:
  """[b, g, r, s] and [b, g, s, t] -> [b, g, r, t]."""
  return _multiplied(a, b, 2)


def _against(a: Array, b: Array) -> Array:
  """[b, g, r, d] and [b, g, t, d] -> [b, g, r, t].

  Not a product with a transposed matrix: XLA's CPU backend would turn bf16 into fp32 for it.
  """
  return _multiplied(a, b, 3)


def _multiplied(a: Array, b: Array, axis: int) -> Array:
  # As `jnp.matmul` has it, which writes a batch of one as none.
  dimensions = ((3,), (axis,)), ((0, 1), (0, 1))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scores(q: Array, keys: Array, mask: Array | None) -> Array:
  """Not yet divided by the root of d, which fuses with what comes after the maximum."""
  scores = _against(q, keys)
  if mask is None:
    return scores
  allowed = jax.lax.broadcast_in_dim(mask, scores.shape, (0, 3))
  return jax.lax.select(allowed, scores, jnp.full_like(scores, MASKED))


def _largest(scores: Array) -> Array:
  """Of each row, as [b, g, r, 1]; on a CPU whatever NaNs are in it, since their weights are NaN all
  the same, and a maximum that minds them takes XLA four times as long there."""
  if mesh_lib.platform() != "cpu":
    return scores.max(-1, keepdims=True)
  lowest = jnp.asarray(-jnp.inf, scores.dtype)
  return jax.lax.reduce(scores, lowest, lambda a, b: jnp.where(a > b, a, b), (3,))[..., None]


def _heads_first(x: Array) -> Array:
  """[b, m, g, d] -> [b, g, m, d], and back."""
  return x.swapaxes(1, 2)


def _flip(x: Array) -> Array:
  """Transposed matrices."""
  return x.swapaxes(-1, -2)


def _split(x: Array, k: Array, limit: int) -> Array:
  """[b, n, h, d] -> [count, b, g, h / g * c, d], with zeros behind: slices of c queries."""
  batch, n, heads = x.shape[:3]
  count = math.ceil(n / max(1, limit // (batch * heads * k.shape[1])))
  size = -(-n // count)
  x = padding.longer(x, count * size)
  x = x.reshape(batch, count, size, k.shape[2], -1, x.shape[-1])  # [b, count, c, g, h / g, d]
  return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, batch, k.shape[2], -1, x.shape[-1])


def _join(x: Array, q: Array) -> Array:
  """The inverse of `_split` for rows of any length d: -> [b, n, h, d], with n and h of q."""
  batch, n, heads = q.shape[:3]
  count, _, groups, _, width = x.shape
  x = x.reshape(count, batch, groups, heads // groups, -1, width).transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(batch, -1, heads, width)[:, :n]
