"""What a stage may be told about its training: rates, averages, frozen parts, adapters, batches."""

import dataclasses
import functools
import os
import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax import config as config_lib
from mgen_jax.config import LoraConfig, OptimizerConfig, PlateauConfig
from mgen_jax.data import mixture, pipeline
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import loop, lora, parameters, plateau, step, validation
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.training.interrupt import Interrupted
from tests.training import toy


class Dense(toy.ToyTask):
  """The toy with its matrix in a kernel, and a stack of two layers of which the loss is the sum."""

  def init(self, key):
    def box(value, *names):
      return nn.LogicallyPartitioned(value, names)

    kernel = 0.1 * jax.random.normal(key, (2, 8, 16))
    return {
      "layers": {"kernel": box(kernel, "layers", "embed", "mlp")},
      "out": {"kernel": box(jnp.eye(16), None, "mlp"), "bias": jnp.zeros(16)},
    }

  def loss(self, params, batch, keys):
    made = batch["x"] @ params["layers"]["kernel"].sum(0)
    made = made @ params["out"]["kernel"] + params["out"]["bias"]
    return jnp.square(made - batch["y"]).mean(), {}


def train(folder, task=None, *, data=None, devices=1, load_initial=None, load_base=None, **values):
  config = toy.stage(**values)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
  task = toy.ToyTask() if task is None else task
  stream = toy.stream() if data is None else data
  options = {"name": "toy", "seed": 3, "folder": str(folder), "meta": {"stage": "toy"}}
  loads = {"load_initial": load_initial, "load_base": load_base}
  return loop.train(task, config, stream, mesh, **loads, **options)


def state_of(folder, task=None, **values):
  task = toy.ToyTask() if task is None else task
  config = toy.stage(**values)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  program = loop.make_program(task, config, mesh, 3)
  with Checkpoints(f"{folder}/checkpoints", read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(program.shapes, program.layout).state)


def averaged_of(folder, task):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  with Checkpoints(f"{folder}/checkpoints", read_only=True) as checkpoints:
    layout = state_lib.param_shardings(task, mesh)
    return jax.device_get(checkpoints.restore_ema(state_lib.param_shapes(task), layout))


def lines(folder, name):
  return {m["step"]: m[name] for m in metrics_lib.read(str(folder)) if name in m}


def test_a_stage_may_have_a_seed_of_its_own(tmp_path):
  """Models that are to be averaged shall not share their noise (their data: test_inputs.py)."""
  for name, seed in (("the run's", None), ("the same", 3), ("another", 4)):
    train(tmp_path / name, steps=3, seed=seed)
  first, same, other = (lines(tmp_path / n, "loss") for n in ("the run's", "the same", "another"))
  assert first == same and all(first[step] != other[step] for step in first)


# Learning rates.


def test_rates_change_at_the_steps_that_are_named():
  config = OptimizerConfig(
    lr=6e-5, schedule="steps", lr_steps=((10, 3e-5), (25, 2e-5)), warmup_steps=4
  )
  schedule = optimizer_lib.make_schedule(config, 40)
  rates = [float(schedule(step)) for step in (0, 3, 4, 9, 10, 24, 25, 39)]
  np.testing.assert_allclose(rates, [1.5e-5, *[6e-5] * 3, *[3e-5] * 2, *[2e-5] * 2], rtol=1e-6)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"lr_steps": ((5, 1e-3),)}, "schedule"),
    ({"schedule": "steps"}, "lr_steps"),
    ({"schedule": "steps", "lr_steps": ((5, 1e-3), (5, 1e-4))}, "must rise"),
    ({"schedule": "steps", "lr_steps": ((5, -1.0),)}, "more than 0"),
    ({"schedule": "steps", "lr_steps": ((5, 1e-3),), "warmup_steps": 10}, "warm-up"),
  ],
)
def test_rates_that_cannot_be_meant_are_refused(values, words):
  with pytest.raises(ConfigError, match=words):
    OptimizerConfig(**values)


def test_the_rate_is_halved_when_the_loss_is_flat():
  config = PlateauConfig(patience=2, threshold=0.1, floor=0.2)
  now, factors = plateau.start(), []
  for loss in (10.0, 8.0, 7.9, 7.8, 6.0, 5.9, 5.8, np.nan, 5.7, 5.6, 5.5):
    now = plateau.observe(now, jnp.float32(loss), config)
    factors.append(float(now.factor))
  # 8 is progress, 7.9 and 7.8 are not; 6 is, and then nothing is. The floor is a fifth.
  assert factors == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2])


FLAT = {
  "validate_every": 2,
  "optimizer": OptimizerConfig(
    lr=0.05, schedule="plateau", plateau=PlateauConfig(patience=1, threshold=0.9)
  ),
}


