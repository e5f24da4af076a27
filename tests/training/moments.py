"""Moments at which a run may be killed, and runs of several processes: for tests of resume."""

import os
import socket
import subprocess
import sys

import orbax.checkpoint as ocp

from mgen_jax.training import checksums
from mgen_jax.training.checkpoint import Checkpoints

# In the order of a save; the batch after it is drawn while it is still written.
WITHIN_A_SAVE = (
  *("before a save", "in a save", "before its commit", "before its checksums", "after it"),
)
BATCH = "batch"


def watch(passes, patch=setattr):
  """Calls `passes(name)` whenever a run reaches a moment of WITHIN_A_SAVE, in whatever thread."""

  def around(owner, method, before=None, after=None):
    original = getattr(owner, method)

    def called(*arguments, **options):
      if before:
        passes(before)
      result = original(*arguments, **options)
      if after:
        passes(after)
      return result

    patch(owner, method, called)

  start, writing, commit, checks, end = WITHIN_A_SAVE
  around(Checkpoints, "save", before=start, after=writing)
  # The state's handler ends just before Orbax gives the whole checkpoint its name.
  around(ocp.StandardCheckpointHandler, "finalize", before=commit)
  around(checksums, "write", before=checks, after=end)


def run_hosts(folder, processes, *flags, last=(), devices=1, module="tests.training.host"):
  """Runs a module of the tests as so many processes to their end: [(stderr, exit code)].

  Args:
    folder: of the run.
    processes: how many.
    flags: for all of them.
    last: flags of the last one only.
    devices: of each.
    module: what takes --folder, --port, --processes and --index.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", module, f"--folder={folder}", f"--port={port}"]
  environment = {
    **os.environ,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
  }
  started = []
  for index in range(processes):
    own = last if index == processes - 1 else ()
    started.append(
      subprocess.Popen(
        [*command, *flags, f"--processes={processes}", f"--index={index}", *own],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
      )
    )
  return [(process.communicate(timeout=200)[1], process.returncode) for process in started]
