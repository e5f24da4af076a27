"""Averages of models: the right tensors, with the right weights, and used like a trained one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags

from mgen_jax import average, config, schema, tasks
from mgen_jax.config import LoraConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.generator import Generator
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import lora, parameters, runner, start
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.workdir import CONFIG_NAME, Workdir
from tests import tiny, untrained
from tests.training import moments

MODELS = ("sft_a", "sft_b", "sft_c")
MESH = mesh_lib.MeshConfig()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The tiny run with three more stages that look finetuned from t2v."""
  work = untrained.make(tmp_path_factory.mktemp("average"))
  values = tiny.get_config()
  stages = {name: schema.to_plain(stage) for name, stage in work.experiment.stages.items()}
  evaluate = stages.pop("evaluate")
  for name in MODELS:
    stages[name] = {**stages["t2v"], "init_from": "t2v"}
  task = stages["t2v"]["task"]
  stages["average"] = {"kind": "average", "task": task, "of": MODELS[:2], "weights": (1.0, 3.0)}
  stages["from_average"] = {**stages["t2v"], "init_from": "average"}
  stages["evaluate"] = {**evaluate, "generator": "average"}
  made = config.experiment(name="tiny", stages=stages, data=values.data.to_dict())
  work = Workdir.create(work.root, config.resolve(made))
  for seed, name in enumerate(MODELS):
    work.start(name)
    untrained.save(work, name, seed=10 + seed)
    work.finish(name, 1.0, steps=6)
  return work


@pytest.fixture(scope="module")
def averaged(run):
  run.start("average")
  average.run(run, "average")
  return run


def load(work, name, **stages):
  experiment = dataclasses.replace(
    work.experiment, stages={**work.experiment.stages, **stages},
    recipe=tuple(dict.fromkeys((*work.experiment.recipe, *stages))),
  )  # fmt: skip
  work = Workdir(work.root, experiment)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  return parameters.flatten(jax.device_get(runner.load_trained(work, name, mesh)[1]))


def make(work, name, **values):
  """Runs one more average stage of a run; its parameters by name."""
  stage = config.AverageStage(task=work.experiment.stages["t2v"].task, **values)
  experiment = dataclasses.replace(
    work.experiment, stages={**work.experiment.stages, name: stage},
    recipe=(*work.experiment.recipe, name),
  )  # fmt: skip
  work = Workdir(work.root, config.resolve(schema.to_plain(experiment)))
  work.start(name)
  average.run(work, name)
  return load(work, name)


def test_it_is_the_weighted_mean_of_every_tensor(averaged):
  found = load(averaged, "average")
  a, b = load(averaged, "sft_a"), load(averaged, "sft_b")
  assert found.keys() == a.keys()
  for name, value in found.items():
    np.testing.assert_allclose(value, 0.25 * a[name] + 0.75 * b[name], rtol=2e-6, atol=1e-7)


def test_equal_models_are_their_own_average_to_the_bit(run):
  same = load(run, "sft_a")
  found = make(run, "same", of=("sft_a", "sft_a", "sft_a"), weights=(0.1, 0.3, 0.7))
  alone = make(run, "alone", of=(str(run.folder("sft_a")) + "@6",))  # taken over, by its folder
  for name, value in same.items():
    np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(alone[name], value)


@pytest.mark.slow
def test_two_processes_make_the_same_average_each_with_its_part(averaged, tmp_path):
  """Weights below 0 too; nobody holds a whole tensor of what is sharded."""
  stage = dataclasses.replace(
    averaged.experiment.stages["average"], of=("sft_a", "sft_b", "sft_c"), weights=(-0.5, 1.0, 1.0)
  )
  work = Workdir(shutil.copytree(averaged.root, tmp_path / "run"), averaged.experiment)
  work = work.with_stage("together", stage)
  work.keep_stage("together")
  work.start("together")
  ended = moments.run_hosts(
    work.root, 2, "--stage=together", devices=2, module="tests.average_host"
  )
  assert [code for _, code in ended] == [0, 0], ended
  assert work.is_done("together")
  found = load(work, "together")
  a, b, c = (load(work, name) for name in MODELS)
  for name, value in found.items():
    wanted = (-0.5 * a[name] + b[name] + c[name]) / 1.5
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_besides_the_result_one_tensor_of_one_model_is_held(run, monkeypatch):
  """However many models there are: bytes of live arrays whenever a tensor is about to be read."""
  task, mesh = tasks.make(run.experiment.stages["t2v"].task), mesh_lib.make_mesh(MESH)
  sizes = [4 * x.size for x in parameters.flatten(state_lib.param_shapes(task)).values()]
  held, read = [], Checkpoints.restore_tensors
  models = [average._open(run, name) for name in (*MODELS, *MODELS)]
  before = jax.live_arrays()
  known = set(map(id, before))

  def counted(self, wanted, step=None):
    held.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in known))
    return read(self, wanted, step)

  monkeypatch.setattr(Checkpoints, "restore_tensors", counted)
  with mesh_lib.use(mesh):
    average._weighted(task, models, [1 / 6] * 6, mesh)
  made = np.cumsum([0, *sizes])
  # Before the first model's tensor what is made; before each further one also the mean so far.
  assert held == [made[tensor + (index > 0)] for tensor in range(len(sizes)) for index in range(6)]


