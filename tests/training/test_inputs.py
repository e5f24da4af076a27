"""The data of a stage: several sets, of their own lengths, mixed and changed at a step."""

import dataclasses

import jax
import numpy as np
import pytest

from mgen_jax import config, ingest, tasks
from mgen_jax.data import ingest as data_ingest
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.training import inputs
from mgen_jax.workdir import Workdir
from tests import tiny, untrained

CLIP = Bucket(4, 32, 32)


def experiment(mixture, **changes):
  """The tiny autoencoder on two sets of clips: those of 8 frames, and those of 4."""
  made = tiny.get_config().to_dict()
  marbles = {**made["data"]["marbles"], "clips": 24, "sizes": ((32, 32),)}
  datasets = {
    "long": {"held_out": 0.25, "marbles": marbles, "min_seconds": 1.0},
    "short": {"held_out": 0.25, "marbles": marbles, "max_seconds": 1.0},
  }
  stages = {
    f"ingest_{name}": {"kind": "ingest", "dataset": name, "workers": 1} for name in datasets
  }
  train = {**made["stages"]["autoencoder"], "mixture": mixture, "buckets": {"b4x32x32": {}}}
  stages["autoencoder"] = {**train, **changes}
  recipe = tuple(stages)
  return {"name": "sets", "recipe": recipe, "stages": stages, "datasets": datasets}


BOTH = {"ingest_long": {"weight": 1.0}, "ingest_short": {"weight": 3.0}}
LATER = {"ingest_long": {}, "ingest_short": {"from_step": 3}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  work = Workdir.create(tmp_path_factory.mktemp("sets"), config.resolve(experiment(BOTH)))
  for name in ("ingest_long", "ingest_short"):
    work.start(name)
    ingest.run(work, name)
  return work


def stream_of(work, mixture, **changes):
  work = Workdir(work.root, config.resolve(experiment(mixture, **changes)))
  task = tasks.make(work.experiment.stages["autoencoder"].task)
  return inputs.make_stream(work, "autoencoder", task)[0]


def test_a_set_of_data_has_the_lengths_it_asks_for(work):
  frames = {
    name: {clip.frames for clip in data_ingest.load(work.folder(f"ingest_{name}")).clips}
    for name in ("long", "short")
  }
  assert frames == {"long": {8}, "short": {4}}
  index = data_ingest.load(work.folder("ingest_long"))
  with pytest.raises(UserError, match="lasts from 9 to inf s"):
    ingest._of_length(index, config.DataConfig(min_seconds=9.0))
  summary = index.summary
  assert summary["train"] + summary["held_out"] == summary["clips"] == 12
  assert summary["of_other_length"] == 12


def test_a_mixture_is_trained_and_validated_on(work, caplog):
  with caplog.at_level("INFO"):
    stream = stream_of(work, BOTH)
  assert "bucket 4x32x32 draws [" in caplog.text
  batches = stream.open(0)
  bucket, rows = next(batches)
  batches.close()
  assert bucket == CLIP and rows["video"].shape == (8, 4, 32, 32, 3)
  held_out = list(stream.validation())
  assert len(held_out) == 1 and held_out[0][1]["video"].shape[0] == 8  # six clips, filled up
  again = list(stream.validation())
  np.testing.assert_array_equal(held_out[0][1]["video"], again[0][1]["video"])


def test_another_set_comes_at_its_step(work):
  def fingerprint(mixture, step, **changes):
    batches = stream_of(work, mixture, **changes).open(step)
    batches.close()
    return batches.fingerprint

  only = {"ingest_long": {}}
  assert fingerprint(LATER, 3) == fingerprint(only, 3)
  assert fingerprint(LATER, 4) != fingerprint(only, 4)
  assert fingerprint(only, 0, seed=config.resolve(experiment(only)).seed) == fingerprint(only, 0)
  assert fingerprint(only, 0, seed=11) != fingerprint(only, 0)  # another order
  changed = stream_of(work, only, batch_changes=((3, 2.0),))
  assert [sizes[CLIP] for sizes in (changed.batch_sizes, *changed.changed_sizes)] == [8, 16]


@pytest.mark.parametrize(
  ("mixture", "changes", "words"),
  [
    ({"ingest_lang": {}}, {}, 'did you mean "ingest_long"'),
    ({"ingest_long": {"weight": 1.0}, "ingest_short": {}}, {}, "weights for some"),
    ({"ingest_long": {"from_step": 2}}, {}, "leaves no set of data from step 0"),
    ({"ingest_long": {"until_step": 4}}, {}, "leaves no set of data from step 4"),
    ({"ingest_long": {"from_step": 4, "until_step": 2}}, {}, "must come after"),
    (BOTH, {"latents": "encode"}, "both set"),
  ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(mixture, changes, words):
  with pytest.raises(ConfigError, match=words):
    config.resolve(experiment(mixture, **changes))


def test_a_set_of_data_that_is_not_there_is_refused():
  values = experiment(BOTH)
  values["stages"]["ingest_long"]["dataset"] = "lang"
  with pytest.raises(ConfigError, match='did you mean "long"'):
    config.resolve(values)
  with pytest.raises(ConfigError, match="max_seconds"):
    config.DataConfig(min_seconds=16.0, max_seconds=10.0)


def test_the_latents_of_a_mixture_are_of_one_autoencoder():
  made = tiny.get_config().to_dict()
  stages = made["stages"]
  stages["other"] = stages["autoencoder"]
  stages["encode_other"] = {**stages["encode"], "autoencoder": "other"}
  stages["t2v"] = {**stages["t2v"], "latents": None, "mixture": {"encode": {}, "encode_other": {}}}
  recipe = ("ingest", "autoencoder", "other", "encode", "encode_other", "t2i", "t2v", "evaluate")
  with pytest.raises(ConfigError, match="two languages"):
    config.resolve({**made, "recipe": recipe})


def test_a_model_keeps_what_its_latents_are_normalised_with(tmp_path):
  """What a model has learned is in the scale of its own first data, whatever comes later."""
  work = untrained.make(tmp_path)
  before = {"mean": [0.5] * 4, "std": [2.0] * 4, "autoencoder": "0" * 16}
  (tmp_path / "encode" / "statistics.json").write_text(
    '{"mean": [0, 0, 0, 0], "std": [1, 1, 1, 1], "autoencoder": "0000000000000000"}'
  )
  parts = work.experiment.stages["t2v"].parts()
  assert inputs._statistics(work, parts, None)["mean"] == [0] * 4
  kept = inputs._statistics(work, parts, before)
  assert (kept["mean"], kept["std"]) == (before["mean"], before["std"])
  found = {"mean": jax.numpy.zeros((1, 2, 2, 4)), "caption": ""}
  task = dataclasses.make_dataclass("Task", [])()
  task.prepare = lambda example: example
  made = inputs.Prepare(task, kept)({k: np.asarray(v) for k, v in found.items()}, None)
  np.testing.assert_allclose(made["latents"], -0.25)
