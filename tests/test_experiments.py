"""Every experiment that is checked in can be used, as far as can be told without training it."""

import importlib.util
import math
import pathlib

import jax
import pytest

from mgen_jax import config, tasks
from mgen_jax.data.buckets import parse_bucket

FILES = sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*.py"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def experiment(request):
  spec = importlib.util.spec_from_file_location(request.param.stem, request.param)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.__doc__ and "--config=experiments/" in module.__doc__
  return config.resolve(module.get_config())


def trained(experiment):
  stages = experiment.stages.items()
  return {name: stage for name, stage in stages if isinstance(stage, config.TrainStage)}


def test_it_runs_on_one_device(experiment):
  config.check_devices(experiment, 1, 1)


def test_every_stage_can_compute_a_loss_for_each_of_its_buckets(experiment):
  for stage in trained(experiment).values():
    task = tasks.make(stage.task)
    params = jax.eval_shape(lambda task=task: task.init(jax.random.key(0)))
    for bucket, entry in stage.batches().items():
      specs = task.batch_spec(bucket, entry.batch)
      batch = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in specs.items()}
      keys = jax.eval_shape(
        lambda examples=entry.batch: jax.random.split(jax.random.key(0), examples)
      )
      unboxed = jax.tree.map(
        lambda p: getattr(p, "value", p), params, is_leaf=lambda p: hasattr(p, "value")
      )
      loss, _ = jax.eval_shape(task.loss, unboxed, batch, keys)
      assert loss.shape == ()
      assert math.isfinite(task.flops(bucket)) and task.tokens(bucket) > 0


def test_samples_have_the_shape_that_the_evaluation_asks_for(experiment):
  for stage in experiment.stages.values():
    if isinstance(stage, config.EvaluateStage):
      task = tasks.make(experiment.stages[stage.generator].task)
      coder = experiment.stages[config.autoencoder_of(experiment, stage.generator)].task.model
      bucket = parse_bucket(stage.bucket)
      shape = task.config.latent_shape(bucket)
      assert shape == coder.latent_shape(bucket.frames, bucket.height, bucket.width)
