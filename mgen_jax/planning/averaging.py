"""Plans an average of models: what each device holds while checkpoints are read tensor by tensor.

The average and one tensor of one model, both sharded over all devices, in fp32; the program that
takes a tensor in is compiled for the largest of them, to see that it needs nothing beside. How many
models are averaged does not matter.
"""

from typing import Any

import jax
import rich.console
import rich.table

from mgen_jax import tasks
from mgen_jax.config import AverageStage, Experiment
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.planning import compile as compile_lib
from mgen_jax.planning.chips import GIB
from mgen_jax.planning.planner import memory_limit
from mgen_jax.planning.topologies import Topology
from mgen_jax.training import parameters
from mgen_jax.training import state as state_lib

_PARTS = {
  "average": "the average (fp32)",
  "tensor": "the largest tensor of a model",
  "temp": "work space of taking it in",
}


def make_plan(
  experiment: Experiment, name: str, topology: Topology, devices: list[jax.Device]
) -> dict[str, Any]:
  """The record of average stage `name` on a topology."""
  stage: AverageStage = experiment.stages[name]
  task = tasks.make(stage.task)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), devices)
  wanted = parameters.flatten(
    state_lib.with_layout(state_lib.param_shapes(task), state_lib.param_shardings(task, mesh))
  )
  size_of = {tensor: compile_lib.tree_bytes(leaf) for tensor, leaf in wanted.items()}
  largest = max(size_of, key=size_of.__getitem__)
  leaf = wanted[largest]
  with mesh_lib.use(mesh):
    compiled = parameters.blend.lower(leaf, leaf, 0.5).compile()
  memory = {
    "average": sum(size_of.values()),
    "tensor": size_of[largest],
    "temp": compiled.memory_analysis().temp_size_in_bytes,
  }
  memory["total"], memory["limit"] = sum(memory.values()), memory_limit(topology)
  count = sum(leaf.size for leaf in wanted.values())
  return {
    "experiment": experiment.name,
    "what": "average",
    "stage": name,
    "models": list(stage.of),
    "parameters": count,
    "tensors": len(wanted),
    "largest": {"name": largest, "shape": list(leaf.shape)},
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": topology.size,
    "hosts": topology.hosts,
    "mesh": dict(mesh.shape),
    "fits": memory["total"] <= memory["limit"],
    "memory_gib": {part: size / GIB for part, size in memory.items()},
    "host_gib": 4 * count / topology.hosts / GIB,
  }


def show(record: dict[str, Any], console: rich.console.Console) -> None:
  """One plan of an average."""
  memory = record["memory_gib"]
  console.rule(f"{record['experiment']} / {record['stage']} on {record['topology']}")
  verdict = "FITS" if record["fits"] else "DOES NOT FIT"
  where = f"{record['devices']} x {record['chip']} on {record['hosts']} hosts"
  what = f"{record['parameters']:,} parameters in {record['tensors']} tensors"
  host = f"while it is saved, {record['host_gib']:.1f} GiB of each host's memory as well"
  lines = (
    f"{where}, an average of {len(record['models'])} models of {what}",
    f"{verdict}: {memory['total']:.2f} of {memory['limit']:.1f} GiB a device; {host}",
    f"the largest tensor is {record['largest']['name']} {tuple(record['largest']['shape'])}",
  )
  for line in lines:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
  table = rich.table.Table(title="Memory of one device", min_width=48)
  table.add_column("")
  table.add_column("GiB", justify="right")
  for part, label in _PARTS.items():
    table.add_row(label, f"{memory[part]:.3f}")
  table.add_row("total", f"{memory['total']:.3f}", style="bold")
  console.print(table)