def test_it_is_done_once_and_says_of_what(averaged):
  assert averaged.is_done("average")
  record = averaged.done_record("average")
  assert record["average"] == {"sft_a": 0.25, "sft_b": 0.75}


def test_it_is_sampled_evaluated_and_started_from(averaged):
  generator = Generator.load(averaged, "average")
  assert generator.stage == "average" and generator.fps == 8
  assert {b.name for b in generator.trained} == {"1x32x32", "4x32x32", "8x32x48"}
  stage = averaged.experiment.stages["from_average"]
  task, mesh = tasks.make(stage.task), mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  layout = state_lib.param_shardings(task, mesh)
  shapes = state_lib.param_shapes(task)
  made = start.load_origin(averaged, "from_average", task, mesh, untrained.LATENTS, shapes, layout)
  wanted = load(averaged, "average")
  for name, value in parameters.flatten(jax.device_get(made)).items():
    np.testing.assert_array_equal(value, wanted[name])
  experiment = averaged.experiment
  assert config.autoencoder_of(experiment, "average") == "autoencoder"
  assert config.inputs_of(experiment, "evaluate") == ("ingest", "encode", "average")


def _random(task):
  rng = np.random.default_rng(5)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), state_lib.param_shapes(task)
  )


def test_adapters_are_read_with_the_base_that_their_checkpoint_refers_to(run, tmp_path):
  work = Workdir(shutil.copytree(run.root, tmp_path / "run"), run.experiment)
  stage = dataclasses.replace(
    run.experiment.stages["t2v"], lora=LoraConfig(rank=2), init_from="t2v"
  )
  work = work.with_stage("adapted", stage)
  task, mesh = tasks.make(stage.task), mesh_lib.make_mesh(mesh_lib.MeshConfig())
  base = start.base(work, "adapted", task, mesh)
  assert base.reference["stage"] == "t2v" and base.reference["step"] == 6
  adapters = {"lora": _random(lora.wrap(task, stage.lora))["lora"]}
  meta = {
    "experiment": "tiny", "stage": "adapted", "task": schema.to_plain(stage.task),
    "lora": schema.to_plain(stage.lora), "latents": untrained.LATENTS, "buckets": ["4x32x32"],
    "base": base.reference,
  }  # fmt: skip
  with Checkpoints(str(work.folder("adapted") / "checkpoints")) as checkpoints:
    checkpoints.save(6, {"params": adapters, "ema": adapters}, {}, meta)
  work.start("adapted")
  work.finish("adapted", 1.0, steps=6)

  whole = {"base": parameters.unflatten(load(work, "t2v")), **adapters}
  wanted = parameters.flatten(jax.device_get(lora.wrap(task, stage.lora).merged(whole)))
  for name, found in (
    ("sampled", load(work, "adapted")),
    ("merged", make(work, "m", of=("adapted",))),
  ):
    for tensor, value in found.items():
      np.testing.assert_allclose(value, wanted[tensor], rtol=1e-5, atol=1e-5, err_msg=name)

  shutil.rmtree(work.folder("t2v"))
  untrained.save(work, "t2v", seed=99)
  with pytest.raises(
    UserError, match=r"another one by now; the adapters in .*adapted are of step 6"
  ):
    load(work, "adapted")
  shutil.rmtree(work.folder("t2v"))
  with pytest.raises(UserError, match=r"bring that checkpoint back .*no checkpoint of step 6"):
    make(work, "gone", of=("adapted",))


def test_adapters_are_merged_for_good(run):
  stage = dataclasses.replace(run.experiment.stages["t2v"], lora=LoraConfig(rank=2))
  wrapped = lora.wrap(tasks.make(stage.task), stage.lora)
  params = _random(wrapped)
  # As a state has it: what is held has no average.
  state = {"params": params, "ema": {"lora": params["lora"]}}
  meta = {
    "experiment": "tiny", "stage": "adapted", "task": schema.to_plain(stage.task),
    "lora": schema.to_plain(stage.lora), "latents": untrained.LATENTS, "buckets": ["4x32x32"],
  }  # fmt: skip
  with Checkpoints(str(run.root / "adapted" / "checkpoints")) as checkpoints:
    checkpoints.save(6, state, {}, meta)
  found = make(run, "merged", of=(str(run.root / "adapted"),))
  wanted = parameters.flatten(jax.device_get(wrapped.merged(params)))
  changed = 0
  for name, value in found.items():
    np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5)
    before = parameters.flatten(params["base"])[name]
    changed += int(not np.array_equal(value, before))
  assert changed == len(wrapped.kernels) == 8


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"of": ("t2v", "t2i")}, "t2i, whose model is not that"),
    ({"of": ("t2v", "t2w")}, 'did you mean "t2v"'),
    ({"of": ()}, "of is empty"),
    ({"of": ("t2v",), "weights": (1.0, 2.0)}, "2 entries for 1"),
    ({"of": ("t2v",), "weights": (0.0,)}, "more than 0"),
    ({"of": ("t2v",), "method": "greedy"}, "name the train stage"),
    ({"of": ("t2v",), "method": "greedy", "validation": "t2i"}, "another model"),
  ],
)
def test_what_cannot_be_averaged_is_refused_before_anything_runs(values, words):
  made = tiny.get_config().to_dict()
  stages, recipe = made["stages"], (*made["recipe"], "average")
  stages["average"] = {"kind": "average", "task": stages["t2v"]["task"], **values}
  with pytest.raises(ConfigError, match=words):
    config.resolve({**made, "recipe": recipe})


