"""From public weights to a video: Marbles, with frozen text encoders online and through the cache.

A toy T5 with a vocabulary trained on the captions and a toy ByT5 are written as users find them,
converted by the command, named in a recipe, run both ways, and sampled from a prompt.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from mgen_jax import config as config_lib
from mgen_jax import convert, encode, ingest, sample, schema, tasks
from mgen_jax.data import media, records
from mgen_jax.data.buckets import parse_bucket
from mgen_jax.data.marbles import world
from mgen_jax.encoders import StackConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.generator import Generator
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.planning import planner, topologies
from mgen_jax.training import metrics, runner
from mgen_jax.workdir import Workdir
from tests import tiny, untrained
from tests.encoders import toys

BUCKET = "4x32x32"
STAGES = ("cached", "online")


def run_convert(*arguments: str) -> None:
  values = flags.FlagValues()
  convert.define_flags(values)
  values(["convert", *arguments])
  convert.main([], values)


def recipe(folder, **changes):
  """tests/tiny.py with two stages that differ in where their text features come from."""
  values = tiny.get_config().to_dict()
  text = {
    "kind": "features",
    "names": ("t5", "byt5"),
    "encoders": ("any", "any"),
    "weights": (str(folder / "t5"), str(folder / "byt5")),
    "reads": ("prompt", "quoted"),
    "widths": (24, 16),
    "lengths": (64, 12),
    "dtype": "float32",
    "dropout": (0.3, 0.0),
    **changes,
  }
  made = values["stages"]
  encoded = {**made["encode"], "buckets": (BUCKET,), "text": config_lib.encoded_text(text)}
  stage = made["t2v"]
  stage = {
    **stage,
    "init_from": None,
    "steps": 3,
    "validate_every": 0,
    "buckets": {"b" + BUCKET: {"batch": 8}},
  }
  model = {**stage["task"]["model"], "context_widths": (24, 16)}

  def train(online):
    return {**stage, "task": {**stage["task"], "model": model, "text": {**text, "online": online}}}

  return config_lib.experiment(
    name="encoders",
    data={**values["data"], "marbles": {**values["data"]["marbles"], "clips": 16}},
    stages={
      "ingest": {**made["ingest"], "workers": 1},
      "autoencoder": {**made["autoencoder"], "steps": 1, "buckets": {"b" + BUCKET: {"batch": 8}}},
      "encode": encoded,
      "cached": train(False),
      "online": train(True),
    },
  )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The two encoders, converted; the vocabulary is of captions like those of the run."""
  folder = tmp_path_factory.mktemp("weights")
  drawn = [world.sample_scene(seed, world.WorldConfig()) for seed in range(200)]
  toys.write(folder / "hf_t5", "t5", toys.T5)
  toys.vocabulary(folder / "hf_t5", [world.caption(scene) for scene in drawn], toys.T5.vocab)
  toys.write(folder / "hf_byt5", "t5", toys.BYT5, shards=2)
  for name in ("t5", "byt5"):
    run_convert(f"--source={folder / f'hf_{name}'}", f"--out={folder / name}")
  return folder


@pytest.fixture(scope="module")
def work(weights, tmp_path_factory):
  """A run that has trained both stages, on the latents of a random autoencoder."""
  root = tmp_path_factory.mktemp("run") / "run"
  work = Workdir.create(root, config_lib.resolve(recipe(weights)))
  stages = {"ingest": ingest.run, "encode": encode.run}
  for name in work.experiment.recipe:
    work.start(name)
    if name == "autoencoder":
      untrained.save(work, name, seed=0)
      work.finish(name, 1.0, steps=1)
    else:
      stages.get(name, runner.run)(work, name)
  return work


def losses(work, stage):
  lines = metrics.read(str(work.folder(stage)))
  return [line["loss"] for line in lines if "loss" in line]


def test_the_records_hold_features_as_long_as_their_captions(work):
  source = records.open_records(work.folder("encode") / "train" / BUCKET)
  lengths = set()
  for index in range(len(source)):
    arrays = source[index].arrays
    assert arrays["text_t5"].shape[1:] == (24,) and arrays["text_t5"].dtype == np.float32
    assert arrays["text_byt5"].shape == (0, 16)  # no caption of Marbles quotes anything
    lengths.add(len(arrays["text_t5"]))
  assert max(lengths) <= 64 and len(lengths) > 1


