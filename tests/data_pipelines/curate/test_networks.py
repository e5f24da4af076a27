"""Networks see the pictures of many clips at once, and say what they say of each alone."""

import collections

import numpy as np
import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import run as running
from data_pipelines.curate import store, work
from data_pipelines.curate.decode import DecodeError
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stages import embedding, hashes
from data_pipelines.curate.stages.probe import Probe
from data_pipelines.curate.stages.scan import Scan
from data_pipelines.curate.stages.split import Split
from mgen_jax.data import media
from tests.data_pipelines.curate import small
from tests.data_pipelines.curate.onnx_file import write_mean_colour
from tests.data_pipelines.curate.test_run import Here, files

CLIPS = 6


class InThisProcess:
  """In the place of the guarded child, to see what is asked of it; may fail like one."""

  def __init__(self, crashes: bool = False):
    self.asked = collections.Counter()
    self._crashes = crashes

  def call(self, function, *arguments):
    if function.__name__ == "see":
      self.asked[arguments[0].name, len(arguments[1])] += 1
      if self._crashes:
        raise DecodeError("crashed", "A file ended its decoder.")
    return function(*arguments)


@pytest.fixture
def setting(tmp_path):
  rng = np.random.default_rng(0)
  for number in range(CLIPS):
    colour = rng.integers(0, 256, 3)
    video = np.clip(colour + rng.normal(0, 20, (24, 64, 96, 3)), 0, 255).astype(np.uint8)
    (tmp_path / "videos").mkdir(exist_ok=True)
    media.write_video(tmp_path / "videos" / f"{number}.mp4", video, 8.0)
  tower = write_mean_colour(tmp_path / "tower.onnx", np.float32(rng.normal(size=(3, 96))))
  looks = (hashes.Hashes(model=tower), embedding.Embedding(model=tower))
  stages = (Probe(min_seconds=1.0), Scan(), Split(head=0.0, shortest=1.0), *looks)
  return tmp_path, Recipe(stages, partitions=2), looks


def curate(folder, recipe, out):
  run, paths = running.create("networks", recipe, str(folder / "videos"), str(folder / out))
  running.score(run, paths, Here(), limits=small.LIMITS)
  return run


def rows(run, stage):
  version = run.recipe.versions[stage.name]
  parts = [run.store.read(stage.name, version, number) for number in range(2)]
  return [row for part in parts if part is not None for row in store.rows_of(part)]


def test_all_clips_of_a_partition_are_seen_in_one_call(setting, monkeypatch):
  folder, recipe, looks = setting
  guard = InThisProcess()
  monkeypatch.setattr(work, "guard", lambda limits: guard)
  run = curate(folder, recipe, "together")
  calls = [count for (name, count) in guard.asked.elements() if name == "embedding"]
  assert len(calls) <= 2 and sum(calls) == CLIPS  # two partitions
  for stage, column in zip(looks, ("copy_embedding", "embedding"), strict=True):
    found = rows(run, stage)
    assert len(found) == CLIPS and len({tuple(row[column]) for row in found}) == CLIPS
  monkeypatch.setattr(work, "_TOGETHER", 1)
  alone = curate(folder, recipe, "alone")
  assert guard.asked["embedding", 1] >= CLIPS
  monkeypatch.undo()
  for other in (alone, curate(folder, recipe, "in a child")):
    assert files(run.store.root) == files(other.store.root)  # bit by bit


def test_what_a_network_cannot_see_is_an_error_of_the_clip(setting, monkeypatch):
  folder, recipe, looks = setting
  guard = InThisProcess(crashes=True)
  monkeypatch.setattr(work, "guard", lambda limits: guard)
  run = curate(folder, recipe, "out")
  assert all(row["error_code"] == "crashed" for row in rows(run, looks[1]))
  assert len(rows(run, looks[1])) == CLIPS
