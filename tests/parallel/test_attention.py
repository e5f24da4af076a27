"""Attention: every kernel, method and mesh equals a reference in fp32, forward and backward."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgen_jax.errors import ConfigError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.attention import Blocks, attention, blockwise, kernels, splash

METHODS = ("all_gather", "ring", "ulysses")
SMALL = Blocks(128, 128, 128, 128)


def mesh_of(**sizes):
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))


def reference(q, k, v, mask=None):
  """Attention in fp32, as it is written on paper; rows without any key attend evenly."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision="highest") * q.shape[3] ** -0.5
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, -1e30)
  return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, -1), v, precision="highest")


def arrays(batch, queries, keys, heads, kv_heads, dim=16, masked=True, dtype=jnp.float32):
  """Random q, k, v, a mask that is no prefix (or None), and a cotangent."""
  random = np.random.default_rng([batch, queries, keys, heads, kv_heads])
  shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
  q, k, v, dout = (jnp.asarray(random.normal(size=(batch, *s, dim)), dtype) for s in shapes)
  # Large scores, as without a norm of queries and keys: a softmax that is not flat.
  mask = jnp.asarray(random.random((batch, keys)) < 0.6).at[0, -1].set(True) if masked else None
  return 2 * q, 2 * k, v, mask, dout


def pulled_back(function, q, k, v, mask, dout):
  """The result and the gradients of q, k and v."""
  out, pull = jax.vjp(lambda q, k, v: function(q, k, v, mask=mask), q, k, v)
  return out, *pull(dout)


def check(inputs, mesh=None, tolerance=2e-5, **options):
  """Result and gradients against the reference's, relative to the largest entry."""
  fp32 = [x if x is None or x.dtype == bool else x.astype(jnp.float32) for x in inputs]
  expected = jax.jit(functools.partial(pulled_back, reference))(*fp32)
  run = jax.jit(functools.partial(pulled_back, functools.partial(attention, **options)))
  with contextlib.nullcontext() if mesh is None else mesh_lib.use(mesh):
    actual = run(*inputs)
  for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
    assert a.dtype == inputs[0].dtype
    error = np.abs(np.asarray(a, np.float32) - b).max() / (np.abs(b).max() or 1.0)
    assert error < tolerance, (name, error)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["plain", "blockwise", "splash"])
def test_every_kernel_equals_the_reference(monkeypatch, kernel, masked):
  """Odd lengths, grouped heads; several slices, several tiles that do not divide the lengths."""
  monkeypatch.setattr(kernels, "SCORES", 2 * 4 * 141 * 50)
  check(arrays(2, 259, 141, 4, 2, masked=masked), kernel=kernel, blocks=SMALL)


@pytest.mark.parametrize("examples", [1, 3])
def test_parts_of_a_batch_may_be_unequal(monkeypatch, examples):
  """Only on a CPU that is one device; masks differ from example to example."""
  assert kernels.parts() == 2
  monkeypatch.setattr(kernels, "SCORES", 3 * 2 * 75 * 40)
  check(arrays(examples, 101, 75, 2, 1), kernel="blockwise")
  with mesh_lib.use(mesh_of(fsdp=8)):
    assert kernels.parts() == 1


@pytest.mark.parametrize("position", [0, 70, 149])
def test_a_nan_among_the_keys_is_not_lost(position):
  """The loop has to see it, wherever in a row; the other example has none."""
  q, k, v, _, _ = arrays(2, 130, 150, 2, 2, masked=False)
  out = attention(q, k.at[0, position].set(jnp.nan), v, kernel="blockwise")
  assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()


@pytest.mark.parametrize("kernel", ["plain", "blockwise", "splash"])
def test_half_precision_keeps_its_statistics_in_fp32(kernel):
  """600 equal scores: summed in bf16, the weights would stop to grow at 256 of them."""
  q, k, v, mask, dout = arrays(1, 130, 600, 2, 2, masked=False, dtype=jnp.bfloat16)
  check((q * 0, k, v + 1, mask, dout), kernel=kernel, tolerance=0.02)
  check((q, k, v, mask, dout), kernel=kernel, tolerance=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  ("sizes", "heads", "kv_heads"),
  [
    ({"fsdp": 2, "context": 4}, 8, 8),
    ({"fsdp": 1, "context": 4, "tensor": 2}, 8, 2),
    # Neither tensor nor Ulysses divides the key-value heads: they are repeated.
    ({"fsdp": 1, "replica": 2, "context": 2, "tensor": 2}, 12, 3),
  ],
  ids=["fsdp2-context4", "context4-tensor2", "replica2-context2-tensor2"],
)
def test_every_method_equals_the_reference_on_every_mesh(method, sizes, heads, kv_heads):
  """37 tokens divide over no context axis: the last shard has padding. The mask has holes."""
  check(arrays(2, 37, 37, heads, kv_heads), mesh_of(**sizes), context_parallel=method)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_reference_with_the_tpu_kernel(method):
  mesh = mesh_of(fsdp=2, context=2, tensor=2)
  inputs = arrays(2, 301, 301, 4, 2)
  check(inputs, mesh, context_parallel=method, kernel="splash", blocks=SMALL)