def test_a_stage_takes_features_that_lie_elsewhere_if_they_are_of_its_encoders(work, tmp_path):
  shutil.copytree(work.root, tmp_path / "run")

  def adopt(folder):
    stage = dataclasses.replace(work.experiment.stages["encode"], folder=str(folder))
    stages = {**work.experiment.stages, "encode": stage}
    other = Workdir(tmp_path / "run", dataclasses.replace(work.experiment, stages=stages))
    encode.run(other, "encode")
    return other.done_record("encode")["examples"]

  assert adopt(work.folder("encode")) == work.done_record("encode")["examples"]
  path = tmp_path / "run" / "encode" / "train" / BUCKET / records.MANIFEST_NAME
  manifest = json.loads(path.read_text())
  manifest["settings"]["text"]["t5"] = "0" * 16
  path.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match="lacks the text features of stage encode, or has those of"):
    adopt(tmp_path / "run" / "encode")


def run_encode(work, weights, out, *more):
  values = flags.FlagValues()
  encode.define_flags(values)
  chosen = f"--text_weights={weights / 't5'},{weights / 'byt5'}"
  flag = {"autoencoder": work.root, "stage": "autoencoder", "videos": work.root / "videos"}
  values([
    "encode", *(f"--{k}={v}" for k, v in flag.items()), f"--out={out}", f"--buckets={BUCKET}",
    "--text_encoders=any,any", "--text_names=t5,byt5", chosen, "--text_reads=prompt,quoted",
    "--text_lengths=64,12", "--text_dtype=float32", *more,
  ])  # fmt: skip
  encode.main(["encode"], values)
  return out / encode.STAGE


def test_the_command_writes_the_features_that_a_stage_reads(work, weights, tmp_path):
  made = run_encode(work, weights, tmp_path / "out")
  wanted = records.open_records(work.folder("encode") / "train" / BUCKET)
  found = records.open_records(made / "train" / BUCKET)
  assert found.settings["text"] == wanted.settings["text"] and len(found.settings["text"]) == 2
  by_caption = {wanted[n].caption: wanted[n].arrays["text_t5"] for n in range(len(wanted))}
  same = [
    n for n in range(len(found)) if found[n].caption in by_caption and found[n].fps == wanted[0].fps
  ]
  assert same
  for number in same:
    record = found[number]
    np.testing.assert_allclose(record.arrays["text_t5"], by_caption[record.caption], atol=1e-5)
    assert record.arrays["text_byt5"].shape == (0, 16)
  with pytest.raises(UserError, match="made in another way"):
    run_encode(work, weights, tmp_path / "out", "--text_lengths=64,11")


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--text_encoders=", "--text_names needs --text_encoders"),
    ("--text_lengths=64,few", "name whole numbers"),
    ("--text_lengths=64", "one entry for each"),
    ("--text_names=", "need two names"),
    ("--text_reads=prompt,all", "must be one of 'prompt', 'quoted'"),
    ("--text_encoders=ul3,any", 'did you mean "ul2"'),
    ("--text_weights=nowhere,nowhere", r"no converted weights: make it with .*convert"),
  ],
)
def test_flags_of_text_encoders_that_cannot_be_are_refused(work, weights, tmp_path, flag, words):
  with pytest.raises(UserError, match=words):
    run_encode(work, weights, tmp_path / "out", flag)
  assert not (tmp_path / "out").exists()


def test_online_and_cached_features_give_the_same_training(work):
  cached, online = (losses(work, stage) for stage in STAGES)
  assert len(cached) == 3 and len(set(cached)) == 3
  np.testing.assert_allclose(online, cached, rtol=1e-5)


def test_the_encoders_are_not_part_of_the_checkpoint(work):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  with mesh_lib.use(mesh):
    trees = [runner.load_trained(work, stage, mesh)[1] for stage in STAGES]
  assert set(trees[0]) == {"backbone"}
  assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_a_model_of_features_is_sampled_from_a_prompt(work):
  """The frame rate, the quoted text and the prompt itself all tell."""
  bucket = parse_bucket(BUCKET)
  videos = {}
  prompts = ["a red circle moves left", 'a red circle says "hi"', "a red circle says hi", ""]
  for stage in STAGES:
    generator = Generator.load(work, stage, devices=jax.devices()[:1])
    videos[stage] = generator.generate(prompts, bucket, [3] * 4).astype(int)
  assert np.abs(videos["cached"] - videos["online"]).max() <= 2  # three steps of rounding apart
  for row in range(1, 4):
    assert np.abs(videos["cached"][row] - videos["cached"][0]).max() > 0
  generator.fps = 0.0  # no prefix; the digits of another rate are unknown to this vocabulary
  assert np.abs(generator.generate(prompts[:1], bucket, [3]) - videos["online"][:1]).max() > 0


