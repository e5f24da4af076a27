"""Long videos in pieces: exact where that is promised, constant memory, any devices, bad input."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax import coding
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import tiling
from mgen_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from mgen_jax.models.tiling import TilingConfig
from mgen_jax.parallel import mesh as mesh_lib

LOCAL = AutoencoderConfig(
  channels=4,
  multipliers=(1, 1),
  res_blocks=0,
  decoder_res_blocks=0,
  latent_channels=4,
  patch=(2, 4, 4),
  space_down=(0,),
  time_down=(0, 1),
  temporal_attention=False,
  groups=2,
  conv_method="matmul",
)
GLOBAL = dataclasses.replace(LOCAL, temporal_attention=True)
EXACT = TilingConfig(mode="exact", frames=16, overlap=8)
FRAMES, SIDE = 157, 16


@functools.cache
def _params(model):
  made = jax.jit(Autoencoder(model).init)(jax.random.key(0), jnp.zeros((1, 8, SIDE, SIDE, 3)))
  leaves, tree = jax.tree.flatten(nn.meta.unbox(made)["params"])
  keys = jax.random.split(jax.random.key(1), len(leaves))
  # Temporal layers that are no longer the identity.
  return jax.tree.unflatten(
    tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )


def _video(frames=FRAMES, side=SIDE):
  """Noise: no frame can be guessed from others."""
  return np.random.default_rng(0).uniform(-1, 1, (frames, side, side, 3)).astype(np.float32)


@functools.cache
def _untiled(model, frames=FRAMES):
  apply = jax.jit(Autoencoder(model).apply)
  return tuple(np.asarray(x[0]) for x in apply({"params": _params(model)}, _video(frames)[None]))


def _coder(model, config, devices=1):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:devices])
  return coding.Coder(model, _params(model), config, mesh)


def _chunks(x, size=7):
  return (x[i : i + size] for i in range(0, len(x), size))


def _encode(coder, video):
  means, logvars = zip(*coder.encode(_chunks(video)), strict=True)
  return np.concatenate(means), np.concatenate(logvars)


def _decode(coder, latents, frames=FRAMES):
  return np.concatenate(list(coder.decode(_chunks(latents, 3), frames)))


@pytest.mark.parametrize("model", [LOCAL, GLOBAL], ids=["local", "attends to all time"])
def test_exact_pieces_equal_the_whole(model):
  made, mean, logvar = _untiled(model)
  coder = _coder(model, EXACT)
  for a, b in zip(_encode(coder, _video()), (mean, logvar), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  np.testing.assert_allclose(_decode(coder, mean), made, atol=1e-4)


@pytest.mark.slow
def test_a_thousand_frames_in_exact_pieces_equal_the_whole():
  """Of a model that attends to all time, in the paper's pieces of 32 frames."""
  made, mean, logvar = _untiled(GLOBAL, 1024)
  coder = _coder(GLOBAL, TilingConfig(mode="exact"))
  for a, b in zip(_encode(coder, _video(1024)), (mean, logvar), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  rebuilt = _decode(coder, mean, 1024)
  np.testing.assert_allclose(rebuilt, made, atol=1e-4)
  blended = _decode(_coder(GLOBAL, TilingConfig()), mean, 1024)
  assert blended.shape == made.shape and np.abs(blended - made).max() > 1e-2  # what exact is for


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_reach_is_the_models_and_no_more(side):
  """Changing an input outside the reach changes nothing; at both of its ends it does."""
  model, params = Autoencoder(LOCAL), {"params": _params(LOCAL)}
  if side == "encoder":
    x, place = jnp.asarray(_video(112))[None], 6
    low, high = tiling.encoder_input(LOCAL, place, place)
    method, pick = "encode", lambda out: out[0][:, place]
  else:
    x, place = jax.random.normal(jax.random.key(3), (1, 16, 2, 2, 4)), 61
    low, high = tiling.decoder_input(LOCAL, place, place)
    method, pick = "decode", lambda out: out[:, place]
  gradient = jax.jit(
    jax.grad(lambda x: jnp.square(pick(model.apply(params, x, method=method))).sum())
  )(x)
  touched = np.flatnonzero(np.abs(np.asarray(gradient)).max((0, 2, 3, 4)) > 0)
  assert low > 0 and high < x.shape[1] - 1
  assert (touched.min(), touched.max()) == (low, high)


def test_blended_pieces_are_coded_alone_and_cross_faded():
  made, mean, _ = _untiled(LOCAL)
  coder = _coder(LOCAL, TilingConfig(frames=32, overlap=16))
  means, _ = _encode(coder, _video())
  apply = jax.jit(functools.partial(Autoencoder(LOCAL).apply, method="encode"))
  params = {"params": _params(LOCAL)}
  alone = [apply(params, _video()[None, s : s + 32])[0][0] for s in range(0, FRAMES, 32)]
  np.testing.assert_allclose(means, np.concatenate(alone), atol=1e-4)
  assert means.shape == mean.shape

  decode = jax.jit(functools.partial(Autoencoder(LOCAL).apply, method="decode"))
  pieces = {s: decode(params, mean[None, s : s + 4])[0] for s in (0, 2, 4)}
  blended = _decode(coder, mean)
  assert blended.shape == made.shape
  np.testing.assert_allclose(blended[:16], pieces[0][:16], atol=1e-4)
  for j in (0, 5, 15):  # the later piece's weight is j / 16
    expected = (1 - j / 16) * pieces[0][16 + j] + j / 16 * pieces[2][j]
    np.testing.assert_allclose(blended[16 + j], expected, atol=1e-4)
  assert len(list(tiling.starts(32, 4, 2))) == 15  # 256 frames, as the paper's arithmetic has it


def test_several_devices_and_batches_change_nothing():
  mean = _untiled(LOCAL)[1]
  one = _decode(_coder(LOCAL, TilingConfig(frames=16, overlap=8)), mean)
  many = _coder(LOCAL, TilingConfig(frames=16, overlap=8, batch=3), devices=4)
  np.testing.assert_allclose(_decode(many, mean), one, atol=1e-5)


def test_a_stream_is_read_as_it_is_needed_and_forgotten():
  """What bounds the memory: neither side ever holds more than a few pieces."""
  for config in (TilingConfig(frames=16, overlap=8), EXACT):
    read, most = 0, 0

    def frames():
      nonlocal read
      for chunk in _chunks(_video(400), 8):
        read += len(chunk)
        yield chunk

    done = 0
    for mean, _ in _coder(LOCAL, config).encode(frames()):
      done += len(mean) * LOCAL.time_stride
      most = max(most, read - done)
    assert done == 400
    assert most <= 16 + 2 * max(abs(edge) for edge in tiling.encoder_input(LOCAL, 0, 0)), (
      config.mode
    )


def test_pieces_in_space_cover_every_pixel():
  """A model that sees each position by itself cannot tell whether it sees all."""
  model = dataclasses.replace(
    LOCAL,
    multipliers=(1,),
    kernel=1,
    temporal=False,
    time_down=(),
    space_down=(),
    mid_attention=False,
    norm="rms",
    patch=(1, 8, 8),
  )
  cut = _coder(model, TilingConfig(frames=32, overlap=16, side=32, side_overlap=16))
  whole = _coder(model, TilingConfig(frames=32, overlap=16))
  video = _video(2, 72)
  means, expected = _encode(cut, video)[0], _encode(whole, video)[0]
  assert means.shape == (2, 9, 9, 4)
  np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(_decode(cut, means, 2), _decode(whole, means, 2), rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
  coder = _coder(LOCAL, TilingConfig(frames=16, overlap=8))
  with pytest.raises(UserError, match="0 frames"):
    list(coder.encode([]))
  with pytest.raises(ConfigError, match="height 20 is not divisible"):
    list(coder.encode([np.zeros((8, 20, 16, 3), np.uint8)]))
  broken = _video(8)
  broken[3, 2, 1] = np.nan
  with pytest.raises(UserError, match="3 pixels are not finite"):
    list(coder.encode([broken]))
  for wrong, words in (
    ([np.zeros((8, 16, 16, 4), np.uint8)], r"\(8, 16, 16, 4\) are not"),
    ([np.zeros((8, 16, 16, 3), np.int64)], "frames are int64: give uint8"),
    ([_video(8), _video(8)[:, :8]], "changes its size, from 16x16 to 8x16"),
  ):
    with pytest.raises(UserError, match=words):
      list(coder.encode(wrong))
  latents = np.zeros((2, 2, 2, 4), np.float32)
  for chunks, words in (
    ([latents], "hold 16 frames, but 17"),
    ([latents[..., :3]], r"\(2, 2, 2, 3\) are not .* 4\]: decode them with"),
    ([latents * np.nan], "32 values of the latents are not finite"),
    ([], "0 frames"),
  ):
    with pytest.raises(UserError, match=words):
      list(coder.decode(chunks, 17))
  for model in (LOCAL, GLOBAL):
    with pytest.raises(UserError, match="0 frames"):
      list(_coder(model, EXACT).decode([]))
  for wrong, words in (
    ({"mode": "halo"}, "unknown mode"),
    ({"frames": 12}, "do not divide by the autoencoder's stride 8"),
    ({"overlap": 24}, "more than half"),
    ({"mode": "exact", "side": 32}, "never exact"),
    ({"side": 36}, "must be multiples"),
  ):
    with pytest.raises(ConfigError, match=words):
      TilingConfig(**wrong).check(LOCAL)


def test_sizes_are_fitted_by_word_only():
  frames = np.arange(2 * 13 * 22 * 3, dtype=np.uint8).reshape(2, 13, 22, 3)
  assert coding.fit_size(frames, (8, 8), "refuse") is frames
  padded, cropped = (coding.fit_size(frames, (8, 8), how) for how in ("pad", "crop"))
  assert padded.shape == (2, 16, 24, 3) and cropped.shape == (2, 8, 16, 3)
  np.testing.assert_array_equal(padded[:, :13, :22], frames)
  np.testing.assert_array_equal(padded[:, 15, 23], frames[:, 12, 21])
  np.testing.assert_array_equal(cropped, frames[:, 2:10, 3:19])
  with pytest.raises(UserError, match="unknown fit"):
    coding.fit_size(frames, (8, 8), "stretch")
