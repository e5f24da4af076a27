"""Plans of sampling: the program that would run, its FLOPs, its meshes, and the 30B by shapes."""

import dataclasses
import functools
import importlib
import json

import jax
import pytest
import rich.console

from mgen_jax import config as config_lib
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.planning import planner, report, sampling, search, topologies
from mgen_jax.planning.sampling import Sampling
from mgen_jax.tasks.text_inputs import FeatureTextConfig
from mgen_jax.tasks.text_to_video import SamplerConfig
from tests import tiny

CPU = topologies.parse("cpu:8")
BUCKET = Bucket(8, 32, 48)
STEPS = 4  # of tests/tiny.py


@functools.cache
def experiment():
  """The tiny experiment; its text comes as features, so that all FLOPs are the backbone's."""
  values = tiny.get_config()
  made = config_lib.resolve(values)
  stage = made.stages["t2v"]
  text = {"kind": "features", "names": ("a",), "widths": (16,), "lengths": (12,)}
  task = FeatureTextConfig(**text)
  stage = dataclasses.replace(stage, task=dataclasses.replace(stage.task, text=task))
  return dataclasses.replace(made, stages={**made.stages, "t2v": stage})


@functools.cache
def plan(samples=None, **mesh):
  wanted = Sampling(MeshConfig(**mesh) if mesh else None, samples)
  devices = topologies.devices(CPU)
  return planner.make_sample_plan(experiment(), "t2v", BUCKET, CPU, devices, wanted)


def test_every_step_runs_both_branches_of_guidance():
  record = plan().record
  assert record["what"] == "sample" and record["sampler"]["count"] == record["batch"] == 8
  assert record["sampler"]["evaluations"] == STEPS
  task = sampling.task_of(experiment().stages["t2v"], "t2v")
  forward = task.flops(BUCKET) / 3
  assert record["model_flops"] == pytest.approx(8 * STEPS * 2 * forward)
  # What the compiler makes of it: the text is the same in every step and projected once.
  once = 8 * STEPS * 2 * task.flops_by_part(BUCKET)["cross_attention"] / 3
  assert record["model_flops"] - once < record["hlo_flops"] < 1.3 * record["model_flops"]


def test_solvers_that_evaluate_twice_and_no_guidance_are_counted():
  task = sampling.task_of(experiment().stages["t2v"], "t2v")

  def flops(**changes):
    return sum(task.sample_flops_by_part(BUCKET, SamplerConfig(**changes)).values())

  base = flops(num_steps=5, guidance=2.0)
  assert flops(num_steps=5, guidance=2.0, method="heun") == 2 * base
  assert flops(num_steps=5, guidance=1.0) == base / 2


def test_no_memory_is_planned_for_what_is_only_learned():
  memory = plan().record["memory_gib"]
  assert memory["optimizer"] == memory["ema"] == 0 < memory["parameters"] < memory["total"]
  text = report.as_text(lambda console: report.show_all(plan().record, console))
  assert "8 samples of 12 tokens" in text and "optimizer" not in text and "decoding" in text


def test_parameters_are_split_over_the_context_axis_of_one_sample():
  one = plan(context=4, tensor=2).record
  assert one["batch"] == 1 and one["mesh"]["context"] == 4
  assert (
    one["memory_gib"]["parameters"] < plan(replica=8, fsdp=1).record["memory_gib"]["parameters"]
  )
  assert ["context"] in [row["axes"] for row in one["collectives"]]


def test_a_search_ranks_meshes_by_the_time_of_one_sample():
  devices = topologies.devices(CPU)
  where = (experiment(), "t2v", BUCKET, CPU, devices)
  trials = search.search_sampling(*where, plan(), Sampling(), tries=1)
  assert len({trial.flags for trial in trials}) == 2
  assert trials == search.rank(trials)
  assert trials[0].seconds() <= trials[1].seconds()
  records = json.loads(json.dumps([trial.record() for trial in trials]))
  assert any(r["flags"] == "--mesh=fsdp=8" and r["batch"] == 8 for r in records)
  report.show_search(records, rich.console.Console(quiet=True))


@pytest.mark.parametrize(
  ("wanted", "words"),
  [
    (Sampling(samples=3), r"--samples=3 does not divide.*fsdp=8: use 8, or .*--mesh=context=8"),
    (Sampling(MeshConfig(tensor=8)), "2 attention heads do not divide over tensor=8"),
    (Sampling(MeshConfig(fsdp=3)), "8 devices"),
  ],
)
def test_what_does_not_divide_is_one_sentence(wanted, words):
  with pytest.raises(UserError, match=words):
    planner.make_sample_plan(experiment(), "t2v", BUCKET, CPU, topologies.devices(CPU), wanted)


def test_a_stage_that_draws_nothing_is_refused():
  with pytest.raises(UserError, match="--stage=autoencoder trains autoencoder"):
    sampling.task_of(experiment().stages["autoencoder"], "autoencoder")


@pytest.mark.parametrize("text", ["context", "context=x", "depth=2", "tensor=0"])
def test_a_mesh_that_cannot_be_read_is_one_sentence(text):
  with pytest.raises(UserError, match=f"--mesh={text} cannot be read.*replica, fsdp"):
    mesh_lib.parse(text)


def test_a_mesh_is_read_by_the_names_of_its_axes():
  assert mesh_lib.parse("context=4,tensor=2") == MeshConfig(context=4, tensor=2)


def test_the_30b_draws_one_sample_of_73728_tokens_on_eight_devices():
  made = config_lib.resolve(importlib.import_module("experiments.t2v_30b").get_config())
  bucket, wanted = Bucket(256, 768, 768), Sampling(MeshConfig(fsdp=1, context=8))
  stage = made.stages["t2v_768_cp2"]
  job = sampling.job(stage, "t2v_768_cp2", bucket, topologies.devices(CPU), wanted)
  with mesh_lib.use(job.mesh):
    made = jax.eval_shape(job.program, *job.arguments)
  assert made.shape == (1, 32, 96, 96, 16)
  assert 13.6 < job.sizes["parameters"] / 2**30 < 13.8  # 29.3 billion in fp32 over 8