def test_models_of_other_runs_are_compared_when_they_are_there(run):
  with pytest.raises(UserError, match=r"cannot average .*t2i: its model is another one \(backbone"):
    make(run, "mixed", of=("t2v", str(run.folder("t2i"))))
  with pytest.raises(UserError, match="no checkpoint"):
    make(run, "missing", of=(str(run.root / "nowhere"),))
  with pytest.raises(UserError, match="after @ stands the step"):
    make(run, "wrong", of=("t2v@last",))


def test_latents_that_are_normalised_otherwise_are_refused(run, monkeypatch, tmp_path):
  monkeypatch.setattr(untrained, "LATENTS", {**untrained.LATENTS, "mean": [0.0] * 4})
  other = Workdir(tmp_path, run.experiment)
  untrained.save(other, "sft_a", seed=3)
  with pytest.raises(UserError, match="normalised in two ways"):
    make(run, "two", of=("sft_a", str(tmp_path / "sft_a")))


def test_an_added_stage_of_models_that_are_gone_is_left_out_with_a_warning(run, tmp_path, caplog):
  work = Workdir.create(tmp_path, run.experiment)
  task = run.experiment.stages["t2v"].task
  work.with_stage("added", config.AverageStage(task=task, of=("sft_c",))).keep_stage("added")
  assert "added" in Workdir.open(tmp_path).experiment.stages
  stages = {k: v for k, v in run.experiment.stages.items() if k != "sft_c"}
  recipe = tuple(name for name in run.experiment.recipe if name in stages)
  Workdir.create(tmp_path, dataclasses.replace(run.experiment, stages=stages, recipe=recipe))
  with caplog.at_level("WARNING"):
    assert "added" not in Workdir.open(tmp_path).experiment.stages
  assert "is left out" in caplog.text and "sft_c" in caplog.text


def test_the_greedy_soup_takes_what_helps_and_leaves_the_rest():
  """Models are points, the loss the distance from 2: 1 and 3 average to 2, and 9 does not help."""
  points = {"far": 9.0, "low": 1.0, "high": 3.2, "broken": np.nan}
  loss = lambda names: abs(np.mean([points[name] for name in names]) - 2.0)  # noqa: E731
  taken, losses = average.greedy(list(points), loss)
  assert taken == ["low", "high"]
  assert losses["average"] == pytest.approx(0.1) and losses["far"] == 7
  with pytest.raises(UserError, match="finite"):
    average.greedy(["broken"], loss)


def test_the_command_adds_a_stage_to_the_run(run, capsys):
  values = flags.FlagValues()
  average.define_flags(values)
  values(["average", f"--workdir={run.root}", "--of=sft_a,sft_c", "--weights=1,1", "--name=two_of"])
  average.main([], values)
  shown = capsys.readouterr().out.splitlines()
  assert json.loads(shown[0]) == {"sft_a": 0.5, "sft_c": 0.5}
  work = Workdir.open(run.root)
  assert work.experiment.recipe[-1] == "two_of" and work.is_done("two_of")
  a, c, both = (load(work, name) for name in ("sft_a", "sft_c", "two_of"))
  np.testing.assert_allclose(
    both["text/embedding"], (a["text/embedding"] + c["text/embedding"]) / 2, rtol=1e-6, atol=1e-7
  )
  # Running the experiment again writes its own config, and loses no stage that was added.
  Workdir.create(run.root, run.experiment)
  assert "two_of" not in json.loads((run.root / CONFIG_NAME).read_text())["stages"]
  again = Workdir.open(run.root)
  assert again.is_done("two_of") and again.experiment.stages["two_of"].of == ("sft_a", "sft_c")
  for wrong in ("t2vv", "encode"):
    values(["average", f"--workdir={run.root}", f"--of={wrong}", "--name=none"])
    with pytest.raises(UserError, match=f'"{wrong}" is no stage of .* that trains'):
      average.main([], values)
  values(["average", f"--workdir={run.root}", "--of=sft_a", "--name=t2v"])
  with pytest.raises(UserError, match="choose another name"):
    average.main([], values)
