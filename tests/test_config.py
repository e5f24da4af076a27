"""What an experiment may say, and what is said back when it says something else."""

import dataclasses

import pytest

from mgen_jax import config, tasks
from mgen_jax.errors import ConfigError, UserError

MODEL = {
  "layers": 1, "width": 16, "heads": 2, "mlp_width": 32, "context_widths": (16,),
  "max_positions": (2, 4, 4), "dtype": "float32", "remat": "none",
}  # fmt: skip
GENERATOR = {
  "name": "text_to_video",
  "model": MODEL,
  "text": {"width": 16, "heads": 2, "layers": 1, "mlp_width": 16},
}
AUTOENCODER = {
  "name": "autoencoder",
  "model": {"channels": 8, "multipliers": (1, 1, 1, 1), "groups": 4, "res_blocks": 1},
}


def stages(**changes):
  made = {
    "ingest": {"kind": "ingest"},
    "autoencoder": {"kind": "train", "task": AUTOENCODER, "buckets": {"b16x32x32": {"batch": 8}}},
    "encode": {"kind": "encode", "buckets": ("1x32x32", "16x32x32")},
    "t2i": {
      "kind": "train", "task": GENERATOR, "latents": "encode",
      "buckets": {"b1x32x32": {"batch": 8}},
    },
    "t2v": {
      "kind": "train", "task": GENERATOR, "latents": "encode", "init_from": "t2i",
      "buckets": {"b16x32x32": {"batch": 8}},
    },
    "evaluate": {"kind": "evaluate", "bucket": "16x32x32"},
  }  # fmt: skip
  for name, change in changes.items():
    made[name] = {**made[name], **change}
  return made


def resolve(**changes):
  return config.resolve(config.experiment(name="test", stages=stages(**changes)))


def test_an_experiment_is_complete_and_keeps_the_order_of_its_stages():
  values = config.experiment(name="test", stages=stages())
  assert values.stages.t2v.optimizer.lr == 1e-4  # a default, there to be overridden
  assert values.recipe == ("ingest", "autoencoder", "encode", "t2i", "t2v", "evaluate")
  made = config.resolve(values)
  assert made.stages["t2v"].task.model.width == 16
  assert dataclasses.is_dataclass(made.data.marbles.world)


def test_an_experiment_survives_json(tmp_path):
  made = resolve()
  path = tmp_path / "config.json"
  path.write_text(config.to_json(made))
  assert config.from_json(str(path)) == made
  for damaged in (b"[1", b"[1]", b"\xff"):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="is not an experiment of this version"):
      config.from_json(str(path))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"t2v": {"optimzer": {}}}, ["config.stages.t2v.optimzer", '"optimizer"']),
    ({"t2v": {"optimizer": {"learning_rate": 1.0}}}, ["optimizer.learning_rate", "known:", " lr,"]),
    ({"t2v": {"steps": 1.5}}, ["config.stages.t2v.steps", "1.5", "whole number"]),
    ({"t2v": {"steps": True}}, ["config.stages.t2v.steps", "True"]),
    ({"t2v": {"steps": 0}}, ["config.stages.t2v", "steps is 0"]),
    ({"t2v": {"optimizer": {"lr": "high"}}}, ["config.stages.t2v.optimizer.lr", "'high'"]),
    ({"t2v": {"optimizer": {"b2": 1.0}}}, ["config.stages.t2v.optimizer", "b2 is 1.0"]),
    ({"t2v": {"optimizer": {"schedule": "cosin"}}}, ["optimizer.schedule", '"cosine"']),
    ({"t2v": {"kind": "trian"}}, ["config.stages.t2v.kind", '"train"']),
    ({"t2v": {"task": {**GENERATOR, "name": "text_to_vidoe"}}}, ['"text_to_video"']),
    ({"t2v": {"init_from": "t2x"}}, ["init_from", '"t2i"']),
    ({"t2v": {"init_from": "autoencoder"}}, ["init_from", "autoencoder", "text_to_video"]),
    ({"t2i": {"init_from": "t2v"}}, ["init_from", "not an earlier stage"]),
    ({"t2v": {"latents": None}}, ["config.stages.t2v.latents is not set"]),
    ({"autoencoder": {"latents": "encode"}}, ["config.stages.autoencoder.latents"]),
    ({"t2v": {"buckets": {}}}, ["config.stages.t2v.buckets is empty"]),
    ({"t2v": {"buckets": {"16x32x32": {}}}}, ["16x32x32", 'write "b16x32x32"']),
    ({"t2v": {"buckets": {"b16x32": {}}}}, ["16x32"]),
    ({"t2v": {"buckets": {"b16x32x32": {"batch": -1}}}}, ["b16x32x32", "above 0"]),
    ({"t2v": {"buckets": {"b16x32x32": {}}, "tokens_per_step": 9}}, ["t2v: tokens_per_step is 9"]),
    ({"t2v": {"tokens_per_step": 99}}, ["tokens_per_step is 99", "every bucket says its batch"]),
    ({"t2v": {"images_to_videos": 0.0}}, ["images_to_videos is 0"]),
    ({"t2v": {"buckets": {"b24x32x32": {}}}}, ["24x32x32", "max_positions[0]", "3"]),
    ({"t2v": {"buckets": {"b16x40x32": {}}}}, ["height 40", "multiple of 16"]),
    ({"autoencoder": {"buckets": {"b16x36x32": {}}}}, ["b16x36x32", "36", "8"]),
    ({"encode": {"buckets": ("1x32x32",)}}, ["16x32x32", "config.stages.encode.buckets"]),
    ({"t2v": {"task": {**GENERATOR, "stride": (8, 4, 8)}}}, ["t2v.task.stride", "(8, 8, 8)"]),
    ({"evaluate": {"generator": "t3v"}}, ["config.stages.evaluate.generator", '"t2v"']),
  ],
)
def test_what_cannot_be_used_is_named_with_the_fix(changes, words):
  with pytest.raises(ConfigError) as error:
    resolve(**changes)
  for word in words:
    assert word in str(error.value)


