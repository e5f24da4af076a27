"""Every encoder equals its public reference: values in fp32 and bf16, and gradients.

The references are `transformers` on torch, with random weights saved by them and read by us. Each
limit is the promise of the project (1e-5 absolute in fp32, a cosine of 0.999 in bf16). What was
found is printed: `python -m pytest tests/encoders/test_parity.py -q -s`.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax import encoders
from mgen_jax.encoders.families import FAMILIES
from mgen_jax.models import llama
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.weights import folders, transfer
from mgen_jax.weights import match as match_lib
from tests.encoders import reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

LIMIT = 1e-5


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """name -> (reference, our encoder), made once."""
  made = {}

  def get(name):
    if name not in made:
      model = reference.make(name)
      folder = reference.save(model, tmp_path_factory.mktemp(name) / "hf")
      made[name] = model, encoders.load("any", folder, devices=jax.devices()[:1])
    return made[name]

  return get


def error(ours, theirs, mask=None):
  difference = np.abs(np.asarray(ours, np.float32) - theirs.detach().numpy())
  return float((difference if mask is None else difference[mask]).max())


def run(encoder, *inputs, dtype="float32"):
  config = dataclasses.replace(encoder.config, dtype=dtype)
  module = FAMILIES[encoder.family].module(config)
  return jax.jit(lambda p, x: module.apply({"params": p}, *x))(encoder.params, inputs)


def cosine(a, b):
  a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (a, b))
  return ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min()


def say(found):
  test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
  print(f"\n{test}: {found}", end=" ")


def within(found, limit=LIMIT):
  """The largest difference is at most so large."""
  say(f"error {found:.1e}, limit {limit:.0e}")
  assert found <= limit


def alike(found, limit=0.999):
  """The least cosine of a feature in bf16 and in fp32 is at least so large."""
  say(f"cosine {found:.6f}, limit {limit}")
  assert found >= limit


@pytest.mark.parametrize("name", ["t5_v1.0", "t5_v1.1", "ul2", "byt5", "umt5"])
def test_t5_equals_the_reference(pair, name):
  model, encoder = pair(name)
  ids, mask = reference.tokens(encoder.config.vocab, (40, 17))
  theirs = model(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
  within(error(run(encoder, ids, mask), theirs, mask))
  half = np.asarray(run(encoder, ids, mask, dtype="bfloat16"), np.float32)
  assert np.isfinite(half).all()
  alike(cosine(half[mask], theirs.detach().numpy()[mask]))


def test_t5_of_300_tokens_reaches_the_far_buckets(pair):
  model, encoder = pair("t5_v1.1")
  ids, mask = reference.tokens(encoder.config.vocab, (300, 257))
  theirs = model(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
  within(error(run(encoder, ids, mask), theirs, mask))


def test_padding_of_a_t5_changes_nothing_and_a_row_of_padding_is_finite(pair):
  _, encoder = pair("ul2")
  ids, mask = reference.tokens(encoder.config.vocab, (12, 5, 3))
  mask[2] = False
  made = run(encoder, ids, mask)
  other = run(encoder, np.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(np.asarray(made)[mask], np.asarray(other)[mask])
  assert np.isfinite(made).all()
  assert np.isfinite(np.asarray(run(encoder, ids, mask, dtype="bfloat16"), np.float32)).all()


def clip_tokens(lengths=(20, 9)):
  """With an end in each row; what follows it is the end again in one row, as some tools pad."""
  ids, mask = reference.tokens(95, lengths)
  for row, length in enumerate(lengths):
    ids[row, length - 1 :] = 96
  return ids, mask


@pytest.mark.parametrize("name", ["clip_text_quick_gelu", "clip_text_gelu", "clip_text_bare"])
def test_the_text_tower_equals_the_reference(pair, name):
  model, encoder = pair(name)
  ids, mask = clip_tokens()
  theirs = model(torch.tensor(ids).long(), output_hidden_states=True)
  ours = run(encoder, ids)
  within(error(ours.last, theirs.last_hidden_state))
  within(error(ours.penultimate, theirs.hidden_states[-2]))
  if name == "clip_text_bare":
    assert ours.projected is None
    within(error(ours.pooled, theirs.pooler_output))
  else:
    within(error(ours.projected, theirs.text_embeds))
  half = run(encoder, ids, dtype="bfloat16")
  alike(cosine(np.asarray(half.last, np.float32), theirs.last_hidden_state.detach()))
  if name != "clip_text_gelu":
    return
  masked = run(encoder, ids, mask)  # causal: the mask changes nothing before the end
  np.testing.assert_allclose(np.asarray(masked.last)[mask], np.asarray(ours.last)[mask], atol=LIMIT)


def test_pooling_of_configs_that_say_eos_2_is_at_the_largest_token(tmp_path):
  keys = {**reference.CLIP_TEXT, "eos_token_id": 2, "hidden_act": "gelu"}
  torch.manual_seed(1)
  model = reference.perturbed(transformers.CLIPTextModel(transformers.CLIPTextConfig(**keys)))
  encoder = encoders.load("any", reference.save(model, tmp_path / "hf"), devices=jax.devices()[:1])
  assert encoder.config.pooling == "argmax"
  ids, _ = clip_tokens()
  theirs = model(torch.tensor(ids).long())
  within(error(run(encoder, ids).pooled, theirs.pooler_output))


@pytest.mark.parametrize("name", ["clip_vision", "clip_vision_bare"])
def test_the_vision_tower_equals_the_reference(pair, name):
  model, encoder = pair(name)
  images = np.random.default_rng(0).normal(size=(3, 28, 28, 3)).astype(np.float32)
  theirs = model(torch.tensor(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
  ours = run(encoder, images)
  within(error(ours.last, theirs.last_hidden_state))
  within(error(ours.penultimate, theirs.hidden_states[-2]))
  if name == "clip_vision":
    within(error(ours.projected, theirs.image_embeds))
  else:
    within(error(ours.pooled, theirs.pooler_output))
  half = run(encoder, images, dtype="bfloat16")
  alike(cosine(np.asarray(half.last, np.float32), theirs.last_hidden_state.detach()))


def test_a_whole_clip_gives_both_towers_and_their_likeness(tmp_path):
  torch.manual_seed(2)
  drop = {"projection_dim"}
  config = transformers.CLIPConfig(
    text_config={k: v for k, v in reference.CLIP_TEXT.items() if k not in drop},
    vision_config={k: v for k, v in reference.CLIP_VISION.items() if k not in drop},
    projection_dim=24,
  )
  model = reference.perturbed(transformers.CLIPModel(config))
  folder = reference.save(model, tmp_path / "clip")
  ids, _ = clip_tokens()
  images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  theirs = model(torch.tensor(ids).long(), torch.tensor(images.transpose(0, 3, 1, 2)))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  units = []
  source = folders.Source(folder)
  for family, inputs in (("clip_text", ids), ("clip_vision", images)):
    matched = match_lib.match(source, FAMILIES, family)
    matched.complain(folder)
    params = transfer.read_params(source, matched, mesh)
    module = FAMILIES[family].module(dataclasses.replace(matched.config, dtype="float32"))
    vector = module.apply({"params": params}, inputs).projected
    units.append(vector / jnp.linalg.norm(vector, axis=-1, keepdims=True))
  within(error(units[0], theirs.text_embeds))
  within(error(units[1], theirs.image_embeds))
  logits = float(jnp.exp(model.logit_scale.item())) * units[0] @ units[1].T
  within(error(logits, theirs.logits_per_text), 1e-4)  # times a scale of about 15


@pytest.mark.parametrize("name", ["llama", "llama3.1", "llama_tied"])
def test_the_decoder_equals_the_reference(pair, name):
  model, encoder = pair(name)
  ids, mask = reference.tokens(83, (50, 26) if name == "llama3.1" else (14, 6))
  theirs = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits
  within(error(run(encoder, ids, mask).logits, theirs, mask))
  if name == "llama3.1":
    slowed = llama.frequencies_of(dataclasses.replace(encoder.config, rope_factor=1.0))
    slowed = slowed / llama.frequencies_of(encoder.config)
    assert slowed[0] == 1.0 and slowed[-1] == 8.0 and ((slowed > 1) & (slowed < 8)).any()
  half = run(encoder, ids, mask, dtype="bfloat16").logits
  alike(cosine(np.asarray(half)[mask], theirs.detach().numpy()[mask]))


def test_padding_of_the_decoder_may_stand_on_the_left(pair):
  model, encoder = pair("llama")
  ids, mask = reference.tokens(83, (14, 6))
  turned, shown = ids.copy(), mask.copy()
  turned[1], shown[1] = np.roll(ids[1], 8), np.roll(mask[1], 8)
  positions = np.maximum(np.cumsum(shown, 1) - 1, 0)
  theirs = model(
    torch.tensor(turned).long(),
    attention_mask=torch.tensor(shown).long(),
    position_ids=torch.tensor(positions),
  ).logits
  within(error(run(encoder, turned, shown).logits, theirs, shown))


def test_cached_decoding_is_uncached_decoding(pair):
  _, encoder = pair("llama")
  config = encoder.config
  module = llama.Llama(config)
  apply = jax.jit(lambda *x: module.apply({"params": encoder.params}, *x))
  ids, mask = reference.tokens(83, (10, 7))
  whole = apply(ids, mask).logits
  cache = llama.make_cache(config, 2, 12)
  made = []
  for start, end in ((0, 4), (4, 5), (5, 10)):  # in parts of any size, padding at the end
    out = apply(ids[:, start:end], mask[:, start:end], cache)
    cache = out.cache
    made.append(out.logits)
  np.testing.assert_array_equal(cache.length, [10, 7])
  np.testing.assert_allclose(
    np.concatenate(made, 1)[mask], np.asarray(whole)[mask], atol=LIMIT, rtol=0
  )


def test_generation_continues_as_the_reference_does(pair):
  model, encoder = pair("llama")
  ids, mask = reference.tokens(83, (6, 6))
  theirs = model.generate(
    torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(), max_new_tokens=5,
    do_sample=False, eos_token_id=None, pad_token_id=0,
  ).numpy()[:, 6:]  # fmt: skip
  program = jax.jit(lambda p, x, m: llama.generate(encoder.config, p, x, m, 5, end=-1))
  np.testing.assert_array_equal(program(encoder.params, ids, mask), theirs)
  padded = np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3)))
  np.testing.assert_array_equal(program(encoder.params, *padded), theirs)


GRADIENTS = {
  "t5_v1.1": {
    "layers/attention/query/kernel": "encoder.block.{i}.layer.0.SelfAttention.q.weight",
    "layers/mlp/gate/kernel": "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight",
    "position_bias/table": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm/scale": "encoder.final_layer_norm.weight",
  },
  "clip_text_gelu": {
    "layers/up/bias": "encoder.layers.{i}.mlp.fc1.bias",
    "layers/value/kernel": "encoder.layers.{i}.self_attn.v_proj.weight",
    "positions": "embeddings.position_embedding.weight",
  },
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_reference(pair, name):
  """Of a mean of the features, bounded and weighted differently from place to place."""
  model, encoder = pair(name)
  module = FAMILIES[encoder.family].module(encoder.config)
  if encoder.family == "t5":
    inputs, pick = reference.tokens(encoder.config.vocab, (9, 9)), lambda out: out
  else:
    inputs, pick = (clip_tokens((9, 9))[0],), lambda out: out.last
  weight = np.random.default_rng(3).normal(size=encoder.config.width).astype(np.float32) / 10
  model.zero_grad()
  out = model(torch.tensor(inputs[0]).long()).last_hidden_state
  (out * torch.tensor(weight)).tanh().mean().backward()

  def loss(params):
    return jnp.tanh(pick(module.apply({"params": params}, *inputs)) * weight).mean()

  gradients = jax.jit(jax.grad(loss))(encoder.params)
  named = {
    n.removeprefix("text_model."): p.grad.numpy()
    for n, p in model.named_parameters()
    if p.grad is not None
  }
  for ours, theirs in GRADIENTS[name].items():
    found = gradients
    for key in ours.split("/"):
      found = found[key]
    layers = range(encoder.config.layers)
    wanted = np.stack([named[theirs.format(i=i)] for i in layers])
    wanted = wanted if "{i}" in theirs else wanted[0]
    wanted = wanted.swapaxes(-1, -2) if ours.endswith("kernel") else wanted
    assert np.abs(wanted).max() > 1e-5, ours  # there is something to compare
    within(np.abs(np.asarray(found) - wanted).max())
