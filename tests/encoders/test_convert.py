"""Weights come in from public files and go out again bit for bit; what is wrong is said."""

import argparse
import dataclasses
import gc
import hashlib
import json
import mmap
import os
import shlex
import subprocess
import sys
import tracemalloc
import weakref

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from mgen_jax import convert, encoders
from mgen_jax.encoders.families import FAMILIES
from mgen_jax.errors import UserError
from mgen_jax.models.llama import LlamaConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.weights import folders, stored, transfer
from mgen_jax.weights.match import match
from tests.encoders import toys

LLAMA = LlamaConfig(50, 16, 2, 4, 2, 24, 64, dtype="float32")


def run(*arguments: str) -> None:
  values = flags.FlagValues()
  convert.define_flags(values)
  values(["convert", *arguments])
  convert.main([], values)


def same_bits(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(
    a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
  )


@pytest.mark.parametrize(
  ("family", "config", "dtype", "shards"),
  [
    ("t5", toys.T5, np.float32, 2),
    ("clip_text", toys.CLIP, np.float16, 1),
    ("llama", LLAMA, ml_dtypes.bfloat16, 3),
  ],
)
def test_in_and_out_again_is_bit_for_bit(tmp_path, caplog, family, config, dtype, shards):
  caplog.set_level("INFO", logger="absl")
  source = toys.write(tmp_path / "hf", family, config, dtype=dtype, shards=shards)
  run(f"--source={source}", f"--out={tmp_path / 'ours'}")
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}", "--shard_gib=0.001")
  before = toys.tensors(family, config, 0, dtype)
  after = {}
  for path in (tmp_path / "back").glob("*.safetensors"):
    after |= load_file(path)
  assert same_bits(before, after)
  count = len(before)
  assert f"{count} of {count} tensors have the very bits" in caplog.text
  manifest = json.loads((tmp_path / "ours" / "weights.json").read_text())
  facts = manifest["sources"]
  assert facts.keys() == before.keys()
  for name, fact in facts.items():
    assert fact["sha256"] == hashlib.sha256(before[name].tobytes()).hexdigest()
  # As whoever comes next reads it.
  match(folders.Source(tmp_path / "back"), FAMILIES).complain(tmp_path)


def test_a_whole_and_a_converted_folder_load_alike_on_any_mesh(tmp_path):
  source = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  run(f"--source={source}", f"--out={tmp_path / 'ours'}")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
  loaded = [
    encoders.load("any", tmp_path / "hf", devices=jax.devices()[:1]),
    encoders.load("any", tmp_path / "ours", mesh=mesh),
  ]
  kernel = loaded[1].params["layers"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 12)
  made = [encoder(["a red circle", "", "“hi”"]).features for encoder in loaded]
  np.testing.assert_allclose(made[0], made[1], atol=1e-5)