def model(**changes):
  return {"task": {**GENERATOR, "model": {**MODEL, **changes}}}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"t2v": {"optimizer": {"lr": float("nan")}}}, "t2v.optimizer.lr is nan: it must be a finite"),
    ({"t2v": {"optimizer": {"lr": float("inf")}}}, "t2v.optimizer.lr is inf: it must be a finite"),
    ({"t2v": {"validate_batches": 0}}, "config.stages.t2v: validate_batches is 0: it must be 1 or"),
    ({"t2v": {"seed": 2**32}}, "config.stages.t2v: seed is 4294967296"),
    ({"t2v": {"task": {**GENERATOR, "caption_dropout": 2.0}}}, "caption_dropout is 2.0: it must"),
    ({"t2v": {"task": {**GENERATOR, "stride": (8, 0, 8)}}}, "stride is (8, 0, 8): it must be 1"),
    ({"t2v": {"task": {**GENERATOR, "sampler": {"num_steps": 0}}}}, "sampler: num_steps is 0"),
    ({"t2v": model(heads=0)}, "config.stages.t2v.task.model: heads is 0: it must be 1 or more"),
    ({"t2v": model(patch=(1, 2, 0))}, "patch is (1, 2, 0): it must be 1 or more"),
    ({"t2v": model(dtype="float16")}, "dtype is 'float16': it must be one of 'bfloat16'"),
    ({"t2v": model(remat="ful")}, "unknown remat policy 'ful'"),
    ({"autoencoder": {"task": {**AUTOENCODER, "kl_weight": -1.0}}}, "kl_weight is -1.0: it cannot"),
    ({"autoencoder": {"task": {"name": "autoencoder", "model": {"kernel": 2}}}}, "must be odd"),
    ({"encode": {"batch": 0}}, "config.stages.encode: batch is 0: it must be 1 or more"),
    ({"encode": {"latent_scale": 0.0}}, "latent_scale is 0.0: it must be more than 0"),
    ({"encode": {"buckets": ("1x32x32", "16x32x32", "1x30x32")}}, "1x30x32: video height 30"),
    ({"evaluate": {"show": -1}}, "config.stages.evaluate: show is -1: it cannot be negative"),
  ],
)
def test_a_number_out_of_range_is_refused_before_any_stage_begins(changes, words):
  with pytest.raises(ConfigError) as error:
    resolve(**changes)
  assert words in str(error.value)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"name": "../elsewhere"}, "name is '../elsewhere'"),
    ({"name": ""}, "name is ''"),
    ({"name": "."}, "name is '.'"),
    ({"seed": -1}, r"seed is -1"),
    ({"data": {"held_out": 1.0}}, "held_out is 1.0"),
    (
      {"data": {"held_out": 0.0, "videos": "DIR"}},
      "config.stages.evaluate samples captions of held-out",
    ),
    ({"data": {"fps": 0.0}}, "fps is 0.0: it must be more than 0"),
    ({"data": {"fps_range": (16.0, float("nan"))}}, "nan: it must be a finite number"),
    ({"data": {"max_crop": 1.5}}, "max_crop is 1.5"),
    ({"data": {"marbles": {"clips": 0}}}, "clips is 0"),
    ({"data": {"marbles": {"sizes": ((64, 0),)}}}, "sizes is"),
    ({"data": {"marbles": {"frames": ()}}}, "frames must name one or more"),
  ],
)
def test_a_run_that_cannot_be_drawn_or_would_lie_elsewhere_is_refused(values, words):
  made = config.experiment(name="test", stages=stages()).to_dict()
  with pytest.raises(ConfigError, match=words):
    config.resolve({**made, **values})


