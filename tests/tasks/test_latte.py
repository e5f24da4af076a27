"""Latte as a task: what it learns from, what dropout and images do, how it is sampled."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgen_jax import tasks
from mgen_jax.config import OptimizerConfig
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.sources import JointSource
from mgen_jax.encoders import Prompt
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models.latte import LatteConfig
from mgen_jax.tasks import text_inputs
from mgen_jax.tasks.class_labels import ClassLabels
from mgen_jax.tasks.latte import DiffusionSamplerConfig, LatteTaskConfig
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.inputs import Prepare
from mgen_jax.weights import files, latte

MODEL = LatteConfig(layers=2, width=32, heads=2, in_channels=4, max_frames=4)
CLIP, IMAGE = Bucket(4, 32, 32), Bucket(1, 32, 32)
NAMES = ("ApplyEyeMakeup", "ApplyLipstick", "Archery")
SAMPLER = DiffusionSamplerConfig(num_steps=3)


def _config(condition="class", **values):
  model = {
    "class": {"classes": len(NAMES)},
    "text": {"conditioning": "adaln_single", "context_widths": (16,)},
    "none": {},
  }[condition]
  values.setdefault("class_names", NAMES if condition == "class" else ())
  values.setdefault("sampler", SAMPLER)
  if condition == "text":
    values["text"] = text_inputs.ByteTextConfig(width=16, heads=2, layers=1, mlp_width=32)
  return LatteTaskConfig(model=dataclasses.replace(MODEL, **model), **values)


def _read(task, texts):
  return task.reader(None)([Prompt(text) for text in texts])


def _params(task, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
  return jax.tree.map(draw, state_lib.param_shapes(task))


def _record(seed, caption="Archery", frames=4):
  rng = np.random.default_rng(seed)
  return {"mean": rng.standard_normal((frames, 4, 4, 4)).astype(np.float16), "caption": caption}


class Records:
  """A source of records."""

  def __init__(self, frames, captions):
    self.frames, self.captions, self.digest = frames, captions, str(captions)

  def __len__(self):
    return len(self.captions)

  def example(self, index, rng):
    del rng
    return _record(index, self.captions[index], self.frames)


def _batch(task, images=0, rows=2):
  clips = Records(4, [NAMES[i % 3] for i in range(rows)])
  source = JointSource(clips, Records(1, list(NAMES)), images) if images else clips
  prepare = Prepare(task, {"mean": np.zeros(4), "std": np.ones(4)})
  made = [prepare(source.example(i, np.random.default_rng(i)), None) for i in range(rows)]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


@pytest.mark.parametrize("condition", ["class", "text", "none"])
@pytest.mark.parametrize("images", [0, 3])
def test_a_batch_from_records_is_what_the_loss_takes(condition, images):
  task = tasks.make(_config(condition, images=images))
  batch = _batch(task, images)
  specs = task.batch_spec(CLIP, 2)
  assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
    n: (s.shape, np.dtype(s.dtype)) for n, s in specs.items()
  }
  keys = jax.random.split(jax.random.key(0), 2)
  loss, metrics = jax.eval_shape(task.loss, state_lib.param_shapes(task), batch, keys)
  assert loss.shape == metrics["mse"].shape == metrics["vlb"].shape == ()


def test_images_are_drawn_at_random_and_belong_to_no_clip():
  source = JointSource(Records(4, ["Archery"]), Records(1, list(NAMES)), 50)
  drawn = source.example(0, np.random.default_rng(0))["images"]
  assert {image["caption"] for image in drawn} == set(NAMES)
  again = source.example(0, np.random.default_rng(0))["images"]
  assert [i["caption"] for i in drawn] == [i["caption"] for i in again]
  with pytest.raises(UserError, match="no examples"):
    JointSource(Records(4, ["x"]), Records(1, []), 2)


def test_latents_can_be_drawn_from_their_distribution():
  task = tasks.make(_config())
  record = {**_record(0), "logvar": np.full((4, 4, 4, 4), np.log(0.25), np.float16)}
  statistics = {"mean": np.zeros(4), "std": np.full(4, 2.0)}
  sample, mean = (Prepare(task, statistics, drawn) for drawn in (True, False))
  noise = [
    sample(record, np.random.default_rng(i))["latents"] - mean(record, None)["latents"]
    for i in range(30)
  ]
  assert np.std(noise) == pytest.approx(0.25, rel=0.05)  # 0.5, over a std of 2
  np.testing.assert_array_equal(sample(record, None)["latents"], mean(record, None)["latents"])


def test_latents_that_were_drawn_when_they_were_written_are_not_drawn_again():
  task = tasks.make(_config(images=2))
  records = [_record(i) for i in range(3)]
  for record in records:
    record["latents"] = record.pop("mean")
  statistics = {"mean": np.ones(4), "std": np.full(4, 2.0)}
  example = {**records[0], "images": [{**r, "latents": r["latents"][:1]} for r in records[1:]]}
  made = Prepare(task, statistics, sample=True)(example, np.random.default_rng(0))
  expected = (records[0]["latents"].astype(np.float32) - 1.0) / 2.0
  np.testing.assert_allclose(made["latents"], expected, rtol=1e-6)
  for image, record in zip(made["images"], records[1:], strict=True):
    np.testing.assert_allclose(image, (record["latents"][0] - 1.0) / 2.0, rtol=1e-3)


def test_conditions_are_dropped_for_the_clip_and_apart_for_all_its_images():
  """spec: dropout is drawn once for a clip, and once for all images beside it."""
  task = tasks.make(_config(images=3, condition_dropout=0.5))
  seen = []
  task._apply = lambda model, params, x, step, rows, images: (
    seen.append(np.asarray(rows["labels"])) or jnp.zeros((*x.shape[:-1], 8))
  )
  batch = _batch(task, 3, rows=64)
  task.loss({}, batch, jax.random.split(jax.random.key(1), 64))
  dropped = seen[0] == len(NAMES)  # [64, 1 + 3]
  assert (dropped[:, 1:] == dropped[:, 1:2]).all()
  assert 0.3 < dropped[:, 0].mean() < 0.7 and 0.3 < dropped[:, 1].mean() < 0.7
  assert (dropped[:, 0] != dropped[:, 1]).any()
  kept = np.concatenate([batch["labels"][:, None], batch["image_labels"]], 1)
  assert (seen[0][~dropped] == kept[~dropped]).all()


def test_an_example_of_a_batch_does_not_change_with_the_others():
  task = tasks.make(_config(images=2))
  params, batch = _params(task), _batch(task, 2)
  keys = jax.random.split(jax.random.key(0), 2)
  loss = jax.jit(lambda p, b, k: task.loss(p, b, k)[0])
  whole = loss(params, batch, keys)
  parts = [loss(params, {n: x[i : i + 1] for n, x in batch.items()}, keys[i : i + 1])
           for i in range(2)]  # fmt: skip
  np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-5)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_samples_follow_the_condition_and_the_seed(condition):
  guidance = 3.0 if condition == "class" else 1.0
  sampler = dataclasses.replace(SAMPLER, guidance=guidance, method="ddim")
  task = tasks.make(_config(condition, sampler=sampler))
  params = _params(task)
  draw = jax.jit(lambda batch, keys: task.sample(params, batch, keys, CLIP))
  names = ["Archery", "ApplyLipstick"] if condition == "class" else ["", ""]
  keys = jax.random.split(jax.random.key(0), 2)
  made = draw(_read(task, names), keys)
  assert made.shape == (2, *task.config.latent_shape(CLIP)) and np.isfinite(made).all()
  np.testing.assert_array_equal(made, draw(_read(task, names), keys))
  assert np.abs(made - draw(_read(task, names), keys[::-1])).max() > 1e-3
  if condition == "class":
    other = draw(_read(task, names[::-1]), keys)
    none = draw(_read(task, ["", ""]), keys)
    assert np.abs(made - other).max() > 1e-3 and np.abs(made - none).max() > 1e-3


def test_a_class_that_differs_in_its_direction_only_is_learned():
  """The same bright columns in every clip, in the order of time or against it."""
  names = ("moves right", "moves left")
  model = dataclasses.replace(MODEL, classes=2, position_scale=0.25, time_scale=0.25)
  config = LatteTaskConfig(
    model=model, class_names=names, prediction="velocity", schedule="zero_terminal_snr",
    sampler=DiffusionSamplerConfig(method="ddim", num_steps=8, spacing="trailing", guidance=2.0),
  )  # fmt: skip
  task = tasks.make(config)
  right = jnp.eye(4)[:, None, :, None] * jnp.ones((4, 4, 4, 4)) * 2.0  # [F, H, W, C]
  clips = jnp.stack([right, right[::-1]])
  optimizer = optimizer_lib.make_optimizer(
    OptimizerConfig(name="muon", lr=3e-3, muon_lr=0.03, adam=("latte/patch_in", "latte/head")), 150
  )
  labels = jnp.arange(16) % 2

  @jax.jit
  def train(params, opt_state):
    def step(carry, key):
      params, opt_state = carry
      batch = {"latents": clips[labels], "labels": labels}
      grads = jax.grad(lambda p: task.loss(p, batch, jax.random.split(key, 16))[0])(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), jax.random.split(jax.random.key(1), 150))[0][0]

  params = nn.meta.unbox(task.init(jax.random.key(0)))
  params = train(params, optimizer.init(params))
  drawn = jax.jit(lambda p, keys: task.sample(p, _read(task, names * 4), keys, CLIP))(
    params, jax.random.split(jax.random.key(2), 8)
  )
  wrong_by = [jnp.square(drawn - clip).mean((1, 2, 3, 4)) for clip in clips]
  assert (jnp.stack(wrong_by, 1).argmin(1) == jnp.arange(8) % 2).all()


def test_a_stage_starts_from_dit_but_for_its_classes(tmp_path):
  """Through a safetensors file: all blocks in turn; DiT's table of classes is left out."""
  task = tasks.make(_config())
  shapes = state_lib.param_shapes(task)["latte"]
  draw = lambda x: np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)  # noqa: E731
  flat = latte.to_latte(jax.tree.map(draw, shapes), task.config.model, rows=2, frames=4)
  dit = {n: x for n, x in flat.items() if n != "temp_embed"}
  dit["y_embedder.embedding_table.weight"] = np.zeros((1001, 32), np.float32)
  files.write_tensors(tmp_path / "dit.safetensors", dit)
  fresh = jax.device_get(_params(task, 2))
  made = task.from_weights(files.read_tensors(tmp_path / "dit.safetensors"), fresh)["latte"]
  np.testing.assert_array_equal(made["classes"], fresh["latte"]["classes"])
  again = latte.to_latte(made, task.config.model, rows=2, frames=4)
  for name in set(dit) - {"y_embedder.embedding_table.weight"}:
    np.testing.assert_array_equal(again[name], dit[name], err_msg=name)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"variant": 2}, "has variant 1: a model of variant 2 cannot exchange weights"),
    ({"variant": 3}, "of variant 3"),
    ({"conditioning": "all_tokens"}, "conditioning all_tokens cannot exchange weights"),
    ({"time_encoding": "rotary"}, "has time_encoding sincos: a model of time_encoding rotary"),
    ({"embedding": "compression"}, "has embedding uniform: a model of embedding compression"),
    ({"layers": 4}, "layers, .*missing: blocks.2"),
    ({"width": 48}, "misshaped: .*instead of"),
    ({"classes": 0}, "1 unmapped: y_embedder.embedding_table.weight"),
  ],
)
def test_a_checkpoint_of_another_model_is_refused(changes, message):
  config = dataclasses.replace(MODEL, classes=3)
  shapes = state_lib.param_shapes(tasks.make(_config()))["latte"]
  flat = latte.to_latte(jax.tree.map(lambda x: np.zeros(x.shape), shapes), config, 2, 4)
  with pytest.raises(files.WeightsError, match=message) as caught:
    latte.start_from(flat, dataclasses.replace(config, **changes), {})
  assert "\n" not in str(caught.value)


