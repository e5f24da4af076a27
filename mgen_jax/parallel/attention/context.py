"""Attention across the devices of the context axis, each of which holds a part of the tokens.

Every function here runs inside a shard_map over the whole mesh and has one interface:

  q       [b, n, h, d], this device's queries; n is the same on all of them
  k, v    [b, m, g, d], this device's keys and values; for `local` all of them
  mask    [b, m] bool or None, True where a key may be attended to
  options the choice of the kernel for one device
  keys    the number of keys over all devices: what lies behind them is padding

and returns [b, n, h, d]. Not here: kernels (`kernels.py`), padding and checks (`__init__.py`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.errors import ConfigError, suggest
from mgen_jax.parallel.attention import kernels

AXIS = "context"

Array = jax.Array


def local(
  q: Array, k: Array, v: Array, mask: Array | None, *, options: kernels.Options, keys: int
) -> Array:
  """Every device has all keys: cross-attention, or a context axis of one."""
  del keys
  return kernels.attend(q, k, v, mask, options)


def all_gather(
  q: Array, k: Array, v: Array, mask: Array | None, *, options: kernels.Options, keys: int
) -> Array:
  """Gathers keys and values; backward reduce-scatters their gradients (paper, 3.1.6)."""
  k, v, mask = (x if x is None else _gather(x)[:, :keys] for x in (k, v, mask))
  return kernels.attend(q, k, v, mask, options)


def ulysses(
  q: Array, k: Array, v: Array, mask: Array | None, *, options: kernels.Options, keys: int
) -> Array:
  """Exchanges tokens for heads: each device attends over all tokens with some of its heads."""
  # Fewer key-value heads than devices: each head is given to several of them.
  heads = math.lcm(k.shape[2], jax.lax.axis_size(AXIS))
  k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  exchange = functools.partial(jax.lax.all_to_all, axis_name=AXIS, tiled=True)
  q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))  # [b, all n, h / C, d]
  mask = mask if mask is None else _gather(mask)[:, :keys]
  out = kernels.attend(q, k[:, :keys], v[:, :keys], mask, options)
  return exchange(out, split_axis=1, concat_axis=2)


def ring(
  q: Array, k: Array, v: Array, mask: Array | None, *, options: kernels.Options, keys: int
) -> Array:
  """Keys and values travel from device to device; each merges what it sees by log-sum-exp.

  Two shards of keys are held at a time, however long the axis is, and a transfer runs beside the
  block that is computed. Gradients of keys and values travel along in a second ring, in fp32.
  """
  if mask is not None:
    some = jax.lax.psum(mask.any(1), AXIS) > 0  # on any device
    k, mask = kernels.without_empty_rows(k, mask, some)
  shard = k.shape[1]
  if keys < shard * jax.lax.axis_size(AXIS):  # the last devices hold padding
    places = jax.lax.axis_index(AXIS) * shard + jnp.arange(shard)
    real = jnp.broadcast_to(places < keys, k.shape[:2])
    mask = real if mask is None else mask & real
  return _ring(kernels.pieces(q, k, options), q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(kernel: kernels.Pieces, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  return _ring_forward(kernel, q, k, v, mask)[0]


def _ring_forward(kernel: kernels.Pieces, q, k, v, mask):
  def merge(out, lse, block):  # softmax over what was seen and a block, from those over each
    block_out, block_lse = kernel.forward(q, *block)
    total = jnp.logaddexp(lse, block_lse)
    old, new = jnp.exp(lse - total), jnp.exp(block_lse - total)  # [b, n, h]
    return old[..., None] * out + new[..., None] * block_out.astype(jnp.float32), total

  def step(carry, _):
    block, out, lse = carry
    following = _pass_on(block)  # does not wait for the kernel, nor it for this
    return (following, *merge(out, lse, block)), None

  empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
  steps = jax.lax.axis_size(AXIS) - 1
  (block, *seen), _ = jax.lax.scan(step, ((k, v, mask), *empty), length=steps)
  out, lse = merge(*seen, block)
  # A remat policy that saves attention must save what the backward pass starts from, by name.
  out = checkpoint_name(out.astype(q.dtype), kernels.SAVED_NAME)
  lse = checkpoint_name(lse, kernels.SAVED_NAME)
  return out, (q, k, v, mask, out, lse)


def _ring_backward(kernel: kernels.Pieces, saved, dout):
  q, k, v, mask, out, lse = saved

  def add(block, sums):
    dq, dk, dv = kernel.backward(q, *block, out, lse, dout)
    return tuple(a + b.astype(jnp.float32) for a, b in zip(sums, (dq, dk, dv), strict=True))

  def step(carry, _):
    block, sums = carry
    following = _pass_on(block)
    dq, dk, dv = add(block, sums)
    return (following, (dq, *_pass_on((dk, dv)))), None

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  steps = jax.lax.axis_size(AXIS) - 1
  (block, sums), _ = jax.lax.scan(step, ((k, v, mask), zeros), length=steps)
  dq, dk, dv = add(block, sums)
  dk, dv = _pass_on((dk, dv))  # and so they are home
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _gather(x: Array) -> Array:
  """[b, n, ...] -> [b, C n, ...].

  The shards are an axis of their own, in front, and a token's numbers are one row: XLA then keeps
  the reduce-scatter of the gradient on a TPU. Within a row, or with heads in front of the shards
  (as the kernels have them), it becomes an all-reduce, twice the traffic, and a slice.
  """
  rows = jax.lax.all_gather(x.reshape(*x.shape[:2], -1), AXIS)  # [C, b, n, h d]
  return jnp.moveaxis(rows, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])


def _pass_on(tree):
  """Everything to the next device of the ring."""
  size = jax.lax.axis_size(AXIS)
  around = [(i, (i + 1) % size) for i in range(size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, around), tree)


METHODS = {None: local, "all_gather": all_gather, "ring": ring, "ulysses": ulysses}


def check(method: str | None) -> None:
  """Raises ConfigError for a method that does not exist."""
  if method not in METHODS:
    hint = suggest(str(method), filter(None, METHODS))
    raise ConfigError(f"context_parallel={method!r} is no method of context parallelism: {hint}")