def test_a_lowered_rate_is_the_rate_of_the_step(tmp_path):
  train(tmp_path / "half", steps=3, **FLAT)  # validated after two steps: the first is the best
  rates = lines(tmp_path / "half", "lr")
  assert rates[3] == rates[1] == pytest.approx(0.05)
  train(tmp_path / "more", steps=6, **FLAT)
  rates = lines(tmp_path / "more", "lr")
  assert [rates[step] for step in (4, 5, 6)] == pytest.approx([0.05, 0.025, 0.025])
  # The same steps by hand: the rate is that of the schedule, halved at the step where it was.
  by_hand = OptimizerConfig(lr=0.05, schedule="steps", lr_steps=((4, 0.025),))
  train(tmp_path / "hand", steps=6, optimizer=by_hand)
  found = state_of(tmp_path / "more", steps=6, **FLAT).params
  wanted = state_of(tmp_path / "hand", steps=6, optimizer=by_hand).params
  chex.assert_trees_all_close(found, wanted, rtol=1e-6)


def test_a_stopped_run_continues_with_its_plateau_bit_for_bit(tmp_path):
  train(tmp_path / "whole", **FLAT)

  def stop_at(step):
    if step == 13:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Interrupted):
    train(tmp_path / "parts", data=toy.stream(on_step=stop_at), **FLAT)
  train(tmp_path / "parts", **FLAT)
  for name in ("loss", "lr", "validation_loss"):
    assert lines(tmp_path / "parts", name) == lines(tmp_path / "whole", name)
  whole = state_of(tmp_path / "whole", **FLAT)
  assert float(whole.plateau.factor) < 0.5
  chex.assert_trees_all_equal(state_of(tmp_path / "parts", **FLAT), whole)


def test_a_plateau_needs_a_validation():
  with pytest.raises(ConfigError, match="validate_every"):
    toy.stage(optimizer=FLAT["optimizer"])


# Averages of the parameters over the steps.


def test_each_kind_of_average_is_what_it_says(tmp_path):
  for kind in ("constant", "power", "off"):
    train(tmp_path / kind, steps=2, ema=kind, ema_decay=0.75, ema_gamma=1.0)
  off = state_of(tmp_path / "off", steps=2, ema="off")
  assert off.ema is None
  chex.assert_trees_all_equal(averaged_of(tmp_path / "off", toy.ToyTask()), off.params)
  start = jax.jit(
    lambda: state_lib.init_params(toy.ToyTask(), state_lib.stream_key(3, "init", 0))
  )()
  train(tmp_path / "one", steps=1)
  one = state_of(tmp_path / "one", steps=1).params
  two = off.params
  constant = state_of(tmp_path / "constant", steps=2, ema="constant").ema
  mix = jax.tree.map(lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c, start, one, two)
  chex.assert_trees_all_close(constant, mix, rtol=1e-5, atol=1e-7)
  # (1 - 1/n)^2: of the first step only it is left, of the second three quarters.
  power = state_of(tmp_path / "power", steps=2, ema="power").ema
  mix = jax.tree.map(lambda b, c: 0.25 * b + 0.75 * c, one, two)
  chex.assert_trees_all_close(power, mix, rtol=1e-5, atol=1e-7)


def _start(task):
  key = state_lib.stream_key(3, "init", 0)
  return jax.device_get(jax.jit(lambda: state_lib.init_params(task, key))())


def test_decays_stay_between_0_and_1():
  steps = jnp.asarray([0.0, 1.0, 100.0, 1e6])
  for kind in ("warmup", "constant", "power"):
    decay = np.asarray(step.ema_decay(toy.stage(ema=kind))(steps))
    assert (np.diff(decay) >= 0).all() and decay.min() >= 0 and decay.max() <= 1


# Parameters that keep their values.


def test_frozen_parameters_keep_their_values_and_cost_no_memory(tmp_path):
  task = Dense()
  train(tmp_path, task, steps=4, frozen=("layers",))
  state = state_of(tmp_path, task, steps=4, frozen=("layers",))
  start = _start(task)
  chex.assert_trees_all_equal(state.params["layers"], start["layers"])
  assert np.abs(state.params["out"]["bias"]).max() > 0
  names = {"out/kernel", "out/bias"}
  assert set(parameters.flatten(state.ema)) == names
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf)]
  assert len(moments) == 2 * len(names)
  chex.assert_trees_all_equal(averaged_of(tmp_path, task)["layers"], state.params["layers"])


def test_the_norm_of_the_gradient_is_that_of_what_is_trained(tmp_path):
  train(tmp_path / "all", Dense(), steps=1)
  train(tmp_path / "some", Dense(), steps=1, frozen=("layers/*",))
  all_, some = lines(tmp_path / "all", "grad_norm")[1], lines(tmp_path / "some", "grad_norm")[1]
  assert 0 < some < all_


