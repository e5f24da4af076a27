"""A plan made in a process of its own: a compiler that dies, or takes too long, costs one plan.

What it used of the memory is given back, too, which a compiler does not do while its process lives.
Not here: what is planned (`mgen_jax/plan.py`, which is what runs there).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mgen_jax.errors import UserError
from mgen_jax.planning.chips import GIB
from mgen_jax.planning.compile import Memory
from mgen_jax.planning.planner import Plan


def plan(flags: Sequence[str], seconds: float) -> Plan:
  """Runs `python -m mgen_jax.plan` with flags and reads what it saves.

  Raises:
    UserError: it took longer than `seconds`, or ended with an error: its sentence.
  """
  with tempfile.TemporaryDirectory(prefix="mgen_jax-plan-") as folder:
    out = Path(folder) / "plan.json"
    command = [sys.executable, "-m", "mgen_jax.plan", *flags, f"--out={out}"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
      raise UserError(
        f"it was not compiled within {seconds:.0f} s: give --try_seconds more."
      ) from error
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if line.strip()] or ["no words"]
      sentence = next((line for line in said if line.startswith("error: ")), said[-1])
      raise UserError(f"its process ended with {done.returncode}: {sentence}")
    record = json.loads(out.read_text())
  memory = record["memory_gib"]
  parts = ("parameters", "optimizer", "ema", "frozen", "batch", "temp", "code", "host")
  return Plan(record, Memory(**{part: int(memory[part] * GIB) for part in parts}), None)
