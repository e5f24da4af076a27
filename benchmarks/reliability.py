"""Kills a run at random and moves it from mesh to mesh: what is left is what nothing disturbed.

  python -m benchmarks.reliability --kills=20 --changes=10 --seed=0

The run is the toy of the tests on the real input pipeline (two buckets, mixed), with checkpoints
every few steps. It is killed with SIGKILL at random moments (while a batch is drawn, within a save,
while it is written behind the loop, before its commit, between that and its checksums), half of
the times with two Grain workers, and started again each time; the same with changes of mesh,
devices and processes, where it is asked to stop. Losses and the examples of every step, and the
final state, are compared with those of a run in one piece: equal bit for bit after kills, to 1e-6
after changes of devices. Not here: timings.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

# (processes, devices of each, axes of the mesh): eleven places, ten changes.
PLACES = (
  (1, 1, ()),
  (1, 8, ("fsdp=8",)),
  (2, 1, ()),
  (1, 2, ("replica=2",)),
  (4, 1, ()),
  (1, 4, ("fsdp=2", "context=2")),
  (2, 2, ("fsdp=2", "tensor=2")),
  (1, 8, ("replica=2", "fsdp=4")),
  (4, 2, ()),
  (1, 1, ()),
  (2, 4, ("fsdp=4", "tensor=2")),
)


def main() -> int:
  """Runs both campaigns; the exit code says whether all was equal."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--changes", type=int, default=10, help=f"at most {len(PLACES) - 1}")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="compiled-"))
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PLATFORMS"] = "cpu"
  root = Path(tempfile.mkdtemp(prefix="reliability-"))
  rng = random.Random(args.seed)
  kills = [kill(root / f"workers{workers}", args.kills // 2, workers, rng) for workers in (0, 2)]
  places = change(root / "places", args.changes)
  print(f"\n{sum(kills)} of {2 * (args.kills // 2)} kills: the same run, bit for bit")
  print(f"{places} of {args.changes} changes: the same run, to 1e-6; left in {root}")
  return 0 if sum(kills) == 2 * (args.kills // 2) and places == args.changes else 1


def kill(folder: Path, kills: int, workers: int, rng: random.Random) -> int:
  """Kills one run so many times; how many, if it ends as it should, else 0."""
  from tests.training import moments

  every, steps = 3, 4 * kills + 8
  flags = (f"--steps={steps}", f"--every={every}", f"--workers={workers}")
  done = 0
  for number in range(kills):
    # The next kill lies one to six batches, or one or two saves, after what is saved by now.
    saved = newest(folder)
    name = rng.choice((moments.BATCH, moments.BATCH, *moments.WITHIN_A_SAVE))
    at = saved + rng.randint(1, 6) if name == moments.BATCH else rng.randint(0, 1)
    hit = (f"--signal={int(signal.SIGKILL)}", f"--moment={name}", f"--at={at}")
    ((said, code),) = moments.run_hosts(folder, 1, *flags, last=hit)
    if code != -signal.SIGKILL:
      print(said, file=sys.stderr)
      return 0
    done += 1
    print(
      f"kill {number + 1} ({workers} workers): {name} {at}; step {saved} -> {newest(folder)}",
      flush=True,
    )
  ((said, code),) = moments.run_hosts(folder, 1, *flags)
  whole = folder.with_name(folder.name + "-whole")
  moments.run_hosts(whole, 1, *flags[:2])
  return done if code == 0 and same(folder, whole, steps, every, 0.0) else 0


def change(folder: Path, changes: int) -> int:
  """Moves one run so many times; how many, if it ends as it should, else 0."""
  from tests.training import moments

  every, steps = 5, 4 * (changes + 1)
  flags = (f"--steps={steps}", f"--every={every}")
  for number, (processes, devices, mesh) in enumerate(PLACES[: changes + 1]):
    stop = (f"--signal={int(signal.SIGTERM)}", f"--at={4 * number + 1}") if number < changes else ()
    axes = [f"--mesh={axis}" for axis in mesh]
    ended = moments.run_hosts(folder, processes, *flags, *axes, last=stop, devices=devices)
    if {code for _, code in ended} != {128 + signal.SIGTERM if stop else 0}:
      print(*ended, sep="\n", file=sys.stderr)
      return 0
    print(
      f"place {number}: {processes} processes x {devices} devices {' '.join(mesh) or 'fsdp'}: "
      f"step {newest(folder)}",
      flush=True,
    )
  whole = folder.with_name(folder.name + "-whole")
  moments.run_hosts(whole, 1, *flags)
  return changes if same(folder, whole, steps, every, 1e-6) else 0


def newest(folder: Path) -> int:
  """The step of the newest whole checkpoint; 0: none."""
  steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
  return max(steps, default=0)


def same(folder: Path, whole: Path, steps: int, every: int, tolerance: float) -> bool:
  """Whether two runs drew the same examples and came to the same losses and state; says how far."""
  import jax
  import numpy as np

  from mgen_jax.training import metrics
  from tests.training import toy

  runs = [metrics.read(str(path)) for path in (folder, whole)]
  if any([line["step"] for line in run] != list(range(1, steps + 1)) for run in runs):
    return False
  seen = [[line["seen"] for line in run] for run in runs]
  losses = np.array([[line["loss"] for line in run] for run in runs])
  loss = np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[1]))
  states = [toy.final_state(path, steps=steps, checkpoint_every=every) for path in (folder, whole)]
  state = max(
    float(np.max(np.abs(np.float64(a) - np.float64(b)) / np.maximum(1.0, np.abs(b)), initial=0.0))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True)
  )
  print(
    f"{folder.name}: examples {'equal' if seen[0] == seen[1] else 'DIFFER'}, largest relative "
    f"difference of a loss {loss:.2g}, largest in the state (relative above 1) {state:.2g}",
    flush=True,
  )
  return seen[0] == seen[1] and loss <= tolerance and state <= tolerance


if __name__ == "__main__":
  sys.exit(main())
