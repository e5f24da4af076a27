"""The attention kernel for the arrays of one device: which one, by platform, dtype and size.

Not here: anything that crosses devices (`context.py`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.errors import ConfigError, suggest
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.attention import blockwise, padding, splash

Array = jax.Array

KERNELS = ("plain", "blockwise", "cudnn", "splash")

# What the backward pass of a kernel starts from (its result and log-sum-exp) carries this name, for
# the policies of `jax.checkpoint` that save it rather than run the kernel again. Nothing else may:
# what is made of the result would be kept beside it. cuDNN's cannot be named, but for its result:
# such a policy must keep all outputs of the primitive.
SAVED_NAME = "attention"
CUDNN_PRIMITIVE = "dot_product_attention_fwd_wrapper"

# As many scores of a layer may XLA hold on a device: 256 MiB in fp32, and several times that in the
# gradient. On a CPU no less, though its caches are smaller: slices of them one after another keep
# its cores waiting for each other (with 2^22 a gradient took about twice as long).
SCORES = 1 << 26

GPU = ("gpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Options:
  """What a caller may override: the platform's kernel, and the table of splash's blocks."""

  kernel: str | None = None
  blocks: splash.Blocks | None = None


@dataclasses.dataclass(frozen=True)
class Pieces:
  """A kernel that can be run block by block, by those who merge the blocks themselves.

  forward(q, k, v, mask) -> the softmax over these keys alone, [b, n, h, d], and its log-sum-exp,
    [b, n, h] fp32. A row without any allowed key has a log-sum-exp near the lowest float.
  backward(q, k, v, mask, out, lse, dout) -> the gradients that come through these keys, where
    out and lse are those over all keys.
  """

  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, Array, Array]]


def check(kernel: str | None) -> None:
  """Raises ConfigError for a kernel that does not exist."""
  if kernel is not None and kernel not in KERNELS:
    raise ConfigError(f"kernel={kernel!r} is no attention kernel: {suggest(str(kernel), KERNELS)}")


def choose(q: Array, k: Array) -> str:
  """The kernel for q [b, n, h, d] and k [b, m, g, d] on the platform of the mesh in use."""
  platform = mesh_lib.platform()
  if platform == "tpu" and max(q.shape[1], k.shape[1]) > splash.LANES:
    return "splash"  # below one block of it, its padding is most of the work
  # cuDNN has no fp32 kernels, and heads of up to 128 on every generation that has it at all.
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  if platform in GPU and half and q.shape[3] <= 128 and q.shape[3] % 8 == 0:
    return "cudnn"
  scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
  # On a CPU the gradient of "plain" takes twice as long: it passes over the scores more often.
  return "plain" if platform != "cpu" and scores <= SCORES else "blockwise"


def parts() -> int:
  """How many parts of a batch "blockwise" makes side by side: several where the cores of a CPU are
  one device, with which a step of a small model takes 0.9 to 0.95 of the time."""
  mesh = mesh_lib.current()
  return 2 if mesh_lib.platform() == "cpu" and (mesh is None or mesh.size == 1) else 1


def attend(q: Array, k: Array, v: Array, mask: Array | None, options: Options) -> Array:
  """Attention of q [b, n, h, d] to k, v [b, m, g, d] where mask [b, m] is True."""
  kernel = options.kernel or choose(q, k)
  if kernel == "plain":
    return checkpoint_name(plain(q, k, v, mask), SAVED_NAME)
  if mask is not None:
    k, mask = without_empty_rows(k, mask, mask.any(1))
  if kernel == "cudnn":
    return fused(q, k, v, mask)
  if kernel == "splash":
    return splash.attend(q, k, v, mask, blocks=options.blocks, saved_name=SAVED_NAME)
  return blockwise.attend(q, k, v, mask, SCORES, SAVED_NAME, parts())


def pieces(q: Array, k: Array, options: Options) -> Pieces:
  """The kernel that a ring over blocks of keys like `k` uses.

  cuDNN's gradient cannot be told the statistics over all keys: on a GPU the blocks are XLA's.
  """
  if (options.kernel or choose(q, k)) == "splash":
    return Pieces(
      functools.partial(splash.forward, blocks=options.blocks),
      functools.partial(splash.backward, blocks=options.blocks),
    )
  return Pieces(
    functools.partial(blockwise.forward, limit=SCORES),
    functools.partial(blockwise.backward, limit=SCORES),
  )


def plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """XLA, with all the scores in memory at once."""
  if mask is not None:
    mask = mask[:, None, None, :]  # [b, 1, 1, m], broadcast over heads and queries
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def fused(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """cuDNN, whose only mask that costs no [n, m] bias is a length: the allowed keys go in front.

  Attention does not depend on the order of the keys, and moving them is linear in their number.
  JAX refuses its gradient for odd lengths: they get one token more.
  """
  n, m = q.shape[1], k.shape[1]
  lengths = None
  if mask is not None:
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, order, axis=1, mode="promise_in_bounds") for x in (k, v))
    lengths = mask.sum(1, dtype=jnp.int32)
  elif m % 2:
    lengths = jnp.full(k.shape[:1], m, jnp.int32)
  q, k, v = (padding.longer(x, padding.rounded(x.shape[1], 2)) for x in (q, k, v))
  return jax.nn.dot_product_attention(
    q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
  )[:, :n]


def without_empty_rows(k: Array, mask: Array, some: Array) -> tuple[Array, Array]:
  """Makes examples without any allowed key attend to all keys evenly, in every kernel alike.

  Equal scores are what keys of zeros give. `some` [b] is True for the other examples.
  """
  some_of = functools.partial(jax.lax.broadcast_in_dim, some, broadcast_dimensions=(0,))
  return jax.lax.select(some_of(k.shape), k, jnp.zeros_like(k)), mask | ~some_of(mask.shape)
