"""The command as a user runs it: plans, files, comparisons, and one sentence for a fault."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from mgen_jax import config as config_lib
from mgen_jax import plan
from mgen_jax.errors import UserError
from mgen_jax.planning import averaging, topologies
from tests import tiny


def run(*flags):
  command = [sys.executable, "-m", "mgen_jax.plan", *flags]
  return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_stage_is_planned_saved_and_compared(tmp_path):
  flags = ("--config=tests/tiny.py", "--stage=t2i", "--topology=cpu:4")
  done = run(*flags, f"--out={tmp_path}/deep/a.json")
  assert done.returncode == 0, done.stderr
  assert "tiny / t2i / 1x32x32 on cpu:4" in done.stdout and "FITS" in done.stdout
  first = json.loads((tmp_path / "deep" / "a.json").read_text())
  assert first["devices"] == 4 and first["mesh"]["fsdp"] == 4 and first["stablehlo_lines"] > 100
  assert "Memory of one device" in (tmp_path / "deep" / "a.txt").read_text()
  assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")

  (tmp_path / "b.json").write_text(json.dumps({**first, "accumulate": 2}))
  again = run(f"--compare={tmp_path}/deep/a.json,{tmp_path}/b.json")
  assert again.returncode == 0, again.stderr
  assert "accumulate" in again.stdout and "differs" in again.stdout
  assert "The same in both: experiment tiny, what train, stage t2i" in again.stdout


TINY = ("--config=tests/tiny.py", "--stage=t2v")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([*TINY], ["--topology is missing", "v5p:8x8x8"]),
    ([*TINY, "--topology=v5pp:8x8x8"], ['did you mean "v5p:8x8x8"']),
    (
      [*TINY, "--topology=cpu:8", "--mesh=context=2"],
      ["--mesh and --samples are of --what=sample", "config.stages.NAME.mesh"],
    ),
    (
      [*TINY, "--topology=cpu:8", "--what=sample", "--bucket=8x32x480"],
      ["--bucket=8x32x480", "max_positions[2]"],
    ),
    ([*TINY, "--topology=cpu:8", "--out=/dev/null/a"], ["--out=/dev/null/a cannot be made"]),
    ([*TINY, "--topology=cpu:6"], ["config.stages.t2v.buckets", "does not divide"]),
    (
      [*TINY, "--topology=cpu:8", "--config.stages.t2v.mesh.fsdp=3"],
      ["config.stages.t2v.mesh", "8 devices", "for instance"],
    ),
  ],
)
@pytest.mark.slow
def test_bad_input_is_one_sentence(flags, words):
  done = run(*flags)
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2, done.stderr
  assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
  assert all(word in said[0] for word in words), said


def test_the_bucket_with_the_most_tokens_comes_first():
  made = config_lib.resolve(tiny.get_config())
  found = plan.pick_buckets(made, "t2v", None, True)
  assert [bucket.name for bucket in found] == ["8x32x48", "1x32x32", "4x32x32"]
  assert [b.name for b in plan.pick_buckets(made, "t2v", None, False)] == ["8x32x48"]
  assert [b.name for b in plan.pick_buckets(made, "t2v", "b4x32x32", False)] == ["4x32x32"]
  with pytest.raises(UserError, match='did you mean "8x32x48"'):
    plan.pick_buckets(made, "t2v", "8x32x44", False)


def changing():
  values = tiny.get_config()
  values.stages.t2v.batch_changes = (
    (2, 2.0),
    (4, 0.5),
    (100, 9.0),
  )  # the last one is never reached
  return config_lib.resolve(values)


@pytest.mark.parametrize(
  ("step", "factor", "words"),
  [
    (None, 2, "from step 2 on, x2, the largest of the stage"),
    (1, 1, "from step 0 on, x1, not its largest"),
    (3, 2, "from step 2 on, x2, the largest"),
    (5, 0.5, "from step 4 on, x0.5, not its largest"),
  ],
)
def test_batches_that_change_are_planned_where_they_are_largest_or_at_a_step(step, factor, words):
  made = changing()
  before = made.stages["t2v"].batches()
  planned, said = plan.at_step(made, "t2v", step)
  found = planned.stages["t2v"].batches()
  assert {b: entry.batch for b, entry in found.items()} == {
    b: factor * entry.batch for b, entry in before.items()
  }
  assert words in said and "x9" not in said
  assert plan.at_step(made, "t2i", None) == (made, None)
  with pytest.raises(UserError, match="--at_step=6 is not a step of stage t2v"):
    plan.at_step(made, "t2v", 6)


def test_an_average_of_30b_fits_a_node_of_which_one_gpu_could_not_hold_it():
  """From shapes alone: nothing of that size is made."""
  spec = importlib.util.spec_from_file_location("t2v_sft", "experiments/t2v_sft.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = config_lib.resolve(module.get_config("h100"))
  topology = topologies.parse("cpu:8")
  record = averaging.make_plan(made, "average", topology, jax.devices()[:8])
  memory, count = record["memory_gib"], record["parameters"]
  assert count > 29e9 and record["mesh"]["fsdp"] == 8
  assert memory["average"] == pytest.approx(4 * count / 8 / 2**30, rel=0.01)  # sharded, in fp32
  assert memory["tensor"] < 0.2 * memory["average"]
  assert memory["temp"] < 0.01 * memory["tensor"]
  assert memory["total"] == sum(memory[part] for part in ("average", "tensor", "temp"))


def test_a_stage_that_does_not_train_cannot_be_planned():
  made = config_lib.resolve(tiny.get_config())
  with pytest.raises(UserError, match=r"--stage is missing.*autoencoder, t2i, t2v"):
    plan.pick_stage(made, None)
  with pytest.raises(UserError, match=r'--stage=t2w is not in "tiny": did you mean "t2v"'):
    plan.pick_stage(made, "t2w")
  with pytest.raises(UserError, match="--stage=encode does not train"):
    plan.pick_stage(made, "encode")


@pytest.mark.parametrize("text", ["{", "[1]", '{"loss": 1}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
  (tmp_path / "x.json").write_text(text)
  with pytest.raises(UserError, match=r"--compare=.*x\.json is not"):
    plan.read_plan(f"{tmp_path}/x.json")


def test_a_plan_of_another_process_gets_the_flags_but_those_of_this_one():
  line = (
    "plan --config=a.py --search --tries 3 --out=x --bucket=1x2x3 --noall_buckets --mesh=fsdp=8"
  )
  line += " --config.stages.a.mesh.fsdp=2 --stage s --try_seconds=5"
  kept = ["--config=a.py", "--mesh=fsdp=8", "--config.stages.a.mesh.fsdp=2", "--stage", "s"]
  assert plan.own_flags(line.split()) == kept
  assert plan.own_flags(line.split(), ["mesh"]) == [kept[0], *kept[2:]]


@pytest.mark.slow
def test_a_search_and_all_buckets_leave_what_they_found(tmp_path):
  out = tmp_path / "plan"
  flags = (*TINY, "--topology=cpu:8", "--all_buckets", "--search", "--tries=1", f"--out={out}")
  done = run(*flags)
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "plan.json").read_text())
  assert len(record["search"]) == 2 and "tried 1 of 1" in done.stderr
  totals = {name: made["memory_gib"]["total"] for name, made in record["buckets"].items()}
  stage = config_lib.resolve(tiny.get_config()).stages["t2v"]
  assert set(totals) == {bucket.name for bucket in stage.batches()}
  assert record["memory_gib"]["total"] == max(totals.values())

  done = run(*flags, "--try_seconds=1")
  assert done.returncode == 2 and "give --try_seconds more" in done.stderr
