"""A run that is killed anywhere, or goes on somewhere else, is the run that nothing disturbed.

What `kill -9` leaves is what was on the disk at that moment: here one run is photographed at many
moments, in the middle of a save too, and each picture is continued. Real kills, of whole programs
and at random times: tests/test_main.py and `python -m benchmarks.reliability`.
"""

import pathlib
import random
import shutil
import signal

import chex
import numpy as np
import pytest

from mgen_jax.cli import LOST_PROCESS
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training.checkpoint import Checkpoints
from tests.training import moments, toy

STEPS, EVERY = 24, 4


def train(folder, **values):
  toy.train(folder, steps=STEPS, checkpoint_every=EVERY, **values)


def seen(folder):
  """By step, which examples were drawn, in which order, and the loss."""
  lines = [line for line in metrics_lib.read(str(folder)) if "loss" in line]
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  return {line["step"]: line["seen"] for line in lines}


def assert_same_run(folder, whole):
  assert seen(folder) == seen(whole) and toy.losses(folder) == toy.losses(whole)
  chex.assert_trees_all_equal(toy.final_state(folder), toy.final_state(whole))


def assert_close_run(folder, whole):
  """Other devices sum in another order."""
  assert seen(folder) == seen(whole)
  losses, expected = toy.losses(folder), toy.losses(whole)
  np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-6)
  chex.assert_trees_all_close(toy.final_state(folder), toy.final_state(whole), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  train(folder, data=toy.mixed_stream())
  return folder


class Camera:
  """Copies the folder of a run at moments that are asked for: (name, how many times before)."""

  def __init__(self, folder, album, points):
    self.folder, self.album, self.points = pathlib.Path(folder), album, set(points)
    self.times = dict.fromkeys((name for name, _ in points), 0)

  def passes(self, name):
    """This moment is reached now."""
    if name not in self.times:
      return
    moment = (name, self.times[name])
    self.times[name] += 1
    while moment in self.points:
      place = self.album / f"{moment[0]} {moment[1]}"
      try:
        shutil.copytree(self.folder, place)
        self.points.remove(moment)
      except shutil.Error:  # another thread has just renamed what was being copied
        shutil.rmtree(place)


def test_twenty_kills_and_every_one_continues_bit_for_bit(whole, tmp_path, monkeypatch):
  saves = range(STEPS // EVERY)
  rng = random.Random(0)
  # 4 and 8: right after a save began to be written, before its first batch.
  points = [(moments.BATCH, n) for n in (0, 4, 8, *rng.sample(range(9, STEPS), 5))]
  points += [(name, n) for name in moments.WITHIN_A_SAVE for n in rng.sample(saves, 3)][:12]
  assert len(points) == 20
  album, run = tmp_path / "album", tmp_path / "run"
  run.mkdir()
  camera = Camera(run, album, points)
  moments.watch(camera.passes, monkeypatch.setattr)
  train(run, data=toy.mixed_stream(on_batch=lambda number: camera.passes(moments.BATCH)))
  monkeypatch.undo()
  assert_same_run(run, whole)

  pictures = sorted(album.iterdir())
  assert len(pictures) == 20
  starts = set()
  for picture in pictures:
    with Checkpoints(f"{picture}/checkpoints", keep=2) as checkpoints:
      starts.add(saved := checkpoints.latest_step())
    log, lines = picture / metrics_lib.FILE_NAME, metrics_lib.read(str(picture))
    # The last line may have been cut as well, but not that of a step that is saved: lines are out
    # before a save begins, and this picture may show the end of the save beside an older log.
    if lines and lines[-1]["step"] > (saved or 0):
      log.write_bytes(log.read_bytes()[:-7])
    else:
      with log.open("ab") as file:
        file.write(b'{"step": 99, "lo')
    train(picture, data=toy.mixed_stream())
    assert_same_run(picture, whole)
  assert len(starts) >= 5  # from nothing to the last step


@pytest.mark.slow
def test_worker_processes_change_nothing(whole, tmp_path):
  data = toy.mixed_stream(workers=2, on_batch=toy.crash_at(10))
  with pytest.raises(toy.Crash):
    train(tmp_path, data=data)
  train(tmp_path, data=toy.mixed_stream(workers=2))
  assert_same_run(tmp_path, whole)


def test_a_run_goes_on_from_mesh_to_mesh(whole, tmp_path):
  meshes = (
    (1, {}),
    (8, {"fsdp": 8}),
    (2, {"replica": 2, "fsdp": 1}),
    (8, {"fsdp": 2, "tensor": 4}),
    (4, {"fsdp": 2, "context": 2}),
    (1, {}),
  )
  for index, (devices, mesh) in enumerate(meshes):
    data = toy.mixed_stream(on_batch=toy.crash_at(4 * index + 5))
    values = {"data": data, "devices": devices, "mesh": MeshConfig(**mesh)}
    if index < len(meshes) - 1:
      with pytest.raises(toy.Crash):
        train(tmp_path, **values)
    else:
      train(tmp_path, **values)
  assert_close_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_then_one_then_four(whole, tmp_path):
  def signal_at(signum, batch):
    return f"--signal={int(signum)}", f"--at={batch}"

  saved = tmp_path / "checkpoints/8/checksums-0-of-2.json"
  kill = *signal_at(signal.SIGKILL, 11), f"--prepared={saved}"
  (said, code), (_, killed) = moments.run_hosts(tmp_path, 2, last=kill)
  assert killed == -signal.SIGKILL
  assert code == LOST_PROCESS and "another process of this run is gone" in said, said
  assert "Traceback" not in said

  ((said, code),) = moments.run_hosts(tmp_path, 1, last=signal_at(signal.SIGTERM, 14))
  assert code == 128 + signal.SIGTERM and "everything is saved" in said, said
  assert "continues from step 8 of 24" in said

  # A signal that only one of them has seen stops them all at one step; then they go on.
  ended = moments.run_hosts(tmp_path, 4, last=signal_at(signal.SIGTERM, 17))
  assert {code for _, code in ended} == {128 + signal.SIGTERM}, ended
  assert "continues from step 15 of 24" in ended[0][0]
  train(tmp_path, data=toy.mixed_stream(), devices=8, mesh=MeshConfig(fsdp=8))
  assert_close_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 2])
def test_data_that_one_of_two_processes_cannot_read_at_the_start_end_both_alike(tmp_path, batch):
  ended = moments.run_hosts(tmp_path, 2, last=(f"--breaks={batch}",))
  assert [code for _, code in ended] == [2, 2], ended
  assert "another process of this run cannot read its data" in ended[0][0]
  assert f"record {batch} of a shard cannot be read" in ended[1][0]


@pytest.mark.slow
def test_data_that_only_one_of_two_processes_cannot_read_end_both_with_all_saved(whole, tmp_path):
  ended = moments.run_hosts(tmp_path, 2, last=("--breaks=14",))
  assert [code for _, code in ended] == [2, 2], ended
  assert "another process of this run cannot read its data" in ended[0][0]
  assert "record 14 of a shard cannot be read" in ended[1][0]
  # All steps that have data are done and saved, not only those before the last regular checkpoint.
  with Checkpoints(f"{tmp_path}/checkpoints", keep=2) as checkpoints:
    assert checkpoints.latest_step() == 14
  train(tmp_path, data=toy.mixed_stream(), devices=2, mesh=MeshConfig(fsdp=2))
  assert_close_run(tmp_path, whole)
