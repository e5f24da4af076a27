"""Every command of docs/training.md is run, in order, on the least experiment."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

from mgen_jax import average, plot, sample, watch, workdir
from mgen_jax.data.marbles import __main__ as marbles
from mgen_jax.training import goodput, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The commands as they stand, but for sizes: the experiment, and what depends on it.
SMALLER = {
  "experiments/t2v_sft.py": str(ROOT / "tests" / "least_sft.py"),
  "experiments/quickstart.py": str(ROOT / "tests" / "least.py"),
  "--clips 200 --size 64x64,48x80 --frames 16,24": "--clips 24 --size 32x32 --frames 4",
  "steps=2000": "steps=6",
  "profile_from=1610": "profile_from=5",
  "steps=2010": "steps=8",
}
COMMANDS = {"mgen_jax.average": average, "mgen_jax.sample": sample}  # likewise, with flags of absl
IN_PROCESS = {"mgen_jax.watch": watch, "mgen_jax.plot": plot, "mgen_jax.data.marbles": marbles}


def commands():
  """The lines of all shell blocks."""
  guide = (ROOT / "docs" / "training.md").read_text()
  blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
  return [line for block in blocks for line in block.splitlines() if line]


def run(command):
  """Runs a line as a shell would."""
  for full, small in SMALLER.items():
    command = command.replace(full, small)
  words = shlex.split(command)
  module = IN_PROCESS.get(words[2]) if words[:2] == ["python", "-m"] else None
  if module is not None:
    assert module.main(words[3:]) == 0, command
    return
  if words[:2] == ["python", "-m"] and words[2] in COMMANDS:
    module, values = COMMANDS[words[2]], flags.FlagValues()
    module.define_flags(values)
    values(words[2:])
    module.main([], values)
    return
  words = [sys.executable if word == "python" else word for word in words]
  done = subprocess.run(["env", *words], capture_output=True, text=True, check=False)
  assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "launch").symlink_to(ROOT / "launch")
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiled in half the time
  lines = commands()
  assert sum("mgen_jax.main" in line for line in lines) == 4
  for line in lines:
    run(line)
  mine = tmp_path / "runs" / "mine"
  assert (tmp_path / "mine.png").stat().st_size > 10_000 and (mine / "report.html").exists()
  steps = [line["step"] for line in metrics.read(str(mine / "t2v")) if "loss" in line]
  assert steps == list(range(1, 9))  # the same run all the time
  assert {line["run"] for line in goodput.read(str(mine / "t2v"))} == {1, 2, 3}
  fine = workdir.Workdir.open(tmp_path / "runs" / "fine")
  made = fine.done_record("mostly_a")["average"]
  assert made == {"sft_a": pytest.approx(2 / 3, abs=1e-5), "sft_b": pytest.approx(1 / 3, abs=1e-5)}
  assert fine.done_record("soup_of_three")["validation_loss"].keys() >= {"runs/mine/t2v"}
  assert len(list((tmp_path / "drawn").glob("*.mp4"))) == 1