def test_a_pattern_that_fits_nothing_is_refused():
  with pytest.raises(UserError, match=r'"layer/kernel".*"layers/kernel"'):
    loop.make_program(
      Dense(), toy.stage(frozen=("layer/kernel",)), mesh_lib.make_mesh(mesh_lib.MeshConfig()), 0
    )


# Adapters.

ADAPTERS = LoraConfig(rank=2, alpha=4.0, kernels=("*kernel",))


def _pretrained(task):
  made = jax.device_get(state_lib.init_params(task, jax.random.key(7)))
  return lambda shapes, layout: jax.tree.map(jax.device_put, made, layout)


def test_adapters_start_as_the_base_and_train_nothing_else(tmp_path):
  task, load = Dense(), _pretrained(Dense())
  train(tmp_path / "base", task, steps=1, load_initial=load)
  train(tmp_path / "lora", task, steps=6, lora=ADAPTERS, load_initial=load)
  # The first step's loss is that of the base, to the bit.
  assert lines(tmp_path / "lora", "loss")[1] == lines(tmp_path / "base", "loss")[1]
  assert lines(tmp_path / "lora", "loss")[6] < lines(tmp_path / "lora", "loss")[1]
  wrapped = lora.wrap(task, ADAPTERS)
  state = state_of(tmp_path / "lora", task, steps=6, lora=ADAPTERS)
  base = jax.device_get(state_lib.init_params(task, jax.random.key(7)))
  chex.assert_trees_all_equal(state.params["base"], base)
  assert set(state.ema) == {"lora"}  # the base has neither average nor moments
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.params["lora"]))
  moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf))
  assert moments == 2 * trained
  # Merged, it is the same function, as a model without adapters.
  _, rows = toy.batch_at(50)
  keys = jax.random.split(jax.random.key(0), toy.BATCH)
  params = averaged_of(tmp_path / "lora", wrapped)
  found = wrapped.loss(params, rows, keys)[0]
  np.testing.assert_allclose(task.loss(wrapped.merged(params), rows, keys)[0], found, rtol=1e-6)
  # By hand: W + alpha / rank A B in each layer.
  pair = params["lora"]["layers"]["kernel"]
  product = np.einsum("lir,lro->lio", pair["a"], pair["b"])
  by_hand = base["layers"]["kernel"] + 2.0 * product
  merged = wrapped.merged(params)["layers"]["kernel"]
  np.testing.assert_allclose(merged, by_hand, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_need_not_hold_the_base_of_its_adapters(tmp_path):
  task, load, asked = Dense(), _pretrained(Dense()), []

  def base(shapes, layout):
    asked.append(shapes.keys())
    return load(shapes, layout)

  values = {"lora": ADAPTERS, "load_initial": load}
  train(tmp_path / "whole", task, steps=6, **values)
  train(tmp_path / "part", task, steps=3, load_base=base, **values)
  train(tmp_path / "part", task, steps=6, load_base=base, **values)  # goes on
  assert len(asked) == 1
  assert lines(tmp_path / "part", "loss") == lines(tmp_path / "whole", "loss")
  with Checkpoints(f"{tmp_path}/part/checkpoints", read_only=True) as checkpoints:
    shapes = state_lib.param_shapes(lora.wrap(task, ADAPTERS))
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
    layout = state_lib.param_shardings(lora.wrap(task, ADAPTERS), mesh)
    with pytest.raises(UserError, match=r"base/layers/kernel: absent in the checkpoint"):
      checkpoints.restore_ema(shapes, layout)
    found = checkpoints.restore_ema({"lora": shapes["lora"]}, {"lora": layout["lora"]})
  whole = averaged_of(tmp_path / "whole", lora.wrap(task, ADAPTERS))
  chex.assert_trees_all_equal(jax.device_get(found)["lora"], whole["lora"])


def test_adapters_lie_on_the_mesh_as_their_kernels():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=4, tensor=2))
  wrapped = lora.wrap(Dense(), ADAPTERS)
  layout = state_lib.param_shardings(wrapped, mesh)
  pair, kernel = layout["lora"]["layers"]["kernel"], layout["base"]["layers"]["kernel"].spec
  assert tuple(pair["a"].spec)[:2] == tuple(kernel)[:2]
  assert tuple(pair["b"].spec)[2] == tuple(kernel)[2]


def test_every_mesh_trains_the_same_adapters(tmp_path):
  load = _pretrained(Dense())
  for devices, mesh in ((1, {}), (8, {"fsdp": 4, "tensor": 2})):
    train(
      tmp_path / str(devices), Dense(), steps=6, lora=ADAPTERS, load_initial=load,
      devices=devices, mesh=mesh_lib.MeshConfig(**mesh),
    )  # fmt: skip
  one, eight = (list(lines(tmp_path / n, "loss").values()) for n in ("1", "8"))
  np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_adapters_of_what_is_no_kernel_are_refused():
  with pytest.raises(UserError, match="out/bias"):
    lora.wrap(Dense(), LoraConfig(rank=2, kernels=("out/*",)))