def test_weights_may_be_stored_in_bf16_and_still_come_back(tmp_path):
  source = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  run(f"--source={source}", f"--out={tmp_path / 'ours'}", "--dtype=bfloat16")
  found = stored.read(tmp_path / "ours", FAMILIES)
  assert {entry["dtype"] for entry in found.tensors.values()} == {"bfloat16"}
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}")
  after = load_file(tmp_path / "back" / "model.safetensors")
  for name, value in toys.tensors("t5", toys.BYT5).items():
    assert after[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(after[name], value.astype(ml_dtypes.bfloat16))


def test_host_memory_stays_under_two_tensors_both_ways(tmp_path):
  """In a process of its own: what is counted are all of Python's allocations in it."""
  code = "import pathlib, sys; from tests.encoders import test_convert as test; "
  code += "test.convert_in_little_memory(pathlib.Path(sys.argv[1]))"
  made = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
  assert made.returncode == 0, made.stderr


def convert_in_little_memory(folder):
  """A stack of 24 matrices: what numpy holds, what is still mapped when the next one is read."""
  small = toys.write(folder / "small", "t5", toys.BYT5)
  run(f"--source={small}", f"--out={folder / 'first'}")  # what is imported counts for nothing
  run(f"--source={folder / 'first'}", f"--out={folder / 'first_back'}")
  config = dataclasses.replace(toys.BYT5, width=256, mlp_width=1024, layers=24)
  source = toys.write(folder / "hf", "t5", config)
  tensor = 256 * 1024 * 4
  gc.collect()
  read, before, alive = folders.Source.read, len(jax.live_arrays()), []

  def counted(self, name):
    assert len(jax.live_arrays()) <= before  # none on the devices either
    assert all(other() is None for other in alive)
    pages = array = read(self, name)
    while isinstance(pages, np.ndarray):
      pages = pages.base
    alive[:] = [weakref.ref(pages)]
    assert isinstance(pages, mmap.mmap)  # pages of the system's, not memory of ours
    return array

  stored.CHUNK_BYTES, folders.Source.read = tensor // 4, counted
  peaks = []
  for arguments in (
    (f"--source={source}", f"--out={folder / 'ours'}", "--mesh=fsdp=2"),
    (f"--source={folder / 'ours'}", f"--out={folder / 'back'}"),
  ):
    tracemalloc.start()
    run(*arguments)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert max(peaks) < 2 * tensor, peaks
  chunks = sorted(path.name for path in (folder / "ours/params/layers.mlp.up.kernel").iterdir())
  assert len(chunks) == 1 + 24 * 4  # of each layer two shards, halved


def test_chunks_are_the_shards_of_the_mesh_that_will_read(tmp_path):
  source = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  run(f"--source={source}", f"--out={tmp_path / 'ours'}", "--mesh=fsdp=4,tensor=2")
  found = stored.read(tmp_path / "ours", FAMILIES)
  assert found.tensors["layers/mlp/up/kernel"]["chunks"] == [1, 4, 12]
  whole = encoders.load("any", source, devices=jax.devices()[:1])
  made = encoders.load("any", tmp_path / "ours", devices=jax.devices()[:1])
  jax.tree.map(np.testing.assert_array_equal, whole.params, made.params)


def test_what_is_written_is_a_checkpoint_that_orbax_reads(tmp_path):
  run(f"--source={toys.write(tmp_path / 'hf', 't5', toys.BYT5)}", f"--out={tmp_path / 'ours'}")
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(tmp_path / "ours" / "params")
  made = encoders.load("any", tmp_path / "ours", devices=jax.devices()[:1])
  jax.tree.map(np.testing.assert_array_equal, tree, made.params)


def test_a_dry_run_writes_nothing_and_shows_what_it_would(tmp_path, capsys):
  source = toys.write(tmp_path / "hf", "clip_text", toys.CLIP)
  run(f"--source={source}", "--dry_run")
  shown = capsys.readouterr().err
  assert "layers/up/kernel" in shown and "encoder.layers.*.mlp.fc1.weight" in shown
  assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_old_and_new_names_are_read_alike_and_other_parts_are_left_out(tmp_path):
  """transformers 4 puts a prefix and a buffer, a whole CLIP the other tower beside them."""
  new = toys.tensors("clip_text", toys.CLIP)
  old = {n if n.startswith("text_projection") else f"text_model.{n}": x for n, x in new.items()}
  old["text_model.embeddings.position_ids"] = np.arange(77)[None]
  old |= {"logit_scale": np.float32([4.6]), "visual_projection.weight": np.ones((8, 4), np.float32)}
  folder = toys.write(tmp_path / "hf", "clip_text", toys.CLIP)
  params = []
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  for made in (new, old):
    save_file(made, folder / "model.safetensors")
    source = folders.Source(folder)
    matched = match(source, FAMILIES)
    matched.complain(folder)
    params.append(transfer.read_params(source, matched, mesh))
  assert set(matched.ignored) == {
    "logit_scale", "visual_projection.weight", "text_model.embeddings.position_ids",
  }  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_the_decoder_of_a_t5_is_left_out(tmp_path):
  made = toys.tensors("t5", toys.BYT5)
  folder = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((4, 4), np.float32)}
  extra |= {"lm_head.weight": made["shared.weight"]}
  extra |= {"encoder.embed_tokens.weight": made["shared.weight"].copy()}
  save_file({**made, **extra}, folder / "model.safetensors")
  matched = match(folders.Source(folder), FAMILIES)
  matched.complain(folder)
  assert set(matched.ignored) == set(extra)


