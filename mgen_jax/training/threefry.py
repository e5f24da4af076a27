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
def _hash(first: Array, second: Array, high: Array, low: Array) -> tuple[Array, Array]:
  """The two words of each counter (high, low) [...] under a key of two words, all uint32."""
  return _rounds(first, second, high, low)


@_hash.def_vmap
def _hash_of_many(size, batched, *words):
  """The same program for many keys, many counters, or both."""
  lead = [
    w if b else jnp.broadcast_to(w, (size, *w.shape)) for w, b in zip(words, batched, strict=True)
  ]
  rank = max(w.ndim for w in lead)
  aligned = [w.reshape(w.shape + (1,) * (rank - w.ndim)) for w in lead]
  return _hash(*aligned), (True, True)


@jax.jit
def _rounds(first: Array, second: Array, high: Array, low: Array) -> tuple[Array, Array]:
  def turn(carry, inputs):
    a, b, (one, two, three) = carry
    number, rotations = inputs
    for rotation in rotations:
      a = a + b
      b = a ^ (b << rotation | b >> (32 - rotation))
    return (a + two, b + three + number, (two, three, one)), None

  start = (high + first, low + second, (first, second, first ^ second ^ _PARITY))
  numbers = np.arange(1, len(_ROTATIONS) + 1, dtype=np.uint32)
  return jax.lax.scan(turn, start, (numbers, _ROTATIONS))[0][:2]


def _draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """The words of the counters 0, 1, 2, ... in row-major order."""
  count = math.prod(shape)
  if count >= 1 << 32:
    raise ValueError(f"{shape} are more numbers than are drawn from one key: split it.")
  zero = jnp.zeros((), jnp.uint32)
  if 0 < count <= _FEW:
    words = [_hash(key[0], key[1], zero, zero + np.uint32(i)) for i in range(count)]
    return tuple(jnp.stack(word).reshape(shape) for word in zip(*words, strict=True))
  low = jnp.zeros(shape, jnp.uint32)
  for dim in range(len(shape)):  # dimension by dimension, so that each device makes its own part
    stride = np.uint32(math.prod(shape[dim + 1 :]))
    low += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
  first, second = (jnp.broadcast_to(k, shape) if len(shape) == 1 else k for k in (key[0], key[1]))
  return _hash(first, second, jnp.zeros_like(low), low)  # a row of numbers is a row of keys, too


def _seed(seed: Array) -> Array:
  return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
  return jnp.stack(_draw(key, shape), axis=-1)


def _fold_in(key: Array, data: Array) -> Array:
  return jnp.stack(_hash(key[0], key[1], jnp.zeros((), jnp.uint32), data.astype(jnp.uint32)))


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
