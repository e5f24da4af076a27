"""SLURM on this machine, for tests: `install` makes an srun that starts every task here, with the
variables that SLURM would set, and an scontrol that writes down what it is told."""

import os
import stat
import sys
from pathlib import Path

_SRUN = """\
#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
  command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
started = []
for index in range(tasks):
  step = dict(
    SLURM_STEP_NODELIST="127.0.0.1", SLURM_STEP_TASKS_PER_NODE="1(x%d)" % tasks,
    SLURM_PROCID=str(index), SLURM_LOCALID="0",
  )
  started.append(subprocess.Popen(command, env=os.environ | step))
codes = [process.wait() for process in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """\
#!/bin/sh
echo "$@" >> '{log}'
"""


def install(folder: Path, *, tasks: int, job: int) -> dict[str, str]:
  """Makes the programs in a folder.

  Returns:
    The environment of the batch script of a job with so many tasks.
  """
  folder.mkdir(parents=True, exist_ok=True)
  programs = {
    "srun": _SRUN.format(python=sys.executable),
    "scontrol": _SCONTROL.format(log=folder / "scontrol.log"),
  }
  for name, text in programs.items():
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return {
    **os.environ,
    "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    "SLURM_JOB_ID": str(job),
    "SLURM_NTASKS": str(tasks),
    "SLURM_JOB_NODELIST": "127.0.0.1",
    "PYTHON": sys.executable,
    "PLATFORM": "cpu",
  }
