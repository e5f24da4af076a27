"""A sweep prints commands that can be run, and runs none."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

from mgen_jax import average, sample, sweep
from mgen_jax.errors import UserError

CONFIG = "tests/tiny.py"


def printed(capsys, *arguments):
  values = flags.FlagValues()
  sweep.define_flags(values)
  values(["sweep", *arguments])
  sweep.main([], values)
  return capsys.readouterr().out.splitlines()


def test_all_combinations_are_printed_each_with_its_own_folder(capsys):
  lines = printed(
    capsys, f"--config={CONFIG}", "--vary=seed=0,1", "--vary=stages.t2v.optimizer.lr=1e-3,1e-4",
    "--flag=cluster=slurm",
  )  # fmt: skip
  assert lines[0] == (
    "python -m mgen_jax.main --config=tests/tiny.py --config.seed=0 "
    "--config.stages.t2v.optimizer.lr=1e-3 --workdir=runs/sweep/tiny_seed=0_lr=1e-3 --cluster=slurm"
  )
  folders = {word for line in lines for word in shlex.split(line) if word.startswith("--workdir")}
  assert len(lines) == len(folders) == 4


def test_values_may_go_together(capsys):
  arguments = ("--vary=seed=0,1", "--vary=stages.t2v.steps=6,8", "--together", "--workdir=a b")
  first, second = printed(capsys, f"--config={CONFIG}", *arguments)
  assert "--config.seed=0" in first and "steps=6" in first and "'--workdir=a b/" in first
  assert "--config.seed=1" in second and "steps=8" in second


def test_commas_in_brackets_belong_to_a_value():
  key, values = sweep.parse("config.stages.t2v.batch_changes=((5,2.0),),((7,3.0),(9,1.0))")
  assert key == "stages.t2v.batch_changes" and values == ["((5,2.0),)", "((7,3.0),(9,1.0))"]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--vary=sed=1",), 'did you mean "--config.seed"'),
    (("--vary=seed=one",), "seed=one"),
    (("--vary=stages.t2v.ema_decay=2.0",), "ema_decay is 2.0"),
    (("--vary=seed",), "is not KEY=VALUE"),
    (("--vary=seed=1,,2",), "is not KEY=VALUE"),
    (("--vary=seed=0,1", "--vary=seed=2"), "twice"),
    (("--vary=seed=0,1", "--vary=stages.t2v.steps=6", "--together"), "as many values"),
    ((), "--vary"),
  ],
)
def test_what_cannot_be_run_is_refused(capsys, arguments, words):
  with pytest.raises(UserError, match=words):
    printed(capsys, f"--config={CONFIG}", *arguments)


def test_the_commands_of_the_guide_can_be_run(capsys):
  """Those of sweep are run; those of the others have flags that exist."""
  guide = (pathlib.Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
  found = re.findall(r"^python -m mgen_jax\.(\w+) (.*)$", guide, re.MULTILINE)
  assert {name for name, _ in found} == {"average", "sample", "sweep"}
  for name, text in found:
    arguments = shlex.split(text)
    if name == "sweep":
      assert len(printed(capsys, *arguments)) == 4
    else:
      values = flags.FlagValues()
      {"average": average, "sample": sample}[name].define_flags(values)
      assert values([name, *arguments]) == [name]


def test_help_is_no_fault():
  command = [sys.executable, "-m", "mgen_jax.sweep", "--help"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and "--vary" in done.stdout and not done.stderr
