"""What a train stage draws from: every bucket with enough clips, and a sentence for the others."""

import contextlib
import itertools

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from ml_collections import config_dict

from mgen_jax import config, tasks
from mgen_jax import ingest as ingest_command
from mgen_jax.data import media
from mgen_jax.errors import UserError
from mgen_jax.training import inputs
from mgen_jax.workdir import Workdir
from tests import tiny

NAME = "autoencoder"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """Nine short square clips, three long wide ones."""
  folder = tmp_path_factory.mktemp("videos")
  rng = np.random.default_rng(0)
  for number in range(12):
    wide = number >= 9
    shape = (8, 32, 48, 3) if wide else (4, 32, 32, 3)
    media.write_video(folder / f"{number}.mp4", rng.integers(255, size=shape, dtype=np.uint8), 8.0)
    (folder / f"{number}.txt").write_text("a clip")
  return folder


@pytest.fixture
def open_stage(videos, tmp_path):
  """A function of changes of the stage to its stream."""
  folders = (tmp_path / str(number) for number in itertools.count())

  def make(**changes):
    values = tiny.get_config()
    values.data.videos = str(videos)
    values.data.held_out = 0.0
    del values.stages["evaluate"]  # which asks for what is held out
    values.recipe = tuple(name for name in values.recipe if name != "evaluate")
    values.stages[NAME].small_buckets = "error"
    for key, value in changes.items():
      values.stages[NAME][key] = config_dict.ConfigDict(value) if key == "buckets" else value
    work = Workdir(next(folders), config.resolve(values))
    ingest_command.run(work, "ingest")
    stage = work.experiment.stages[NAME]
    return inputs.make_stream(work, NAME, tasks.make(stage.task))[0]

  return make


def test_a_bucket_with_less_than_a_batch_names_itself_and_the_fix(open_stage):
  with pytest.raises(UserError) as error:
    open_stage()
  for words in ("8x32x48 has 3 examples for a batch of 8", "b8x32x48.batch to 3", "leave_out"):
    assert words in str(error.value)
  with pytest.raises(UserError, match=r"16x32x32 has 0 examples .*: add clips"):
    open_stage(buckets={"b16x32x32": {"batch": 8}})


def test_small_buckets_are_left_out_or_repeat_where_asked(open_stage, caplog):
  with caplog.at_level("INFO"):
    stream = open_stage(small_buckets="leave_out")
  assert [bucket.name for bucket in stream.batch_sizes] == ["1x32x32", "4x32x32"]
  assert "8x32x48 has 3 examples for a batch of 8 and is left out" in caplog.text
  assert "share of steps" in caplog.text  # the table, before anything is compiled
  stream = open_stage(small_buckets="repeat")
  with contextlib.closing(stream.open(0)) as batches:
    assert {next(batches)[0].name for _ in range(6)} == {"1x32x32", "4x32x32", "8x32x48"}
  with pytest.raises(UserError, match=r"no bucket .* has enough clips"):
    open_stage(small_buckets="leave_out", buckets={"b8x32x48": {"batch": 8}})


def test_validation_without_a_held_out_clip_is_refused(open_stage):
  with pytest.raises(UserError, match=r"validate_every is 2, but no held-out clip .*held_out"):
    open_stage(small_buckets="repeat", validate_every=2)


def test_batches_and_steps_follow_tokens_and_the_share_of_images(open_stage):
  stream = open_stage(
    buckets={"b1x32x32": {}, "b4x32x32": {}, "b8x32x48": {}},
    tokens_per_step=64, batch_multiple=1, mix="examples", images_to_videos=0.5,
  )  # fmt: skip
  sizes = {bucket.name: size for bucket, size in stream.batch_sizes.items()}
  assert sizes["1x32x32"] >= sizes["4x32x32"] > sizes["8x32x48"]
  with contextlib.closing(stream.open(0)) as batches:
    drawn = [next(batches) for _ in range(30)]
  assert sum(bucket.is_image for bucket, _ in drawn) == 10
  assert all(len(rows["video"]) == stream.batch_sizes[bucket] for bucket, rows in drawn)


def test_hosts_with_other_data_stop_before_the_first_step(open_stage, monkeypatch):
  stream = open_stage(small_buckets="leave_out", buckets={"b4x32x32": {"batch": 8}})
  gathered = []

  def gather(mine):
    gathered.append(mine)
    return np.stack([mine, mine + np.uint8(len(gathered) > 1)])

  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  stream.open(0).close()
  assert not gathered
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  stream.open(0).close()
  with pytest.raises(UserError, match="host 1 has other data than host 0"):
    stream.open(0)
