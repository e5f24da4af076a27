"""Nothing is lost: damaged checkpoints are named, a full disk leaves the previous one whole."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import pytest

from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import checkpoint as checkpoint_lib
from mgen_jax.training import checksums
from mgen_jax.training import program as program_lib
from tests.training import toy


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with checkpoints of steps 8 and 16."""
  folder = tmp_path_factory.mktemp("trained")
  toy.train(folder, steps=16)
  return folder


@pytest.fixture
def saved(trained, tmp_path):
  """(checkpoints, shapes, layout) of a copy of it that a test may damage."""
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  program = program_lib.make_program(toy.ToyTask(), toy.stage(steps=16), mesh, 3)
  return tmp_path / "checkpoints", program.shapes, program.layout


def restore(saved):
  folder, shapes, layout = saved
  with checkpoint_lib.Checkpoints(str(folder), read_only=True) as checkpoints:
    return checkpoints.restore(shapes, layout)


def largest_file(folder):
  return max((p for p in pathlib.Path(folder).rglob("*") if p.is_file()), key=os.path.getsize)


@pytest.mark.parametrize(
  "victim",
  [
    "data of the state",
    "state/manifest.ocdbt",
    "state/_METADATA",
    "data/metadata",
    "meta/metadata",
  ],
)
def test_a_truncated_checkpoint_is_named_with_the_way_back(saved, victim):
  step = saved[0] / "16"
  if victim == "data of the state":
    path = largest_file(step / "state")
  else:
    path = step / victim
    path = largest_file(path) if path.is_dir() else path
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(checkpoint_lib.CheckpointError) as error:
    restore(saved)
  assert str(step) in str(error.value) and "go back to step 8" in str(error.value)


def test_a_run_never_starts_again_over_a_damaged_checkpoint(saved):
  path = largest_file(saved[0] / "16" / "state")
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(checkpoint_lib.CheckpointError, match="damaged"):
    toy.train(saved[0].parent, steps=24)


def test_deleting_a_damaged_checkpoint_goes_back_to_the_one_before(saved):
  path = saved[0] / "16"
  for file in sorted(path.rglob("*"), reverse=True):
    file.rmdir() if file.is_dir() else file.unlink()
  path.rmdir()
  assert restore(saved).step == 8


def test_another_model_is_refused_with_what_differs(saved):
  folder, shapes, layout = saved
  other = shapes.replace(params={**shapes.params, "w": jax.ShapeDtypeStruct((8, 32), "float32")})
  with pytest.raises(checkpoint_lib.CheckpointError) as error:
    restore((folder, other, layout))
  assert "params/w: (8, 16) in the checkpoint, (8, 32) here" in str(error.value)


def test_the_averaged_parameters_can_be_read_alone(saved):
  folder, shapes, layout = saved
  with checkpoint_lib.Checkpoints(str(folder), read_only=True) as checkpoints:
    ema = checkpoints.restore_ema(shapes.params, layout.params)
  assert (ema["w"] == restore(saved).state.ema["w"]).all()


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path):
  checkpoints = checkpoint_lib.Checkpoints(str(tmp_path / "none"))
  with pytest.raises(checkpoint_lib.CheckpointError, match="no checkpoint in"):
    checkpoints.read_meta()


def test_a_flipped_bit_is_found_by_the_checksums(saved):
  path = largest_file(saved[0] / "16" / "state")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(checkpoint_lib.DamagedError, match=f"{path.name} is not what was written"):
    restore(saved)
  with (
    checkpoint_lib.Checkpoints(str(saved[0]), read_only=True) as checkpoints,
    pytest.raises(checkpoint_lib.DamagedError, match="is not what was written"),
  ):
    checkpoints.restore_ema(saved[1].params, saved[2].params)


