"""The memory that a plan promises against what the process then takes, on simulated CPU devices.

  python -m benchmarks.memory
  python -m benchmarks.memory --devices=4 --width=768 --batch=64 --remat=none,full --out=memory.json

Each row is one process: it plans the quickstart's training step at a larger width for "cpu:N" as
`mgen_jax.plan` would, then makes the state and runs that step, and reads from the kernel how far
the memory of the process rose (VmHWM, reset after compiling). Simulated devices share the process,
so a plan promises N times what it says of one. "ratio" is measured over planned. Linux only.
"""

import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).resolve().parent.parent
CHILD = "--child"
STAGE, BUCKET = "t2v", "16x64x64"


def experiment(args, remat: str):
  """The quickstart with a wider generator."""
  from mgen_jax import config as config_lib

  path = ROOT / "experiments" / "quickstart.py"
  spec = importlib.util.spec_from_file_location("quickstart", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = config_lib.resolve(module.get_config())
  stage = made.stages[STAGE]
  model = dataclasses.replace(
    stage.task.model, width=args.width, mlp_width=2 * args.width, layers=args.layers, remat=remat
  )
  stage = dataclasses.replace(
    stage,
    task=dataclasses.replace(stage.task, model=model),
    buckets={"b" + BUCKET: config_lib.BucketConfig(batch=args.batch)},
    optimizer=dataclasses.replace(stage.optimizer, name="adamw"),
  )
  return dataclasses.replace(made, stages={**made.stages, STAGE: stage})


def resident(key: str) -> int:
  """Bytes of this process: "VmRSS" now, or "VmHWM", the most since it was last reset."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(key + ":"):
      return 1024 * int(line.split()[1])
  raise SystemExit(f"/proc/self/status has no {key}: this benchmark needs Linux.")


def settle() -> int:
  """Gives back what is free, forgets the peak, and returns what is left: bytes."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")
  return resident("VmRSS")


def child(args) -> None:
  """One row, in this process: prints bytes as JSON."""
  from mgen_jax.planning import topologies

  devices = topologies.devices(topologies.parse(f"cpu:{args.devices}"))  # before JAX starts
  import jax
  import numpy as np

  from mgen_jax import tasks
  from mgen_jax.data.buckets import parse_bucket
  from mgen_jax.parallel import mesh as mesh_lib
  from mgen_jax.planning import planner
  from mgen_jax.training import program as program_lib
  from mgen_jax.training import state as state_lib

  jax.config.update("jax_enable_compilation_cache", False)
  made, bucket = experiment(args, args.child), parse_bucket(BUCKET)
  topology = topologies.parse(f"cpu:{args.devices}")
  plan = planner.make_plan(made, STAGE, bucket, topology, devices, advise=False)

  stage = made.stages[STAGE]
  task, mesh = tasks.make(stage.task), mesh_lib.make_mesh(stage.mesh, devices)
  program = program_lib.make_program(task, stage, mesh, made.seed)
  with mesh_lib.use(mesh):
    shapes = program_lib.batch_shapes(task, {bucket: args.batch}, mesh)[bucket]
    step = program.train_step.lower(
      state_lib.with_layout(program.shapes, program.layout), shapes
    ).compile()
    start = settle()
    state = state_lib.initialise(task, program.optimizer, program.layout, made.seed)
    batch = {
      name: jax.device_put(np.ones(s.shape, s.dtype), s.sharding) for name, s in shapes.items()
    }
    jax.block_until_ready((state, batch))
    holds = settle() - start
    for _ in range(2):
      state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
  loss = float(metrics["loss"])
  if not np.isfinite(loss):
    raise SystemExit(f"the step that was measured gave a loss of {loss}")
  memory = plan.memory
  arguments = memory.parameters + memory.optimizer + memory.ema + memory.batch
  print(
    json.dumps(
      {
        "planned": args.devices * memory.total,
        "planned_state": args.devices * arguments,
        "measured": resident("VmHWM") - start,
        "measured_state": holds,
      }
    )
  )


def main(argv: list[str] | None = None) -> common.Row | None:
  """Measures every remat policy that the flags name."""
  parser = common.parser(__doc__, rounds=1)
  add = parser.add_argument
  add("--devices", type=int, default=1, help="Simulated (default: 1).")
  add("--width", type=int, default=576, help="Of the model, a multiple of 6 (default: 576).")
  add("--layers", type=int, default=6, help="Of the model (default: 6).")
  add("--batch", type=int, default=128, help="Examples of 32 tokens (default: 128).")
  add("--remat", default="none,save_attention,full", help="Policies, with commas.")
  add(CHILD, help="One row, with this policy: what this program runs itself.")
  args = parser.parse_args(argv)
  if args.child:
    child(args)
    return None
  rows = []
  for remat in args.remat.split(","):
    flags = [f"--{n}={getattr(args, n)}" for n in ("devices", "width", "layers", "batch")]
    command = [sys.executable, "-m", "benchmarks.memory", *flags, f"{CHILD}={remat}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
      **os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
      raise SystemExit(f"the process of {remat} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    mib = {f"{key}_mib": value / 2**20 for key, value in found.items()}
    ratio = found["measured"] / found["planned"]
    rows.append({"remat": remat, "devices": args.devices, **mib, "ratio": ratio})
  return common.report("Memory of a training step, planned and measured", rows, args.out)


if __name__ == "__main__":
  main()