def test_positions_are_stretched_on_the_way(tmp_path):
  source = toys.write(tmp_path / "hf", "clip_text", toys.CLIP)
  run(f"--source={source}", f"--out={tmp_path / 'ours'}", "--positions=256")
  found = stored.read(tmp_path / "ours", FAMILIES)
  assert found.config.max_positions == 256
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}")
  after = load_file(tmp_path / "back" / "model.safetensors")
  name = "embeddings.position_embedding.weight"
  assert after[name].shape == (256, 16)
  np.testing.assert_array_equal(after[name][:20], toys.tensors("clip_text", toys.CLIP)[name][:20])


# What is wrong.


def broken(folder, change):
  made = toys.tensors("t5", toys.BYT5)
  toys.write(folder, "t5", toys.BYT5)
  change(made)
  save_file(made, folder / "model.safetensors")
  return folder


def test_everything_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path):
  def change(made):
    del made["encoder.block.1.layer.0.SelfAttention.k.weight"]
    made["encoder.final_layer_norm.weight"] = np.ones(7, np.float32)
    made["encoder.block.9.surprise"] = np.ones(1, np.float32)

  folder = broken(tmp_path / "hf", change)
  with pytest.raises(UserError) as raised:
    run(f"--source={folder}", f"--out={tmp_path / 'ours'}")
  for words in (
    "1 missing: encoder.block.1.layer.0.SelfAttention.k.weight",
    "1 misshaped: encoder.final_layer_norm.weight [7] instead of [16]",
    "1 unmapped: encoder.block.9.surprise",
  ):
    assert words in str(raised.value)
  assert not list(tmp_path.glob("ours*"))


def test_a_dtype_that_is_not_a_float_is_refused(tmp_path):
  folder = broken(
    tmp_path / "hf", lambda made: made.update({"shared.weight": np.ones((384, 16), np.int8)})
  )
  with pytest.raises(UserError, match=r"shared\.weight has dtype I8 .* unquantised"):
    run(f"--source={folder}", f"--out={tmp_path / 'ours'}")
  with pytest.raises(UserError, match=r"shared\.weight has dtype I8"):
    encoders.load("any", folder)


@pytest.mark.parametrize(
  "where", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, where):
  folder = toys.write(tmp_path / "hf", "t5", toys.BYT5, shards=2)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["shared.weight"] = where
  path.write_text(json.dumps(index))
  with pytest.raises(UserError, match="outside its folder"):
    folders.Source(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
  folder = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=r"model\.safetensors is cut short or is not"):
    folders.Source(folder)