def test_a_damaged_checkpoint_is_passed_over_only_when_told_to(saved):
  folder = saved[0].parent
  (saved[0] / "16" / "state" / "_METADATA").unlink()
  with pytest.raises(checkpoint_lib.DamagedError, match=r"_METADATA is missing.*fall_back"):
    toy.train(folder, steps=24)
  toy.train(folder, steps=24, fall_back=True)
  assert (folder / checkpoint_lib.SET_ASIDE / "16" / "state").is_dir()  # nothing is deleted
  toy.train(folder / "whole", steps=24)
  assert toy.losses(folder) == toy.losses(folder / "whole")
  # When no older one is left, it is said and not passed over: a run never silently starts again.
  for step in (16, 24):
    (saved[0] / str(step) / "state" / "_METADATA").unlink()
  with pytest.raises(checkpoint_lib.DamagedError, match="start this stage again"):
    toy.train(folder, steps=32, fall_back=True)


def test_a_checkpoint_without_checksums_is_used_with_a_warning(saved, caplog):
  (saved[0] / "16" / "checksums-0-of-1.json").unlink()
  assert restore(saved).step == 16
  assert "has no checksums" in caplog.text


def test_lists_of_checksums_leave_each_other_out_while_they_are_written(tmp_path):
  (tmp_path / "state").mkdir()
  for name in ("a", "b", "c"):
    (tmp_path / "state" / name).write_text(name)
  being_written = tmp_path / ".checksums-1-of-2.json.4242.tmp"  # by process 1, as 0 looks
  being_written.write_text("{")
  checksums.write(tmp_path, 0, 2)
  being_written.unlink()
  checksums.write(tmp_path, 1, 2)
  lists = [json.loads(path.read_text())["files"] for path in tmp_path.glob("checksums-*")]
  assert sorted(name for files in lists for name in files) == ["state/a", "state/b", "state/c"]
  for process in range(2):
    checksums.verify(tmp_path, process, 2)


def test_clocks_that_disagree_change_nothing(tmp_path, monkeypatch):
  """Each part of the run on a host whose clock is ten years behind that of the one before."""
  now, now_ns = time.time, time.time_ns
  for part, steps in enumerate((8, 16, 24)):
    behind = part * 10 * 365 * 86400
    monkeypatch.setattr(time, "time", lambda behind=behind: now() - behind)
    monkeypatch.setattr(time, "time_ns", lambda behind=behind: now_ns() - behind * 10**9)
    toy.train(tmp_path, steps=steps, checkpoint_every=4)
    left = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert left == [steps - 4, steps]
    os.utime(tmp_path / f"checkpoints/{steps}", (0, 0))  # as if it were the oldest
  monkeypatch.undo()
  toy.train(tmp_path / "whole", checkpoint_every=4)
  assert toy.losses(tmp_path) == toy.losses(tmp_path / "whole")


@pytest.mark.parametrize(
  ("log_every", "says"),
  [(1000, r"checkpoint .*16 could not be written .*step 8 is whole"), (1, r"could not be written")],
  ids=["checkpoint", "metrics"],
)
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, log_every, says):
  """A limit on the size of files stands for the full disk: writing beyond it fails alike."""
  program = textwrap.dedent(
    """
    import pathlib, resource, signal, sys, time
    from mgen_jax import cli
    from tests.training import toy

    folder, log_every = sys.argv.pop(), int(sys.argv.pop())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    def fill(step):
      if step == 12:
        while not pathlib.Path(folder, "checkpoints/8/checksums-0-of-1.json").exists():
          time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    data = toy.stream(on_step=fill)
    cli.run(lambda _: toy.train(folder, steps=16, log_every=log_every, data=data))
    """
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(log_every), str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2 and len(said) == 1, done.stderr
  assert re.search(says, said[0]) and "make room on that disk" in said[0]
  toy.train(tmp_path, steps=16)  # room again: the same command continues
  toy.train(tmp_path / "whole", steps=16)
  assert toy.losses(tmp_path)[16] == toy.losses(tmp_path / "whole")[16]