@pytest.mark.parametrize("name", ["with", "two words", "2nd"])
def test_a_stage_that_no_flag_could_name_is_refused(name):
  values = config.experiment(name="test", stages={name: {"kind": "ingest"}})
  with pytest.raises(ConfigError, match=f'config.stages has "{name}", which no flag can spell'):
    config.resolve(values)


def test_channels_of_the_latents_must_fit():
  task = {**GENERATOR, "model": {**MODEL, "in_channels": 8}}
  with pytest.raises(ConfigError, match=r"t2i.task.model.in_channels is 8: .* has 16"):
    resolve(t2i={"task": task})


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest():
  made = resolve(t2v={"buckets": {"b16x32x32": {"batch": 12}}, "accumulate": 2})
  config.check_devices(made, 2, 1)
  with pytest.raises(ConfigError, match=r"t2v.buckets.b16x32x32.batch is 12.* set it to 16"):
    config.check_devices(made, 8, 1)


def test_batches_follow_the_tokens_of_a_step_whatever_the_devices():
  buckets = {"b1x32x32": {}, "b16x32x32": {}}
  made = resolve(t2v={"buckets": buckets, "tokens_per_step": 400, "batch_multiple": 4})
  sizes = {b.name: entry.batch for b, entry in made.stages["t2v"].batches().items()}
  task = tasks.make(made.stages["t2v"].task)
  tokens = {b.name: task.tokens(b) for b in made.stages["t2v"].batches()}
  for name, size in sizes.items():
    assert size % 4 == 0
    assert size * tokens[name] <= 400 < (size + 4) * tokens[name]
  assert sizes["1x32x32"] > sizes["16x32x32"]
  config.check_devices(made, 4, 2)
  with pytest.raises(ConfigError, match=r"b1.x32x32.batch is .* or batch_multiple to 8"):
    config.check_devices(
      resolve(t2v={"buckets": buckets, "tokens_per_step": 120, "batch_multiple": 2}), 8, 1
    )
  mixed = resolve(t2v={"buckets": buckets | {"b1x32x32": {"batch": 8}}, "tokens_per_step": 400})
  assert {e.batch for e in mixed.stages["t2v"].batches().values()} == {
    8,
    sizes["16x32x32"] // 8 * 8,
  }


def test_a_mesh_that_does_not_fit_is_refused():
  made = resolve(t2v={"mesh": {"tensor": 3}})
  with pytest.raises(ConfigError, match=r"config.stages.t2v.mesh.* the 8 devices"):
    config.check_devices(made, 8, 1)


def test_heads_that_do_not_divide_over_the_mesh_are_refused_before_the_stages_ahead_of_it():
  config.check_devices(resolve(t2v={"mesh": {"tensor": 2, "context": 2}}), 8, 1)
  made = resolve(t2v={"mesh": {"tensor": 4}})
  with pytest.raises(ConfigError, match=r"t2v\.mesh: tensor=4 .* the 2 heads .*: set it to 2\."):
    config.check_devices(made, 8, 1)
  ulysses = {"task": {**GENERATOR, "model": {**MODEL, "context_parallel": "ulysses"}}}
  made = resolve(t2v={"mesh": {"tensor": 2, "context": 2}, "init_from": None, **ulysses})
  with pytest.raises(ConfigError, match=r"tensor=2 x context=2 .*: set context to 1, or use"):
    config.check_devices(made, 8, 1)


def test_differences_name_keys_with_dots():
  assert config.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}) == {"a.b": (1, 3)}
