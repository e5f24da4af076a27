"""Matrix products as the platform takes them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.parallel.linear import multiply


def drawn(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
  """Normal numbers."""
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def loss(x, kernel, bias, target) -> jax.Array:
  """Any that has a gradient everywhere."""
  return (multiply(x, kernel, bias).astype(jnp.float32) * target).sum()


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (40, 24), (32, 32)])
def test_products_of_bf16_are_summed_in_fp32(d_in, d_out):
  """The result is rounded once; the gradient of an fp32 kernel not at all."""
  x, kernel = drawn(3, 5, d_in), drawn(d_in, d_out, dtype=jnp.float32)
  target = drawn(3, 5, d_out, dtype=jnp.float32)
  rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, kernel, target)]

  bias = drawn(d_out, dtype=jnp.float32)
  close = functools.partial(np.testing.assert_allclose, rtol=2**-8, atol=1e-5)

  out = multiply(x, kernel, bias)
  assert (out.dtype, out.shape) == (jnp.bfloat16, (3, 5, d_out))
  close(out.astype(float), rounded[0] @ rounded[1] + np.asarray(bias))
  close(multiply(x, kernel).astype(float), rounded[0] @ rounded[1])

  dx, dkernel, dbias = jax.jit(jax.grad(loss, (0, 1, 2)))(x, kernel, bias, target)
  assert (dx.dtype, dkernel.dtype, dbias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  close(dx.astype(float), rounded[2] @ rounded[1].T)
  close(dkernel, np.einsum("abi,abo->io", rounded[0], rounded[2]), rtol=1e-5)
  close(dbias, rounded[2].sum((0, 1)), rtol=1e-5)


def test_every_product_of_bf16_is_one_that_a_cpu_has():
  """With fp32 as the result, and no matrix that is transposed on its way in but by a copy."""
  arguments = drawn(8, 24), drawn(24, 40, dtype=jnp.float32), drawn(8, 40, dtype=jnp.float32)
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments[:2], None, arguments[2]).as_text()
  products = re.findall(
    r"dot_general .*contracting_dims = \[(\d)\] x \[(\d)\].*xbf16>, .*xbf16>\) -> \S+xf32>", text
  )
  assert sorted(products) == [("1", "0"), ("1", "1")]
  assert text.count("dot_general") == 2  # the product itself is not needed
