"""JAX's own random numbers, bit for bit, as programs of a tenth of the length.

JAX writes the twenty rounds of Threefry-2x32 (Salmon et al., 2011) out for every shape that is
drawn, 220 lines of StableHLO each on a GPU or TPU. Here they are five turns of a loop, as JAX
itself has them on a CPU. Every key made from `KEYS` gives the numbers that JAX's default key gives.

Not here: which key is for what (`state.py`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as jex_random

Array = jax.Array

_ROTATIONS = np.array([[13, 15, 26, 6], [17, 29, 16, 24]] * 3, np.uint32)[:5]  # of four rounds each
_PARITY = np.uint32(0x1BD11BDA)
_FEW = 4  # keys or numbers that are made one by one, by the program that makes one


@jax.custom_batching.custom_vmap
def _hash(key: Array, counter: Array) -> tuple[Array, Array]:
  """The two words of the counters (0, counter) [...] under keys [..., 2], all uint32."""
  return _rounds(key, counter)


@_hash.def_vmap
def _hash_of_many(size, batched, key, counter):
  """The same program for many keys, many counters, or both."""
  key, counter = (
    x if b else jnp.broadcast_to(x, (size, *x.shape))
    for x, b in zip((key, counter), batched, strict=True)
  )
  rank = max(key.ndim - 1, counter.ndim)
  key = key.reshape(*key.shape[:-1], *(1,) * (rank - key.ndim + 1), 2)
  return _hash(key, counter.reshape(counter.shape + (1,) * (rank - counter.ndim))), (True, True)


@jax.jit
def _rounds(key: Array, counter: Array) -> tuple[Array, Array]:
  def turn(carry, inputs):
    a, b, (one, two, three) = carry
    number, rotations = inputs
    for rotation in rotations:
      a, b = _round(a, b, rotation)
    return (a + two, b + three + number, (two, three, one)), None

  first, second = key[..., 0], key[..., 1]
  shape = jnp.broadcast_shapes(first.shape, counter.shape)
  words = first, second, first ^ second ^ _PARITY
  start = jnp.broadcast_to(first, shape), counter + second, words
  numbers = np.arange(1, len(_ROTATIONS) + 1, dtype=np.uint32)
  return jax.lax.scan(turn, start, (numbers, _ROTATIONS))[0][:2]


@jax.jit
def _round(a: Array, b: Array, rotation: Array) -> tuple[Array, Array]:
  a = a + b
  return a, a ^ (b << rotation | b >> (32 - rotation))


@jax.jit
def _child(key: Array, counter: Array) -> Array:
  """The words of one counter as a key [2]."""
  return jnp.stack(_hash(key, counter))


def _draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """The words of the counters 0, 1, 2, ... in row-major order."""
  count = math.prod(shape)
  if count >= 1 << 32:
    raise ValueError(f"{shape} are more numbers than are drawn from one key: split it.")
  if count == 1:
    return tuple(word.reshape(shape) for word in _hash(key, jnp.uint32(0)))
  if 0 < count <= _FEW:
    words = [_hash(key, jnp.uint32(i)) for i in range(count)]
    return tuple(jnp.stack(word).reshape(shape) for word in zip(*words, strict=True))
  low = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  for dim in range(len(shape) - 1):  # one by one, so that each device makes its own part
    stride = np.uint32(math.prod(shape[dim + 1 :]))
    low += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
  if len(shape) == 1:  # a row of numbers is a row of keys, too
    key = jnp.broadcast_to(key, (*shape, 2))
  return _hash(key, low)


def _seed(seed: Array) -> Array:
  return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
  count = math.prod(shape)
  if 0 < count <= _FEW:
    return jnp.stack([_child(key, jnp.uint32(i)) for i in range(count)]).reshape(*shape, 2)
  return jnp.stack(_draw(key, shape), axis=-1)


def _fold_in(key: Array, data: Array) -> Array:
  return _child(key, data.astype(jnp.uint32))


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
  high, low = _draw(key, shape)
  if bit_width == 64:
    return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
  return (high ^ low).astype(f"uint{bit_width}")


KEYS = jex_random.define_prng_impl(
  key_shape=(2,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="looped_threefry2x32",
  tag="lfry",
)