def test_weights_of_something_else_are_refused():
  with pytest.raises(files.WeightsError, match="neither Latte, DiT nor PixArt"):
    latte.start_from({"conv.weight": np.zeros(1)}, MODEL, {})


def test_a_caption_is_the_class_with_most_of_its_words():
  labels = ClassLabels(["red circle moves up", "red circle moves up and left", "Archery"])
  assert labels.number("a small red circle moves up") == 0
  assert labels.number("a small red circle moves up and left") == 1
  assert labels.number("archery") == 2
  with pytest.raises(UserError, match="several classes"):
    ClassLabels(["red circle", "moves up"]).number("a red circle moves up")


@pytest.mark.parametrize(
  ("condition", "prompt", "message"),
  [
    ("class", "ApplyEyeMakup", "none of the 3 classes: did you mean 'ApplyEyeMakeup'"),
    ("class", "zzz", "they are 'ApplyEyeMakeup', 'ApplyLipstick', 'Archery'"),
    ("none", "Archery", "without text and classes"),
  ],
)
def test_a_condition_that_does_not_exist_is_refused(condition, prompt, message):
  with pytest.raises(UserError, match=message):
    _read(tasks.make(_config(condition)), [prompt])


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"class_names": NAMES[:2]}, "name every class once"),
    ({"class_names": ("a", "a", "b")}, "a name twice"),
    ({"schedule": "zero_terminal_snr"}, '"velocity"'),
    ({"sampler": DiffusionSamplerConfig(num_steps=2000)}, "1 to 1000"),
  ],
)
def test_configs_that_cannot_be_are_refused(values, message):
  with pytest.raises(ConfigError, match=message):
    _config(**values)


