"""The generator as a task: its text, its objectives, its samplers, its growth between stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax import config as config_lib
from mgen_jax import schema, tasks
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models.backbone import BackboneConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.tasks import text_inputs
from mgen_jax.tasks.text_to_video import SamplerConfig, TextToVideoConfig
from mgen_jax.training import runner, start
from mgen_jax.training import state as state_lib
from mgen_jax.workdir import Workdir
from tests import tiny, untrained

BUCKET = Bucket(8, 32, 48)
MODEL = BackboneConfig(
  layers=1,
  width=16,
  heads=2,
  mlp_width=24,
  in_channels=4,
  out_channels=4,
  max_positions=(2, 2, 3),
  context_widths=(8,),
  dtype="float32",
  remat="none",
)
BYTES = text_inputs.ByteTextConfig(width=8, heads=2, layers=1, mlp_width=16, max_length=12)
FEATURES = text_inputs.FeatureTextConfig(names=("a", "b"), widths=(8, 6), lengths=(5, 3))
CONFIG = TextToVideoConfig(model=MODEL, text=BYTES, stride=(4, 8, 8))
FROM_FEATURES = TextToVideoConfig(
  model=dataclasses.replace(MODEL, context_widths=(8, 6)), text=FEATURES, stride=(4, 8, 8)
)


def _params(task):
  """All random: at the start the head is zero and hides everything."""
  leaves, tree = jax.tree.flatten(state_lib.param_shapes(task))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  noisy = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def _record(captions=(4, 2), seed=0):
  rng = np.random.default_rng(seed)
  return {
    "latents": rng.normal(size=(2, 4, 6, 4)),
    "caption": "a red circle",
    "text_a": rng.normal(size=(captions[0], 8)).astype(np.float16),
    "text_b": rng.normal(size=(captions[1], 6)).astype(np.float16),
  }


def _batch(task, records):
  return {k: np.stack([task.prepare(r)[k] for r in records]) for k in task.prepare(records[0])}


def _keys(n=2, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def test_features_of_records_become_padded_rows_with_masks():
  task = tasks.make(FROM_FEATURES)
  batch = _batch(task, [_record((4, 0)), _record((9, 3))])
  specs = task.batch_spec(BUCKET, 2)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (s.shape, np.dtype(s.dtype)) for k, s in specs.items()
  }
  assert batch["text_a_mask"].sum(1).tolist() == [4, 5]  # the longer text is cut
  assert batch["text_b_mask"].sum(1).tolist() == [0, 3]
  np.testing.assert_allclose(
    batch["text_a"][0, :4].astype(np.float32), _record((4, 0))["text_a"], rtol=1e-2
  )


def test_a_model_of_features_trains_and_samples_and_padding_changes_nothing():
  task = tasks.make(FROM_FEATURES)
  params = _params(task)
  assert set(params) == {"backbone"}  # the encoders are not part of it
  batch = _batch(task, [_record((4, 0)), _record((5, 3))])
  loss, grads = jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, b, _keys())[0]))(params, batch)
  assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  noisy = {**batch, "text_a": batch["text_a"].copy(), "text_b": batch["text_b"].copy()}
  for name in ("text_a", "text_b"):
    noisy[name][~batch[f"{name}_mask"]] = 50.0
  assert jax.jit(task.loss)(params, noisy, _keys())[0] == pytest.approx(float(loss), rel=1e-5)
  sampler = SamplerConfig(num_steps=2, guidance=2.0)
  made = jax.jit(lambda p, b: task.sample(p, b, _keys(), BUCKET, sampler=sampler))(params, batch)
  assert made.shape == (2, 2, 4, 6, 4) and np.isfinite(made).all()


def test_a_dropped_text_says_nothing_of_it():
  """Nor does one that no encoder has anything to say of."""
  task = tasks.make(dataclasses.replace(FROM_FEATURES, caption_dropout=1.0))
  params = _params(task)
  losses = [
    float(jax.jit(task.loss)(params, _batch(task, [record] * 2), _keys())[0])
    for record in (_record((4, 2)), {**_record((0, 0)), "latents": _record()["latents"]})
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  kept = tasks.make(dataclasses.replace(FROM_FEATURES, caption_dropout=0.0))
  said = float(jax.jit(kept.loss)(params, _batch(kept, [_record()] * 2), _keys())[0])
  assert said != pytest.approx(losses[0], rel=1e-4)


def test_records_without_features_and_prompts_are_refused():
  task = tasks.make(FROM_FEATURES)
  record = _record()
  with pytest.raises(UserError, match="text_b"):
    task.prepare({key: value for key, value in record.items() if key != "text_b"})
  with pytest.raises(UserError, match=r"\[length, 8\]"):
    task.prepare({**record, "text_a": record["text_b"]})
  with pytest.raises(UserError, match="cannot draw from the prompt"):
    task.tokenize(["a red circle"])
  with pytest.raises(ConfigError, match="one entry"):
    text_inputs.FeatureTextConfig(widths=(3,))


def test_v_prediction_trains_and_samples_by_ddim():
  """The ablation arm of the paper: another target and sampler, all else alike."""
  config = dataclasses.replace(
    CONFIG, objective="v_prediction", sampler=SamplerConfig(method="ddim", num_steps=3)
  )
  task, flow = tasks.make(config), tasks.make(CONFIG)
  params = _params(task)
  batch = _batch(task, [_record(), _record(seed=1)])
  losses = [float(jax.jit(t.loss)(params, batch, _keys())[0]) for t in (task, flow)]
  assert np.isfinite(losses).all() and losses[0] != pytest.approx(losses[1], rel=1e-3)
  made = jax.jit(lambda p, b: task.sample(p, b, _keys(), BUCKET))(params, batch)
  assert made.shape == (2, 2, 4, 6, 4) and np.isfinite(made).all()
  for objective, method in (("v_prediction", "euler"), ("flow_matching", "ddim")):
    with pytest.raises(ConfigError, match=r"sampler\.method"):
      dataclasses.replace(CONFIG, objective=objective, sampler=SamplerConfig(method=method))


def _sample(sampler, mesh=None, config=CONFIG):
  task = tasks.make(config)
  params, batch = _params(task), _batch(task, [_record(), _record(seed=1)])
  program = jax.jit(lambda p, b: task.sample(p, b, _keys(), BUCKET, sampler=sampler))
  if mesh is None:
    return program(params, batch)
  with mesh_lib.use(mesh_lib.make_mesh(mesh)):
    return program(params, batch)


def test_bf16_sampling_stays_close():
  full = SamplerConfig(num_steps=4, guidance=1.5)
  exact = _sample(full)
  half = _sample(dataclasses.replace(full, dtype="bfloat16"))
  assert half.dtype == jnp.float32
  error = float(jnp.abs(half - exact).mean() / jnp.abs(exact).mean())
  assert 0 < error < 0.05
  np.testing.assert_array_equal(_sample(dataclasses.replace(full, dtype="float32")), exact)


@pytest.mark.parametrize("split", ["batch", "mesh"])
def test_guidance_split_changes_no_value(split):
  sampler = SamplerConfig(num_steps=2, guidance=3.0, guidance_split=split)
  made = _sample(sampler, MeshConfig(replica=2, fsdp=2, context=2))
  np.testing.assert_allclose(made, _sample(sampler), rtol=1e-4, atol=1e-4)


def test_guidance_split_over_the_mesh_gives_each_branch_half_of_the_devices(monkeypatch):
  """One example, two replicas: replica 0 has the conditional branch, replica 1 the other."""
  task = tasks.make(CONFIG)
  found = {}

  def look(self, model, params, x, t, text):
    jax.debug.inspect_array_sharding(x, callback=lambda s: found.setdefault("x", s))
    return jnp.tanh(x) * text["tokens"].sum(-1)[:, None, None, None, None]

  monkeypatch.setattr(type(task), "_velocity", look)
  batch = _batch(task, [_record()])
  sampler = SamplerConfig(num_steps=1, guidance=3.0, guidance_split="mesh")
  mesh = mesh_lib.make_mesh(MeshConfig(replica=2, fsdp=1, context=4))
  with mesh_lib.use(mesh):
    program = jax.jit(lambda b: task.sample({"backbone": {}}, b, _keys(1), BUCKET, sampler=sampler))
    program.lower(batch).compile()
  rows = found["x"].devices_indices_map((2, 2, 4, 6, 4))
  first = {d for d, index in rows.items() if index[0] == slice(0, 1)}
  assert first == set(mesh.devices[0].flat)
  assert len(rows) == 8 and all(index[0] != slice(None) for index in rows.values())


@pytest.mark.parametrize("growth", ["interpolate", "extend"])
def test_a_stage_starts_from_one_with_fewer_positions(tmp_path, growth):
  work = untrained.make(tmp_path)
  stages = work.experiment.stages
  model = dataclasses.replace(stages["t2v"].task.model, position_growth=growth)
  stage = dataclasses.replace(
    stages["t2v"], task=dataclasses.replace(stages["t2v"].task, model=model)
  )
  experiment = dataclasses.replace(work.experiment, stages={**stages, "t2v": stage})
  work = Workdir(tmp_path, experiment)
  task, mesh = tasks.make(stage.task), mesh_lib.make_mesh(MeshConfig(fsdp=2, context=4))
  with mesh_lib.use(mesh):
    layout = state_lib.param_shardings(task, mesh)
    shapes = state_lib.param_shapes(task)
    made = start.load_origin(work, "t2v", task, mesh, untrained.LATENTS, shapes, layout)
    _, old, _ = runner.load_trained(work, "t2i", mesh)
  assert jax.tree.map(lambda x: x.sharding, made) == layout
  table, small = made["backbone"]["position_width"], old["backbone"]["position_width"]
  assert table.shape == (3, 32) and small.shape == (2, 32)
  if growth == "extend":
    np.testing.assert_array_equal(table[:2], small)
  else:
    np.testing.assert_allclose(table[1], small.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    made["backbone"]["position_frames"][:1], old["backbone"]["position_frames"]
  )
  np.testing.assert_array_equal(made["text"]["embedding"], old["text"]["embedding"])


def test_a_start_reports_what_it_changes_tensor_by_tensor(caplog):
  stages = config_lib.resolve(tiny.get_config()).stages
  small, large = (tasks.make(stages[name].task) for name in ("t2i", "t2v"))
  found, fitted = state_lib.param_shapes(small), state_lib.param_shapes(large)
  del found["backbone"]["position_height"]
  found["old"] = {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")}
  with caplog.at_level("INFO"):
    lines = start.report("t2v", found, fitted)
  assert lines == [
    "changed  backbone/position_frames (1, 32) -> (2, 32)",
    "added    backbone/position_height (2, 32)",
    "changed  backbone/position_width (2, 32) -> (3, 32)",
    "dropped  old/kernel (3, 5)",
  ]
  assert all(line in caplog.text for line in lines)


def test_new_input_channels_say_nothing_at_the_start():
  """Of a model that reads conditions beside its latents: whatever they are, it is the old model."""
  made = config_lib.resolve(tiny.get_config()).stages["t2v"].task
  wide = dataclasses.replace(made, model=dataclasses.replace(made.model, in_channels=7))
  wide.check_origin(made, "config.stages.edit")
  with pytest.raises(ConfigError, match="in_channels is 4, and 7"):
    made.check_origin(wide, "config.stages.edit")
  old, new = tasks.make(made), tasks.make(wide)
  params = state_lib.init_params(old, jax.random.key(0))
  random = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
  grown = new.adapt(random, state_lib.init_params(new, jax.random.key(2)))
  assert grown["backbone"]["patch_in"]["kernel"].shape[0] == 28
  x = jax.random.normal(jax.random.key(3), (2, 2, 4, 4, 7))
  t, text = jnp.asarray([0.2, 0.7]), {"tokens": jnp.asarray(old.tokenize(["a", "red b"]))}
  wanted = old.velocity(random, x[..., :4], t, text)
  assert float(jnp.abs(wanted).max()) > 0.1
  np.testing.assert_allclose(new.velocity(grown, x, t, text), wanted, rtol=1e-5, atol=1e-5)


def test_a_table_of_positions_is_added_where_there_was_none():
  task = tasks.make(config_lib.resolve(tiny.get_config()).stages["t2v"].task)
  fresh = state_lib.init_params(task, jax.random.key(0))
  old = {**fresh, "backbone": dict(fresh["backbone"])}
  del old["backbone"]["position_frames"]
  made = task.adapt(old, fresh)
  assert jax.tree.structure(made) == jax.tree.structure(fresh)
  table = made["backbone"]["position_frames"]
  np.testing.assert_array_equal(table, fresh["backbone"]["position_frames"])


@pytest.mark.parametrize("objective", ["flow_matching", "v_prediction"])
def test_the_curve_over_the_times_sums_up_to_the_training_loss(objective):
  made = config_lib.resolve(tiny.get_config()).stages["t2v"].task
  sampler = dataclasses.replace(
    made.sampler, method="ddim" if objective == "v_prediction" else "euler"
  )
  made = dataclasses.replace(
    made, objective=objective, caption_dropout=0.0, time_mean=-0.5, sampler=sampler
  )
  task = tasks.make(made)
  params = state_lib.init_params(task, jax.random.key(0))
  count, bins = 512, 16
  keys = jax.random.split(jax.random.key(1), count)
  batch = {
    "latents": jax.random.normal(jax.random.key(2), (count, 1, 2, 2, 4)) * 0.3 + 0.5,
    "tokens": jnp.tile(jnp.asarray(task.tokenize(["red"])), (count, 1)),
  }
  times, shares = task.time_bins(bins)
  assert shares.sum() == pytest.approx(1) and (np.diff(times) > 0).all()
  losses = task.losses_at(params, batch, keys, jnp.asarray(times)[jnp.arange(count) % bins])
  curve = np.asarray(losses).reshape(-1, bins).mean(0)
  assert np.ptp(curve) > 0.1  # it does depend on the time
  drawn = float(task.loss(params, batch, keys)[0])
  assert float((curve * shares).sum()) == pytest.approx(drawn, rel=0.04)
  again = task.losses_at(params, batch, keys, jnp.asarray(times)[jnp.arange(count) % bins])
  np.testing.assert_array_equal(losses, again)


@pytest.mark.parametrize(
  ("change", "words"),
  [({"max_positions": (1, 9, 2)}, "never shrink"), ({"width": 64}, "model.width")],
)
def test_a_start_from_another_model_is_refused_before_anything_runs(change, words):
  values = tiny.get_config()
  for key, value in change.items():
    values.stages.t2i.task.model[key] = value
  with pytest.raises(ConfigError, match=words):
    config_lib.resolve(values)


def test_the_text_of_a_config_must_fit_its_model():
  values = tiny.get_config()
  values.stages.t2i.task.model.context_widths = (16, 8)
  with pytest.raises(ConfigError, match="context_widths"):
    config_lib.resolve(values)


def test_text_of_both_kinds_survives_the_config_file():
  values = tiny.get_config()
  assert values.stages.t2v.task.text.kind == "bytes"  # the default needs no word
  made = config_lib.resolve(values)
  assert config_lib.resolve(schema.to_plain(made)) == made
  task = {"name": "text_to_video", "text": {"kind": "features", "lengths": (7, 8, 9)}}
  built = schema.build(config_lib.TrainStage, {"kind": "train", "task": task})
  assert built.task.text == text_inputs.FeatureTextConfig(lengths=(7, 8, 9))
  assert schema.to_plain(built)["task"]["text"]["kind"] == "features"
