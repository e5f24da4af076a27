"""The byte encoder and its tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.models import text

CONFIG = text.ByteEncoderConfig(width=16, layers=1, heads=2, mlp_width=32, max_length=24)


def _encoder():
  encoder = text.ByteEncoder(CONFIG)
  params = nn.meta.unbox(encoder.init(jax.random.key(0), jnp.ones((1, 8), jnp.int32)))
  return encoder, params


def test_tokens_are_those_of_byt5():
  tokens = text.encode_bytes(["ab", "", "é", "abcdefgh"], 5)
  assert tokens.dtype == np.int32
  assert tokens.tolist() == [
    [100, 101, 1, 0, 0],
    [1, 0, 0, 0, 0],
    [0xC3 + 3, 0xA9 + 3, 1, 0, 0],
    [100, 101, 102, 103, 1],
  ]


def test_dropped_captions_equal_the_empty_caption():
  tokens = jnp.asarray(text.encode_bytes(["a red circle", "a blue square"], 16))
  dropped = text.drop_captions(tokens, jnp.array([True, False]))
  assert dropped[0].tolist() == text.encode_bytes([""], 16)[0].tolist()
  assert dropped[1].tolist() == tokens[1].tolist()


def test_padding_changes_no_feature():
  encoder, params = _encoder()
  short = jnp.asarray(text.encode_bytes(["a red circle"], 13))
  long = jnp.asarray(text.encode_bytes(["a red circle"], 24))
  features, mask = encoder.apply(params, short)
  padded, padded_mask = encoder.apply(params, long)
  np.testing.assert_allclose(features, padded[:, :13], rtol=1e-4, atol=1e-5)
  assert mask.all() and padded_mask.sum() == 13


def test_flops_count_the_compiled_matmuls():
  encoder, params = _encoder()
  tokens = jnp.ones((1, 24), jnp.int32)
  counted = jax.jit(encoder.apply).lower(params, tokens).compile().cost_analysis()["flops"]
  formula = sum(text.flops(CONFIG, 24).values())
  assert formula <= counted < 1.25 * formula  # the rest is norms and activations
