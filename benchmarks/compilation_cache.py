"""What the persistent compilation cache saves: starting a run cold against starting it again.

  python -m benchmarks.compilation_cache
  python -m benchmarks.compilation_cache --rounds=3 --layers=24 --width=384

Each start is a process of its own, as after a preemption: it imports JAX, traces and compiles a
training step of the backbone, and runs it once. The first of a round finds an empty cache folder,
the second the folder that the first has filled. "ratio" is warm over cold.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common

CHILD = "--child"


def child(args: argparse.Namespace) -> None:
  """One start, in this process: prints its seconds as JSON."""
  import jax

  from benchmarks import first_step, transformer_step
  from mgen_jax import compilation_cache
  from mgen_jax.models import backbone

  compilation_cache.enable(args.child)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs, too
  config = dataclasses.replace(
    backbone.SIZES["toy"],
    layers=args.layers,
    width=args.width,
    scan_unroll=args.layers,
    max_positions=transformer_step.grid_of(64),
  )
  began = time.perf_counter()
  found = first_step.first_step(config, 2, 64)
  print(json.dumps({"compile": found["compile"], "step": time.perf_counter() - began}))


def start(args: argparse.Namespace, folder: str) -> dict[str, float]:
  """A start in a new process: seconds "compile_s", "step_s" (from its tracing on) and "all_s", and
  the number of "programs" that are in the cache after it."""
  command = [sys.executable, "-m", "benchmarks.compilation_cache", f"--layers={args.layers}"]
  command += [f"--width={args.width}", f"{CHILD}={folder}"]
  root = Path(__file__).resolve().parent.parent
  paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  began = time.perf_counter()
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"a start failed:\n{done.stderr}")
  seconds = json.loads(done.stdout.splitlines()[-1]) | {"all": time.perf_counter() - began}
  programs = len(list(Path(folder).glob("*-cache")))
  return {f"{key}_s": value for key, value in seconds.items()} | {"programs": programs}


def main(argv: list[str] | None = None) -> common.Row | None:
  """Starts cold and warm in turn."""
  parser = common.parser(__doc__, rounds=1)
  add = parser.add_argument
  add("--layers", type=int, default=12, help="Written out, not scanned (default: 12).")
  add("--width", type=int, default=192, help="Of the model, a multiple of 6 (default: 192).")
  add(CHILD, help="One start, with this cache folder: what this program runs itself.")
  args = parser.parse_args(argv)
  if args.child:
    child(args)
    return None
  found: dict[str, list] = {"cold": [], "warm": []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory(prefix="mgen_jax-cache-") as folder:
      for results in found.values():
        results.append(start(args, folder))
      size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
  rows = []
  for name, results in found.items():
    rows.append({"start": name})
    for key in results[0]:
      rows[-1][key] = statistics.median(result[key] for result in results)
    for key in ("compile", "all"):
      rows[-1][f"{key}_ratio"] = rows[-1][f"{key}_s"] / rows[0][f"{key}_s"]
  return common.report("Persistent compilation cache", rows, args.out, cache_mib=size / 2**20)


if __name__ == "__main__":
  main()