def test_the_motion_of_the_camera_can_be_asked_for(work, tmp_path, monkeypatch, capsys):
  common = ("sample", f"--workdir={work.root}", "--prompt=a red circle", f"--out={tmp_path}")
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
  made, names = [], []
  for camera in ((), ("--camera= Zoom  IN",)):
    values = flags.FlagValues()
    sample.define_flags(values)
    values([*common, *camera])
    sample.main([], values)
    names.append(capsys.readouterr().out.split()[0])
    made.append(media.read_video(Path(names[-1]).read_bytes()).astype(int))
  assert names[0] != names[1] and "zoom-in" in names[1]  # neither is written over
  assert np.abs(made[0] - made[1]).max() > 0


def test_the_plan_of_an_online_stage_holds_its_encoders(work):
  topology = topologies.parse("cpu:8")
  devices = topologies.devices(topology)
  plans = {
    stage: planner.make_plan(
      work.experiment, stage, parse_bucket(BUCKET), topology, devices, advise=False
    ).record
    for stage in STAGES
  }
  assert plans["cached"]["memory_gib"]["frozen"] == 0
  params = tasks.make(work.experiment.stages["online"].task).frozen_shapes(None)
  total = sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 2**30
  # Sharded over eight devices, but for what does not divide.
  assert total / 8 < plans["online"]["memory_gib"]["frozen"] < total / 3
  parts = plans["online"]["model_flops_by_part"], plans["cached"]["model_flops_by_part"]
  assert parts[0]["text_encoder"] > 0 == parts[1]["text_encoder"]


def test_what_is_missing_is_said_before_anything_is_trained(work, weights, tmp_path):
  stage = work.experiment.stages["online"]

  def begin(**changes):
    text = dataclasses.replace(stage.task.text, **changes)
    task = tasks.make(dataclasses.replace(stage.task, text=text))
    return task.load_frozen(mesh_lib.make_mesh(mesh_lib.MeshConfig()))

  with pytest.raises(UserError, match=r"no converted weights: make it with .*mgen_jax\.convert"):
    begin(weights=(str(weights / "nowhere"), str(weights / "byt5")))
  run_convert(f"--source={toys.write(tmp_path / 'hf', 't5', toys.T5)}", f"--out={tmp_path / 'no'}")
  with pytest.raises(UserError, match=r"no has no vocabulary .*: put its spiece\.model"):
    begin(weights=(str(tmp_path / "no"), str(weights / "byt5")))
  with pytest.raises(UserError, match="does not hold ul2"):
    begin(encoders=("ul2", "any"), widths=(4096, 16))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"encoders": ("any",)}, "one entry for each of the encoders"),
    ({"encoders": ("ul3", "any")}, 'did you mean "ul2"'),
    ({"encoders": ("ul2", "any")}, r"widths is .*ul2 makes features of 4096"),
    ({"encoders": ("llama3-8b", "any")}, "does not make features"),
    ({"encoders": ("metaclip-l-text", "any"), "lengths": (78, 12)}, "reads 1 to 77"),
    ({"dropout": (0.5,)}, "one share for each"),
    ({"dropout": (0.5, 1.5)}, "between 0 and 1"),
  ],
)
def test_a_stack_that_cannot_be_is_refused(weights, change, words):
  with pytest.raises(ConfigError, match=words):
    config_lib.resolve(recipe(weights, **change))


def test_a_stage_that_reads_what_encode_does_not_write_is_refused(weights):
  values = recipe(weights)
  values.stages.encode.text.lengths = (64, 11)
  with pytest.raises(ConfigError, match="differ in lengths"):
    config_lib.resolve(values)
  values.stages.encode.text = schema.to_config_dict(StackConfig())
  with pytest.raises(ConfigError, match=r"makes none: .* or set .*online"):
    config_lib.resolve(values)
  values.stages.cached.task.text.online = True
  config_lib.resolve(values)
