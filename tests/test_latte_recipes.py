"""Latte's toy recipes as a user meets them: the notebook, the commands, and their faults."""

import pathlib

import pytest
from absl import flags

from mgen_jax import config, sample
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.training import start
from mgen_jax.workdir import Workdir
from tests.test_experiments import load

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "latte_ablations.ipynb"
SMALLEST = """
ARMS = ["v1"]
CLIPS, AUTOENCODER_STEPS, STEPS, SAMPLES = 80, 4, 2, 4
WORKDIR = {workdir!r}
FLAGS = ["--config.stages.v1.task.sampler.num_steps=2"]
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The notebook as it is, but for its cell of parameters; and the folder of its run."""
  nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
  nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
  pytest.importorskip("ipykernel", reason="needs the extra notebooks")
  workdir = tmp_path_factory.mktemp("notebook") / "run"
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  assert len(tagged) == 1
  at = notebook.cells.index(tagged[0]) + 1
  notebook.cells.insert(at, nbformat.v4.new_code_cell(SMALLEST.format(workdir=str(workdir))))
  client = nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", "")  # one device, as a user has
    return client.execute(), workdir


@pytest.mark.slow
def test_the_notebook_trains_measures_and_draws(executed):
  notebook, workdir = executed
  shown = [
    (kind, value)
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    for kind, value in output.get("data", {}).items()
  ]
  assert sum(kind == "image/png" for kind, _ in shown) == 3  # losses, the table's, samples
  (table,) = (value for kind, value in shown if kind == "text/markdown")
  assert "| v1 |" in table and "frechet" in table
  assert Workdir.open(str(workdir)).done_record("v1")["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--class=red circel moves left"], "did you mean 'red circle moves left'"),
    (["--class=red circle moves left", "--frames=99"], "the nearest is --frames=8"),
  ],
)
def test_what_a_trained_model_cannot_draw_is_refused(executed, arguments, message):
  values = flags.FlagValues()
  sample.define_flags(values)
  values(["sample", f"--workdir={executed[1]}", "--stage=v1", *arguments])
  with pytest.raises(UserError, match=message):
    sample.main([], values)


@pytest.mark.parametrize(
  ("experiment", "changes", "message"),
  [
    (
      "latte_marbles:ucf",
      {"stages.latte.task.model.max_frames": 4},
      "8 frames exceed the time table's 4: set model.max_frames to 8",
    ),
    (
      "latte_ablations_marbles",
      {"stages.images.task.model.variant": 2},
      "stages.image_start.task.model.variant is 1, and 2 in the stage it starts from",
    ),
    (
      "latte_ablations_marbles",
      {"stages.compression.task.model.time_stride": 3},
      "8 latent frames do not divide into tubes of time_stride 3: use 9",
    ),
  ],
)
def test_a_recipe_that_cannot_be_is_refused_before_it_starts(experiment, changes, message):
  name, _, kind = experiment.partition(":")
  made = load(ROOT / "experiments" / f"{name}.py").get_config(*([kind] if kind else []))
  with made.unlocked():
    made.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message) as caught:
    config.resolve(made)
  assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_refused_before_the_first_stage(tmp_path):
  experiment = load(ROOT / "experiments" / "latte_ablations.py").get_config("imagenet")
  made = config.resolve(experiment)
  work = Workdir(tmp_path, made)
  with pytest.raises(UserError, match=r"latte.init_weights is .*DiT-XL-2.*is not there"):
    start.check_weights(work, made.recipe)
  start.check_weights(work, ("ingest", "autoencoder"))
  (tmp_path / "latte" / "checkpoints").mkdir(parents=True)  # it has begun, and needs them no more
  start.check_weights(work, made.recipe)