def test_other_faults_of_a_folder_are_one_sentence(tmp_path):
  folder = toys.write(tmp_path / "hf", "t5", toys.BYT5, shards=2)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(UserError, match="which is missing"):
    folders.Source(folder)
  pickled = tmp_path / "pickled"
  pickled.mkdir()
  (pickled / "config.json").write_text('{"model_type": "t5"}')
  (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
  with pytest.raises(UserError, match=r"pytorch_model\.bin.*can run code.*weights_only=True"):
    folders.Source(pickled)
  with pytest.raises(UserError, match=r"config\.json is not a safetensors file: name"):
    folders.Source(pickled / "config.json")
  with pytest.raises(UserError, match="is not a folder"):
    folders.Source(tmp_path / "nowhere")
  (pickled / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json cannot be read"):
    folders.Source(pickled)
  other = toys.write(tmp_path / "other", "t5", toys.BYT5)
  for key, value, words in (
    ("num_heads", "two", r"config\.json cannot be used: heads is 'two': it must be a number"),
    ("num_heads", 0, r"config\.json cannot be used: heads is 0"),
    ("d_model", 8.5, r"config\.json cannot be used: t5\.width is 8\.5"),
    ("feed_forward_proj", "tanh", "feed_forward_proj is 'tanh'"),
  ):
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(json.dumps({**json.loads(text), key: value}))
    with pytest.raises(UserError, match=words):
      run(f"--source={other}", "--dry_run")
    (other / "config.json").write_text(text)
  (other / "config.json").write_text('{"model_type": "gpt2"}')
  with pytest.raises(UserError, match="model_type 'gpt2', which is not known"):
    run(f"--source={other}", "--dry_run")


def test_the_command_that_the_refusal_of_pickles_names_works(tmp_path):
  """Two parts, each in a checkpoint with its arguments, of tensors that share their memory."""
  torch = pytest.importorskip("torch", reason="needs torch, of the extra test")
  folder = toys.write(tmp_path / "of one", "t5", toys.BYT5)
  made = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  held = {name: torch.tensor(value) for name, value in made.items()}
  held["encoder.embed_tokens.weight"] = held["shared.weight"]
  for part in range(2):
    tensors = dict(list(held.items())[part::2])
    whole = {"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(whole, folder / f"pytorch_model-{part + 1}.bin")
  with pytest.raises(UserError) as caught:
    folders.Source(folder)
  command = str(caught.value).split("make them with torch: ")[1]
  command = command.replace("python", shlex.quote(sys.executable), 1)
  subprocess.run(command, shell=True, check=True)
  run(f"--source={folder}", f"--out={tmp_path / 'ours'}", "--dry_run")
  found = load_file(folder / "model.safetensors")
  assert set(found) == set(held)
  for name, value in made.items():
    np.testing.assert_array_equal(found[name], value)


def test_the_named_encoder_must_be_what_the_folder_holds(tmp_path):
  folder = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  with pytest.raises(UserError, match="does not hold byt5-small: width 16 instead of 1472"):
    run(f"--source={folder}", "--encoder=byt5-small", f"--out={tmp_path / 'ours'}")
  with pytest.raises(UserError, match=r'did you mean "byt5-small"'):
    encoders.load("byt5-smal", folder)


def test_a_damaged_parameter_is_named(tmp_path):
  run(f"--source={toys.write(tmp_path / 'hf', 't5', toys.BYT5)}", f"--out={tmp_path / 'ours'}")
  item = tmp_path / "ours" / "params" / "layers.mlp.up.kernel"
  for path in item.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UserError, match=r"layers\.mlp\.up\.kernel is damaged"):
    encoders.load("any", tmp_path / "ours")


def test_a_fault_on_the_way_leaves_nothing_behind(tmp_path, monkeypatch):
  source, read, count = toys.write(tmp_path / "hf", "t5", toys.BYT5), folders.Source.read, []

  def failing(self, name):
    count.append(name)
    if len(count) == 5:
      raise UserError(f"{name} cannot be read")
    return read(self, name)

  monkeypatch.setattr(folders.Source, "read", failing)
  with pytest.raises(UserError, match="cannot be read"):
    run(f"--source={source}", f"--out={tmp_path / 'ours'}")
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_fault_on_the_way_back_leaves_nothing_behind(tmp_path, monkeypatch):
  run(f"--source={toys.write(tmp_path / 'hf', 't5', toys.BYT5)}", f"--out={tmp_path / 'ours'}")
  (tmp_path / "back.partial").mkdir()  # of a process that was killed
  read, count = stored.Stored.read_into, []

  def failing(self, piece, out):
    count.append(piece)
    if len(count) == 5:
      raise UserError("layer 4 is damaged")
    read(self, piece, out)

  with monkeypatch.context() as faulty:
    faulty.setattr(stored.Stored, "read_into", failing)
    with pytest.raises(UserError, match="damaged"):
      run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}", "--shard_gib=0.001")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "ours"]
  made = list((tmp_path / "back").glob("*.safetensors"))
  assert made and json.loads((tmp_path / "back" / "SHA256.json").read_text()).keys() == {
    path.name for path in made
  }


@pytest.mark.parametrize("back", [False, True])
def test_a_disk_that_takes_no_more_is_said_in_one_line(tmp_path, back):
  source = toys.write(tmp_path / "hf", "t5", toys.BYT5)
  if back:
    run(f"--source={source}", f"--out={tmp_path / 'hf_ours'}")
    source = tmp_path / "hf_ours"
  before = sorted(path.name for path in tmp_path.iterdir())
  command = [sys.executable, "-m", "mgen_jax.convert", f"--source={source}", "--out=ours"]
  done = subprocess.run(
    ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *command],
    capture_output=True, text=True, check=False, cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
  )  # fmt: skip
  assert done.returncode == 2
  assert "could not be written" in done.stderr and done.stderr.count("error: ") == 1
  assert "Traceback" not in done.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_command_says_its_faults_in_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "mgen_jax.convert", f"--source={tmp_path}", "--out=x"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 2 and done.stderr.startswith("error: ")
  assert len(done.stderr.strip().splitlines()) == 1