@pytest.mark.parametrize("method", METHODS)
def test_padding_of_tokens_is_never_attended_to_without_a_mask(method):
  mesh = mesh_of(fsdp=2, context=4)
  check(arrays(2, 13, 13, 4, 4, masked=False), mesh, context_parallel=method)


@pytest.mark.parametrize("method", [*METHODS, None])
@pytest.mark.parametrize(("keys", "split"), [(21, None), (37, False)])
def test_cross_attention_to_whole_keys_equals_the_reference(method, keys, split):
  mesh = mesh_of(fsdp=2, context=2, tensor=2)
  check(arrays(2, 37, keys, 6, 2), mesh, context_parallel=method, split_keys=split)


@pytest.mark.parametrize("kernel", ["plain", "blockwise", "splash"])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 1, "replica": 2, "context": 4}])
def test_an_example_without_any_key_attends_to_all_evenly(kernel, sizes):
  q, k, v, mask, dout = arrays(2, 9, 9, 4, 4)
  methods = METHODS if sizes else METHODS[:1]
  for method in methods:
    inputs = q, k, v, mask.at[1].set(False), dout
    check(inputs, sizes and mesh_of(**sizes), context_parallel=method, kernel=kernel)


def test_what_does_not_divide_and_is_no_sequence_stays_whole():
  """An autoencoder's single head and a batch of 3, on a mesh that splits both."""
  check(arrays(3, 9, 9, 1, 1), mesh_of(fsdp=4, tensor=2), context_parallel=None)
  check(arrays(3, 9, 9, 2, 2), mesh_of(fsdp=2, context=2, tensor=2))


def collectives(method, queries=64, keys=64):
  """The kinds of collectives over the context axis, in the compiled backward pass and forward."""
  mesh = mesh_of(fsdp=1, context=8)
  inputs = arrays(1, queries, keys, 8, 8, masked=False)
  function = functools.partial(attention, context_parallel=method)
  token = NamedSharding(mesh, PartitionSpec(None, "context"))
  whole = NamedSharding(mesh, PartitionSpec())
  key = token if queries == keys else whole
  with mesh_lib.use(mesh):
    run = jax.jit(
      functools.partial(pulled_back, function),
      in_shardings=(token, key, key, None, token),
      out_shardings=(token, token, key, key),
    )
    text = run.lower(*inputs).compile().as_text()
  kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
  return {kind for kind in kinds if re.search(rf"{kind}(-start)?\(", text)}


def test_methods_communicate_as_they_say():
  assert collectives("all_gather") == {"all-gather", "reduce-scatter"}
  assert collectives("ring") == {"collective-permute"}
  assert collectives("ulysses") == {"all-to-all"}
  for method in METHODS:  # whole keys: only their gradients are summed
    assert collectives(method, keys=24) == {"all-reduce"}


def temporary_bytes(kernel):
  shape = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
  run = jax.jit(functools.partial(pulled_back, functools.partial(attention, kernel=kernel)))
  return run.lower(shape, shape, shape, None, shape).compile().memory_analysis().temp_size_in_bytes


def test_long_sequences_need_no_memory_for_their_scores(monkeypatch):
  monkeypatch.setattr(kernels, "SCORES", 1 << 18)
  scores = 4 * 4 * 2048**2  # bytes, fp32
  assert temporary_bytes("plain") > scores
  assert temporary_bytes(None) < scores / 8


def kernel_runs(jaxpr):
  """How often splash's forward kernel stands in a jaxpr, whatever it is nested in, and is used."""
  count = 0
  for eqn in (eqn for eqn in jaxpr.eqns if eqn.outvars):
    if eqn.primitive.name == "pallas_call":
      count += "fwd" in str(eqn.params)
      continue
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        count += kernel_runs(inner)
  return count


@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_a_policy_that_saves_attention_does_not_run_its_kernel_again(method):
  inputs = arrays(2, 256, 256, 4, 4)
  layer = functools.partial(attention, kernel="splash", context_parallel=method)

  def runs(policy):
    function = functools.partial(pulled_back, jax.checkpoint(layer, policy=policy))
    with mesh_lib.use(mesh_of(fsdp=2, context=4)):
      return kernel_runs(jax.make_jaxpr(function)(*inputs))

  save = jax.checkpoint_policies.save_only_these_names(kernels.SAVED_NAME)
  assert runs(None) == 2 * runs(save) > 0


