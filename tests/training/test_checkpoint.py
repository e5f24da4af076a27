"""Nothing is lost: damaged checkpoints are named, a full disk leaves the previous one whole."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import checkpoint as checkpoint_lib
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from tests.training import toy


@pytest.fixture
def saved(tmp_path):
  """(folder, shapes, layout) of a run with checkpoints of steps 8 and 16."""
  toy.train(tmp_path, steps=16)
  optimizer = optimizer_lib.make_optimizer(toy.stage().optimizer, 16)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  shapes = state_lib.shapes(toy.ToyTask(), optimizer)
  return tmp_path / "checkpoints", shapes, state_lib.shardings(toy.ToyTask(), optimizer, mesh)


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


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
  """A limit on the size of files stands for the full disk: writing beyond it fails alike."""
  program = textwrap.dedent(
    """
    import pathlib, resource, signal, sys, time
    from mgen_jax.errors import UserError
    from tests.training import toy

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    def fill(step):
      if step == 12:
        while not pathlib.Path(sys.argv[1], "checkpoints/8/checksums-0-of-1.json").exists():
          time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
      toy.train(sys.argv[1], steps=16, log_every=1000, data=toy.stream(on_step=fill))
    except UserError as error:
      print("SAID", error)
    """
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
  )
  assert "SAID checkpoint" in done.stdout, done.stdout + done.stderr
  assert "16 could not be written" in done.stdout and "step 8 is whole" in done.stdout
  toy.train(tmp_path, steps=16)  # room again: the same command continues
  toy.train(tmp_path / "whole", steps=16)
  last = [p / "metrics.jsonl" for p in (tmp_path, tmp_path / "whole")]
  loss = [json.loads(p.read_text().splitlines()[-1])["loss"] for p in last]
  assert loss[0] == loss[1]
