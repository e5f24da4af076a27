"""The byte encoder and its tokens."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.errors import ConfigError
from mgen_jax.models import text

CONFIG = text.ByteEncoderConfig(width=16, layers=1, heads=2, mlp_width=32, max_length=24)


def _encoder(config=CONFIG):
  encoder = text.ByteEncoder(config)
  params = nn.meta.unbox(jax.jit(encoder.init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32)))
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
  apply = jax.jit(encoder.apply)
  features, mask = apply(params, short)
  padded, padded_mask = apply(params, long)
  np.testing.assert_allclose(features, padded[:, :13], rtol=1e-4, atol=1e-5)
  assert mask.all() and padded_mask.sum() == 13


def test_words_become_one_feature_each():
  encoder, params = _encoder(dataclasses.replace(CONFIG, max_words=4))
  texts = ["a red", "  a   red", "", "one two three four five"]
  tokens = jnp.asarray(text.encode_bytes(texts, 24))
  features, mask = jax.jit(encoder.apply)(params, tokens)
  assert features.shape == (4, 4, 16)
  assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
  short, _ = jax.jit(encoder.apply)(params, tokens[:1, :6])
  np.testing.assert_allclose(short, features[:1], rtol=1e-4, atol=1e-5)  # padding changes nothing


def test_bytes_count_for_their_own_word_only():
  tokens = jnp.asarray(text.encode_bytes(["ab c"], 8))
  shares = text.word_shares(tokens, 3)[0]
  expected = np.zeros((8, 3))
  expected[0, 0] = expected[1, 0] = 0.5
  expected[3, 1] = expected[4, 2] = 1  # "c" and the end
  np.testing.assert_array_equal(shares, expected)


def test_a_text_that_is_too_long_names_the_limit():
  encoder, params = _encoder()
  with pytest.raises(ConfigError, match="max_length 24"):
    jax.eval_shape(encoder.apply, params, jnp.ones((1, 25), jnp.int32))


@pytest.mark.parametrize("max_words", [None, 6])
def test_flops_count_the_compiled_matmuls(max_words):
  config = dataclasses.replace(CONFIG, max_words=max_words)
  encoder, params = _encoder(config)
  tokens = jnp.ones((1, 24), jnp.int32)
  counted = jax.jit(encoder.apply).lower(params, tokens).compile().cost_analysis()["flops"]
  formula = sum(text.flops(config, 24).values())
  assert formula <= counted < 1.25 * formula  # the rest is norms and activations