def choice(platform, monkeypatch, tokens=256, dim=64, dtype=jnp.bfloat16):
  monkeypatch.setattr(mesh_lib, "platform", lambda: platform)
  shape = jax.ShapeDtypeStruct((1, tokens, 4, dim), dtype)
  return kernels.choose(shape, shape)


def test_the_kernel_follows_the_platform_of_the_mesh(monkeypatch):
  for tokens in (16, 73_728):
    assert choice("cpu", monkeypatch, tokens=tokens) == "blockwise"
  assert choice("tpu", monkeypatch) == "splash"
  assert choice("tpu", monkeypatch, tokens=16) == "plain"  # all of it is less than one tile
  for gpu in ("gpu", "cuda"):
    assert choice(gpu, monkeypatch) == "cudnn"
    assert choice(gpu, monkeypatch, dtype=jnp.float32) == "plain"
    assert choice(gpu, monkeypatch, tokens=73_728, dtype=jnp.float32) == "blockwise"
    assert choice(gpu, monkeypatch, dim=512) == "plain"


def test_a_program_for_tpus_is_lowered_without_one(monkeypatch):
  monkeypatch.setattr(mesh_lib, "platform", lambda: "tpu")
  shape = jax.ShapeDtypeStruct((2, 1000, 4, 128), jnp.bfloat16)
  for method in METHODS:
    function = functools.partial(attention, context_parallel=method)
    with mesh_lib.use(mesh_of(fsdp=2, context=2, tensor=2)):
      traced = jax.jit(functools.partial(pulled_back, function)).trace(
        shape, shape, shape, jax.ShapeDtypeStruct((2, 1000), bool), shape
      )
      text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for part in ("fwd", "dq", "dkv"):
      assert f"splash_mha_{part}_segmented" in text, (method, part)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_gets_any_mask_as_a_length_and_no_odd_tokens(monkeypatch, masked):
  """Through XLA, which takes the same lengths: there is no cuDNN here."""
  attend = jax.nn.dot_product_attention
  seen = []

  def stand_in(q, k, v, *, implementation, **options):
    seen.append((q.shape[1] % 2, k.shape[1] % 2, implementation, sorted(options)))
    return attend(q, k, v, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  check(arrays(2, 33, 21, 4, 2, masked=masked), kernel="cudnn")
  assert seen == [(0, 0, "cudnn", ["key_value_seq_lengths"])]


def test_tiles_cover_the_tokens_and_add_little():
  for tokens in (1, 128, 129, 300, 1152, 9216, 73_728):
    sizes = splash._sizes(tokens, tokens, Blocks(1024, 1024, 512, 512))
    least = -(-tokens // 128) * 128
    padded = -(-tokens // sizes.block_q) * sizes.block_q
    assert least <= padded <= 17 / 16 * least
    assert padded % sizes.block_q_dq == 0 and sizes.block_q_dq <= 512
    assert sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0
  assert splash._sizes(73_728, 9216, Blocks(1024, 1024, 512, 512)).block_q == 1024


def test_blockwise_slices_stay_below_their_limit():
  q, k = (jax.ShapeDtypeStruct((2, n, 4, 8), jnp.float32) for n in (1000, 500))
  for limit in (1, 2 * 4 * 500, 10**5, 10**9):
    split = functools.partial(blockwise._split, limit=limit)
    _, batch, groups, rows, _ = jax.eval_shape(split, q, k).shape
    assert rows == 1 or batch * groups * rows * 500 <= limit


@pytest.mark.parametrize(
  ("options", "heads", "kv_heads", "message"),
  [
    ({"context_parallel": "rings"}, 4, 4, 'did you mean "ring"'),
    ({"kernel": "flash"}, 4, 4, 'did you mean "splash"'),
    ({}, 6, 4, "6 attention heads do not share 4 key-value heads evenly: use 3 key"),
    ({}, 5, 5, "5 attention heads do not divide over tensor=2 of the mesh: set tensor to 1"),
    ({"context_parallel": "ulysses"}, 6, 6, "tensor=2 x context=4.*set context to 3"),
    ({"kernel": "splash", "blocks": Blocks(queries=200)}, 4, 4, "queries=200 .* use 256"),
  ],
)
def test_what_cannot_be_is_said_when_it_is_traced(options, heads, kv_heads, message):
  shapes = [jax.ShapeDtypeStruct((2, 16, n, 8), jnp.float32) for n in (heads, kv_heads, kv_heads)]
  function = functools.partial(attention, **options)
  mesh = mesh_of(fsdp=1, context=4, tensor=2)
  with mesh_lib.use(mesh), pytest.raises(ConfigError, match=message) as error:
    jax.eval_shape(function, *shapes)
  assert str(error.value).count(". ") == 0
