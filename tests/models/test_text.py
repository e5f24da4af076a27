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


def test_pooling_shortens_the_text_and_still_ignores_padding():
  encoder, params = _encoder(dataclasses.replace(CONFIG, pool=4))
  features, mask = jax.jit(encoder.apply)(params, jnp.asarray(text.encode_bytes(["a red"], 8)))
  long, long_mask = jax.jit(encoder.apply)(params, jnp.asarray(text.encode_bytes(["a red"], 22)))
  assert features.shape == (1, 2, 16) and long.shape == (1, 6, 16)
  assert mask.tolist() == [[True, True]]
  assert long_mask.tolist() == [[True, True, False, False, False, False]]
  np.testing.assert_allclose(features, long[:, :2], rtol=1e-4, atol=1e-5)


def test_a_text_that_is_too_long_names_the_limit():
  encoder, params = _encoder()
  with pytest.raises(ConfigError, match="max_length 24"):
    jax.eval_shape(encoder.apply, params, jnp.ones((1, 25), jnp.int32))


def test_flops_count_the_compiled_matmuls():
  encoder, params = _encoder()
  tokens = jnp.ones((1, 24), jnp.int32)
  counted = jax.jit(encoder.apply).lower(params, tokens).compile().cost_analysis()["flops"]
  formula = sum(text.flops(CONFIG, 24).values())
  assert formula <= counted < 1.25 * formula  # the rest is norms and activations
