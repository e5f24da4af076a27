"""A run that is killed anywhere, or goes on somewhere else, is the run that nothing disturbed.

What `kill -9` leaves is what was on the disk at that moment: here one run is photographed at many
moments, in the middle of a save too, and each picture is continued. Real kills, of whole programs
and at random times: tests/test_main.py and `python -m benchmarks.reliability`.
"""

import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mgen_jax.cli import LOST_PROCESS
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.training import checksums
from mgen_jax.training import metrics as metrics_lib
from mgen_jax.training.checkpoint import Checkpoints
from tests.training import toy

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

  def __init__(self, folder, album, moments):
    self.folder, self.album, self.moments = pathlib.Path(folder), album, set(moments)
    self.times = dict.fromkeys((name for name, _ in moments), 0)

  def passes(self, name):
    """This moment is reached now."""
    if name not in self.times:
      return
    moment = (name, self.times[name])
    self.times[name] += 1
    while moment in self.moments:
      place = self.album / f"{moment[0]} {moment[1]}"
      try:
        shutil.copytree(self.folder, place)
        self.moments.remove(moment)
      except shutil.Error:  # another thread has just renamed what was being copied
        shutil.rmtree(place)

  def around(self, monkeypatch, owner, method, *, before=None, after=None):
    """Passes the moments `before` and `after` each call of a method."""
    original = getattr(owner, method)

    def called(*arguments, **options):
      self.passes(before)
      result = original(*arguments, **options)
      self.passes(after)
      return result

    monkeypatch.setattr(owner, method, called)


def test_twenty_kills_and_every_one_continues_bit_for_bit(whole, tmp_path, monkeypatch):
  saves = range(STEPS // EVERY)
  within = ("before a save", "in a save", "before its commit", "before its checksums", "after it")
  rng = random.Random(0)
  # 4 and 8: right after a save began to be written, before its first batch.
  moments = [("batch", n) for n in (0, 4, 8, *rng.sample(range(9, STEPS), 5))]
  moments += [(name, n) for name in within for n in rng.sample(saves, 3)][:12]
  assert len(moments) == 20
  album, run = tmp_path / "album", tmp_path / "run"
  run.mkdir()
  camera = Camera(run, album, moments)
  camera.around(monkeypatch, Checkpoints, "save", before=within[0], after=within[1])
  # The state's handler ends just before Orbax gives the whole checkpoint its name.
  camera.around(monkeypatch, ocp.StandardCheckpointHandler, "finalize", before=within[2])
  camera.around(monkeypatch, checksums, "write", before=within[3], after=within[4])
  train(run, data=toy.mixed_stream(on_batch=lambda number: camera.passes("batch")))
  monkeypatch.undo()
  assert_same_run(run, whole)

  pictures = sorted(album.iterdir())
  assert len(pictures) == 20
  starts = set()
  for picture in pictures:
    log = picture / metrics_lib.FILE_NAME
    if log.exists():  # the last line may have been cut as well
      log.write_bytes(log.read_bytes()[:-7])
    with Checkpoints(f"{picture}/checkpoints", keep=2) as checkpoints:
      starts.add(checkpoints.latest_step())
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


def start(folder, processes, *flags):
  """The processes of a run; `flags` are for the last of them only."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "tests.training.host", f"--folder={folder}", f"--steps={STEPS}"]
  command += [f"--every={EVERY}", f"--processes={processes}", f"--port={port}"]
  started = [
    subprocess.Popen(
      [*command, f"--index={index}", *(flags if index == processes - 1 else ())],
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(processes)
  ]
  return [(process.communicate(timeout=120)[1], process.returncode) for process in started]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_then_one_then_four(whole, tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  saved = tmp_path / "checkpoints/8/checksums-0-of-2.json"
  kill = f"--signal={int(signal.SIGKILL)}", "--at=11", f"--prepared={saved}"
  (said, code), (_, killed) = start(tmp_path, 2, *kill)
  assert killed == -signal.SIGKILL
  assert code == LOST_PROCESS and "another process of this run is gone" in said, said
  assert "Traceback" not in said

  ((said, code),) = start(tmp_path, 1, f"--signal={int(signal.SIGTERM)}", "--at=14")
  assert code == 128 + signal.SIGTERM and "everything is saved" in said, said
  assert "continues from step 8 of 24" in said

  # A signal that only one of them has seen stops them all at one step; then they go on.
  ended = start(tmp_path, 4, f"--signal={int(signal.SIGTERM)}", "--at=17")
  assert {code for _, code in ended} == {128 + signal.SIGTERM}, ended
  assert "continues from step 15 of 24" in ended[0][0]
  train(tmp_path, data=toy.mixed_stream(), devices=8, mesh=MeshConfig(fsdp=8))
  assert_close_run(tmp_path, whole)