def test_guidance_needs_a_condition():
  with pytest.raises(ConfigError, match="no condition to be guided by"):
    _config("none", sampler=dataclasses.replace(SAMPLER, guidance=7.0))


@pytest.mark.parametrize(
  ("bucket", "message"),
  [
    (Bucket(5, 32, 32), "5 frames exceed the time table's 4: set model.max_frames to 5"),
    (Bucket(4, 40, 32), "height 40 is not a multiple of 16"),
  ],
)
def test_buckets_that_do_not_fit_are_refused(bucket, message):
  with pytest.raises(ConfigError, match=message):
    _config().check_bucket(bucket)


def test_costs_grow_with_the_images_beside_a_clip():
  alone, joint = (tasks.make(_config(images=n)) for n in (0, 2))
  assert joint.tokens(CLIP) == alone.tokens(CLIP) * 6 // 4
  assert joint.tokens(IMAGE) == alone.tokens(IMAGE) == 4
  assert joint.flops(CLIP) > alone.flops(CLIP) and joint.flops(IMAGE) == alone.flops(IMAGE)


def test_the_curve_over_the_times_sums_up_to_the_training_loss():
  task = tasks.make(_config(condition_dropout=0.0))
  params, rows, bins = _params(task), 256, 8
  batch = {name: np.tile(x, (rows // 2, *[1] * (x.ndim - 1))) for name, x in _batch(task).items()}
  keys = jax.random.split(jax.random.key(1), rows)
  times, shares = task.time_bins(bins)
  at = jnp.asarray(times)[jnp.arange(rows) % bins]
  losses = jax.jit(task.losses_at)(params, batch, keys, at)
  assert losses.shape == (rows,)
  curve = np.asarray(losses).reshape(-1, bins).mean(0)
  assert np.ptp(curve) > 0.01
  # The bound of the variance is steep near the data, so that few times say less of the mean.
  drawn = jax.jit(lambda *inputs: task.loss(*inputs)[0])(params, batch, keys)
  assert float((curve * shares).sum()) == pytest.approx(float(drawn), rel=0.25)
