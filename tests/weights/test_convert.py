"""Weights of generators come in and go out again bit for bit, and are what training starts from."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mgen_jax import schema, tasks
from mgen_jax.convert import FAMILIES
from mgen_jax.errors import UserError
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.models.latte import LatteConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import start
from mgen_jax.training import state as state_lib
from mgen_jax.weights import autoencoder_kl, files, latte, stored
from tests.encoders import toys
from tests.encoders.test_convert import run, same_bits

LATTE = LatteConfig(layers=4, width=48, heads=4, in_channels=3)
TEXT = dataclasses.replace(LATTE, conditioning="adaln_single", context_widths=(20,))
IMAGE = AutoencoderConfig(
  channels=16, multipliers=(1, 2), latent_channels=4, space_down=(0,), time_down=(),
  temporal=False, quant_conv=True, groups=4,
)  # fmt: skip

# What lies in public files beside the parameters.
BESIDE = {
  "latte": {"pos_embed": (1, 16, 48), "temp_embed": (1, 5, 48)},
  "dit": {"pos_embed": (1, 16, 48), "y_embedder.embedding_table.weight": (1001, 48)},
  "pixart": {
    "pos_embed.pos_embed": (1, 16, 48),
    "adaln_single.emb.resolution_embedder.linear_1.weight": (16, 256),
  },
}
CASES = [
  ("autoencoder_kl", IMAGE, np.float32),
  ("latte", dataclasses.replace(LATTE, classes=5), np.float32),
  ("dit", LATTE, np.float16),
  ("latte_text", TEXT, ml_dtypes.bfloat16),
  ("pixart", TEXT, np.float32),
]


def write(folder, family, config, dtype=np.float32):
  """As a public file; its tensors."""
  made = toys.tensors(family, config, 0, dtype)
  rng = np.random.default_rng(1)
  beside = BESIDE.get(family, {})
  made |= {name: rng.normal(size=shape).astype(dtype) for name, shape in beside.items()}
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(FAMILIES[family].to_hf(config)))
  save_file(made, folder / f"{FAMILIES[family].file}.safetensors")
  return made


@pytest.mark.parametrize(("family", "config", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_in_and_out_again_is_bit_for_bit(tmp_path, caplog, family, config, dtype):
  caplog.set_level("INFO", logger="absl")
  before = write(tmp_path / "theirs", family, config, dtype)
  run(f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}", "--mesh=fsdp=2")
  found = stored.read(tmp_path / "ours", FAMILIES)
  assert (found.family.name, found.config) == (family, config)
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}")
  name = f"{FAMILIES[family].file}.safetensors"
  assert same_bits(before, load_file(tmp_path / "back" / name))
  assert f"{len(before)} of {len(before)} tensors have the very bits" in caplog.text
  read = lambda folder: json.loads((tmp_path / folder / "config.json").read_text())  # noqa: E731
  assert read("theirs") == read("back")
  # What is started from: the file, its folder and what was converted say the same.
  for path in ("theirs", f"theirs/{name}", "back"):
    same = files.read_tensors(tmp_path / path)
    assert same_bits(same, files.read_tensors(tmp_path / "ours")), path


@pytest.mark.parametrize(
  ("family", "model"),
  [("latte", LATTE), ("dit", dataclasses.replace(LATTE, classes=5)), ("latte_text", TEXT),
   ("pixart", TEXT)],
)  # fmt: skip
def test_a_model_starts_alike_from_a_file_and_from_what_was_converted(tmp_path, family, model):
  """And what the conversion stored is what the model is filled with."""
  write(tmp_path / "theirs", family, dataclasses.replace(model, classes=0))
  run(f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
  fresh = jax.device_get(nn.unbox(jax.jit(lambda: latte.LATTE.init(model))()))
  made = [
    latte.start_from(files.read_tensors(tmp_path / path), model, fresh)
    for path in ("theirs", "ours")
  ]
  jax.tree.map(np.testing.assert_array_equal, *made)
  assert jax.tree.map(np.shape, made[0]) == jax.tree.map(np.shape, fresh)
  found, count = stored.read(tmp_path / "ours", FAMILIES), 0
  for path, entry in found.tensors.items():
    value = made[0]
    for key in path.split("/"):
      value = value[key]
    layers = range(len(value)) if path.startswith("layers/") else (None,)
    rules = {rule.target: rule for rule in found.family.rules(found.config)}
    for layer in layers:
      out = np.empty(entry["shape"][1:] if layer is not None else entry["shape"], np.float32)
      found.read_into(stored.Piece(rules[path], layer), out)
      np.testing.assert_array_equal(out, value if layer is None else value[layer])
      count += 1
  assert count > 50


def test_a_stage_starts_from_what_was_converted(tmp_path):
  """As `init_weights` is read when a stage begins, laid out on a mesh."""
  write(tmp_path / "theirs", "dit", LATTE)
  run(f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
  model = {**schema.to_plain(LATTE), "classes": 2}
  values = {"name": "latte", "model": model, "class_names": ("left", "right")}
  task = tasks.make(schema.build(tasks.CONFIGS["latte"], values, "task"))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=2), jax.devices()[:2])
  shapes, layout = state_lib.param_shapes(task), state_lib.param_shardings(task, mesh)
  made = []
  for name in ("ours", "theirs", "theirs/model.safetensors"):
    stage = types.SimpleNamespace(init_from=None, init_weights=str(tmp_path / name))
    work = types.SimpleNamespace(experiment=types.SimpleNamespace(stages={"a": stage}, seed=0))
    made.append(start.loader(work, "a", task, mesh, None)(shapes, layout))
  jax.tree.map(np.testing.assert_array_equal, made[0], made[1])
  jax.tree.map(np.testing.assert_array_equal, made[0], made[2])
  kernel = load_file(tmp_path / "theirs" / "model.safetensors")["blocks.3.mlp.fc1.weight"]
  stack = made[0]["latte"]["layers"]["temporal"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(stack[1], kernel.T)
  assert len(stack.sharding.device_set) == 2


def test_old_names_and_shapes_of_an_autoencoder_come_back_as_they_were(tmp_path):
  made = write(tmp_path / "theirs", "autoencoder_kl", IMAGE)
  new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  old = {}
  for name, value in made.items():
    for a, b in new.items():
      if f".{a}." in name:
        name = name.replace(f".{a}.", f".{b}.")
        value = value[..., None, None] if value.ndim == 2 else value
    old[name] = value
  save_file(old, tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
  run(f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
  params = autoencoder_kl.import_image(files.read_tensors(tmp_path / "ours"), IMAGE)
  expected = autoencoder_kl.import_image(made, IMAGE)
  assert same_bits(params, expected)
  run(f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}")
  back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
  assert same_bits(old, back)


def test_a_file_without_a_config_is_known_by_its_names_and_shapes(tmp_path):
  small = dataclasses.replace(LATTE, width=384, heads=6)  # S
  tensors = {f"module.{name}": x for name, x in toys.tensors("dit", small).items()}
  save_file(tensors, tmp_path / "DiT.safetensors")
  run(f"--source={tmp_path / 'DiT.safetensors'}", f"--out={tmp_path / 'ours'}")
  found = stored.read(tmp_path / "ours", FAMILIES)
  assert found.config == small
  save_file(toys.tensors("dit", LATTE), tmp_path / "DiT.safetensors")
  with pytest.raises(UserError, match=r"width of 48, which is no published size.*num_heads"):
    run(f"--source={tmp_path / 'DiT.safetensors'}", "--dry_run")
  save_file({"conv.weight": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
  with pytest.raises(UserError, match=r"config\.json is missing, and the names in .*x\.safetens"):
    run(f"--source={tmp_path / 'x.safetensors'}", "--dry_run")


@pytest.mark.parametrize(
  ("family", "config", "lost", "wrong"),
  [
    ("autoencoder_kl", IMAGE, "decoder.conv_in.bias", "encoder.conv_in.weight"),
    ("latte", LATTE, "blocks.3.attn.qkv.weight", "blocks.2.mlp.fc2.weight"),
    ("latte_text", TEXT, "temporal_transformer_blocks.1.attn1.to_q.bias", "proj_out.bias"),
  ],
)
def test_everything_that_does_not_fit_is_listed_and_nothing_is_written(
  tmp_path, family, config, lost, wrong
):
  made = write(tmp_path / "theirs", family, config)
  del made[lost]
  made[wrong] = np.ones(7, np.float32)
  made["surprise"] = np.ones(1, np.float32)
  save_file(made, tmp_path / "theirs" / f"{FAMILIES[family].file}.safetensors")
  with pytest.raises(UserError) as raised:
    run(f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
  for words in (f"1 missing: {lost}", f"1 misshaped: {wrong} [7] inst", "1 unmapped: surprise"):
    assert words in str(raised.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
