"""A step gathers a layer's parameters, keys and values, and nothing larger."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgen_jax import config as config_lib
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel.mesh import MeshConfig, make_mesh
from mgen_jax.planning import costs, gathers, hlo, planner, topologies
from mgen_jax.planning import report as report_lib
from tests import tiny

BUCKET = Bucket(8, 32, 48)


def _stage(width=128, batch=64, **mesh):
  """The tiny generator, as wide as its layers' parameters are a small part of the activations."""
  made = config_lib.resolve(tiny.get_config())
  stage = made.stages["t2v"]
  model = dataclasses.replace(stage.task.model, width=width, heads=4, mlp_width=2 * width, layers=3)
  stage = dataclasses.replace(
    stage,
    mesh=MeshConfig(**mesh),
    task=dataclasses.replace(stage.task, model=model),
    buckets={f"b{BUCKET.name}": config_lib.BucketConfig(batch=batch)},
  )
  return dataclasses.replace(made, stages={**made.stages, "t2v": stage})


def _record(made):
  topology = topologies.parse("cpu:8")
  return planner.make_plan(made, "t2v", BUCKET, topology, topologies.devices(topology)).record


def _costs(program, mesh):
  return costs.costs_of(hlo.parse(program.compile().as_text()), dict(mesh.shape))


def test_an_array_that_is_gathered_whole_is_found_and_shown():
  mesh = make_mesh(MeshConfig(fsdp=8))
  split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("fsdp", None))
  x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=split)
  found = gathers.largest(_costs(jax.jit(lambda x: x * 2, out_shardings=whole).lower(x), mesh))
  assert found["bytes"] == 1024 * 256 * 4 and found["axes"] == ["fsdp"]
  assert "MORE THAN ONE LAYER" in report_lib._gather({**found, "limit": 1000})
  assert "within" in report_lib._gather({**found, "limit": found["bytes"]})


def test_the_limit_is_the_larger_of_a_layers_parameters_and_keys_and_values():
  few, many = (_stage(batch=batch, fsdp=4, tensor=2).stages["t2v"] for batch in (8, 80_000))
  shape = {"replica": 1, "fsdp": 4, "context": 1, "tensor": 2}
  tokens = 2 * 2 * 3  # latents of 2 x 4 x 6 in patches of 1 x 2 x 2
  least = 4 * (8 * 128 * 128 + 3 * 128 * 256)  # two attentions and a gated MLP
  assert least <= gathers.limit(few, BUCKET, shape) <= 1.1 * least
  assert gathers.limit(many, BUCKET, shape) == 2 * 20_000 * tokens * 128 * 4 // 2


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_a_step_gathers_no_more_than_a_layer(mesh):
  gather = _record(_stage(**mesh))["largest_gather"]
  assert 0 < gather["bytes"] <= gather["limit"]