# Batches that change in mid-stage.

BUCKET = Bucket(1, 8, 8)


class Pairs(Dense):
  """The toy on nothing but x and y."""

  def batch_spec(self, bucket, examples):
    specs = super().batch_spec(bucket, examples)
    return {name: specs[name] for name in ("x", "y")}


class Examples:
  """A source of the toy's regression."""

  digest = "examples"

  def __len__(self):
    return 150

  def example(self, index, rng):
    x = np.random.default_rng(index).normal(size=8) + 0.01 * rng.random()
    target = np.random.default_rng(0).normal(size=(8, 16))
    return {"x": x.astype(np.float32), "y": (x @ target).astype(np.float32)}


class Manual:
  """Batches out of one flat order, of a size, from a place in it on."""

  fingerprint = "manual"

  def __init__(self, flat, size, place):
    self.flat, self.size, self.place = flat, size, place

  def __iter__(self):
    return self

  def __next__(self):
    rows = slice(self.place, self.place + self.size)
    self.place += self.size
    return BUCKET, {name: values[rows] for name, values in self.flat.items()}

  def close(self):
    pass


def test_a_change_of_the_batch_is_a_restart_with_another_batch(tmp_path):
  phases = [
    mixture.Phase(first, {BUCKET: Examples()}, {BUCKET: size}, {BUCKET: 1.0})
    for first, size in ((0, 16), (8, 32))
  ]
  make = functools.partial(pipeline.make_stream, seed=3)
  sizes = ({BUCKET: 32},)
  stream = loop.Stream(
    {BUCKET: 16}, lambda at: mixture.Scheduled(phases, make, at), lambda: iter(()), sizes
  )
  train(tmp_path / "scheduled", Pairs(), data=stream, steps=14)
  with pipeline.make_stream({BUCKET: Examples()}, batch_sizes={BUCKET: 16}, seed=3) as one:
    drawn = [next(one)[1] for _ in range(8 + 12)]
  flat = {name: np.concatenate([rows[name] for rows in drawn]) for name in ("x", "y")}
  for size, place, steps in ((16, 0, 8), (32, 8 * 16, 14)):
    at = functools.partial(Manual, flat, size, place)
    manual = loop.Stream({BUCKET: size}, lambda step, at=at: at(), lambda: iter(()))
    train(tmp_path / "manual", Pairs(), data=manual, steps=steps)
  assert lines(tmp_path / "scheduled", "loss") == lines(tmp_path / "manual", "loss")
  names = ("scheduled", "manual")
  scheduled, manual = (state_of(tmp_path / name, Pairs(), steps=14) for name in names)
  chex.assert_trees_all_equal(scheduled, manual)


def test_a_batch_that_does_not_come_out_whole_is_refused():
  with pytest.raises(ConfigError, match="whole number"):
    toy.stage(buckets={"b1x8x8": config_lib.BucketConfig(batch=5)}, batch_changes=((10, 1.5),))
  stage = toy.stage(
    buckets={"b1x8x8": config_lib.BucketConfig(batch=4)}, batch_changes=((10, 1.5),)
  )
  assert [stage.batches(at)[BUCKET].batch for at in (0, 9, 10)] == [4, 4, 6]
  assert stage.phases() == (0, 10)


# Validation.


class Timed(toy.ToyTask):
  """The toy with a loss that is 1 + t plus the first parameter, whatever the example."""

  def time_bins(self, count):
    return (np.arange(count) + 0.5) / count, np.arange(1, count + 1) / sum(range(count + 1))

  def losses_at(self, params, batch, keys, times):
    return 1 + times + 0 * batch["x"][:, 0]


def test_validation_gives_a_curve_over_the_times_and_a_picture(tmp_path):
  train(tmp_path, Timed(), steps=8, validate_every=4, validate_bins=4)
  line = [m for m in metrics_lib.read(str(tmp_path)) if "validation_loss" in m][-1]
  curve = {name: value for name, value in line.items() if name.startswith(validation.AT)}
  assert curve == pytest.approx(
    {validation.AT + t: 1 + float(t) for t in ("0.125", "0.375", "0.625", "0.875")}
  )
  weighted = (1 * 1.125 + 2 * 1.375 + 3 * 1.625 + 4 * 1.875) / 10
  assert line["validation_loss"] == pytest.approx(weighted)
  assert (tmp_path / validation.PICTURE_NAME).stat().st_size > 5000
  assert dataclasses.asdict(toy.stage())["validate_bins"] == 8
