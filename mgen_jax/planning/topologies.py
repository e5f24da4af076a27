"""Names of hardware ("v5p:8x8x8", "h100:768x8", "cpu:8") and the devices they stand for.

The devices can be compiled for and nothing else: they exist only in the compiler. Not here: what a
chip can do (`chips.py`).
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies as jax_topologies

from mgen_jax.errors import UserError, suggest
from mgen_jax.planning import chips
from mgen_jax.planning.chips import Chip

EXAMPLES = {
  "v5e": "v5e:16x16",
  "v5p": "v5p:8x8x8",
  "v6e": "v6e:16x16",
  "tpu7x": "tpu7x:4x4x4",
  "h100": "h100:768x8",
  "h200": "h200:16x8",
  "b200": "b200:16x8",
  "cpu": "cpu:8",
}
_ALIASES = {"v5litepod": "v5e", "ironwood": "tpu7x", "v7x": "tpu7x", "trillium": "v6e"}
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of a kind, and how they are connected.

  `shape`: chips along the axes of the torus (TPU), nodes x GPUs of a node, or a count (CPU).
  """

  name: str
  kind: str  # a key of chips.CHIPS
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return chips.CHIPS[self.kind]

  @property
  def size(self) -> int:
    """Number of JAX devices."""
    return math.prod(self.shape) * self.chip.devices

  @property
  def hosts(self) -> int:
    """Number of processes: 4 chips each (TPU), one node each (GPU)."""
    if self.chip.platform == "tpu":
      return max(1, math.prod(self.shape) // 4)
    return self.shape[0] if self.chip.platform == "gpu" else 1


def parse(text: str) -> Topology:
  """Reads "v5p:8x8x8" (chips along the torus), "h100:768x8" (nodes x GPUs), "cpu:8".

  Raises:
    UserError: an unknown kind or a shape that it cannot have.
  """
  kind, _, sizes = text.strip().lower().partition(":")
  kind = _ALIASES.get(kind, kind)
  known = f"known: {', '.join(EXAMPLES.values())}"
  if kind not in chips.CHIPS:
    near = suggest(kind, list(EXAMPLES))
    hint = f'did you mean "{near.split(chr(34))[1]}:{sizes}"? ' if near.startswith("did") else ""
    raise UserError(f'--topology="{text}" is not known: {hint}{known}.')
  chip = chips.CHIPS[kind]
  example = EXAMPLES[kind]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
    raise UserError(f'--topology="{text}" has no size that can be read: write it like "{example}".')
  shape = tuple(int(size) for size in sizes.split("x"))
  rank = {"tpu": chip.torus, "gpu": 2, "cpu": 1}[chip.platform]
  if len(shape) != rank:
    raise UserError(
      f'--topology="{text}" has {len(shape)} sizes, and {kind} takes {rank}: write it like '
      f'"{example}".'
    )
  if chip.platform == "gpu" and shape[1] > 8:
    raise UserError(
      f'--topology="{text}" has {shape[1]} GPUs in a node: the sizes are nodes x GPUs of a node '
      f'(1 to 8), like "{example}".'
    )
  if chip.largest and math.prod(shape) > chip.largest:
    raise UserError(
      f'--topology="{text}" has {math.prod(shape)} chips, and the largest slice of {kind} has '
      f"{chip.largest}: choose a smaller one."
    )
  return Topology(f"{kind}:{sizes}", kind, shape)


def devices(topology: Topology) -> list[jax.Device]:
  """The devices, in JAX's order.

  Raises:
    UserError: the packages to compile for them are missing, or the shape does not exist.
  """
  platform = topology.chip.platform
  if platform == "tpu":
    return _tpu(topology)
  return _gpu(topology) if platform == "gpu" else _cpu(topology.size)


def _tpu(topology: Topology) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"{topology.name} needs the TPU compiler, libtpu, which is not installed (no TPU is needed): "
      "pip install -e .[tpu]"
    )
  # libtpu would else ask a metadata server who we are, and wait for the answer; and it lets one
  # process at a time in, for the sake of a TPU that nobody uses here.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
  try:
    return list(jax_topologies.get_topology_desc(name, "tpu").devices)
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error):
      raise
    raise UserError(
      f'--topology="{topology.name}" is not a shape that {topology.chip.name} comes in '
      f"({_first_line(error)}): use multiples of 2 for the first two sizes, like "
      f'"{EXAMPLES[topology.kind]}".'
    ) from error


def _gpu(topology: Topology) -> list[jax.Device]:
  found = [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if _installed(name)]
  if not found:
    raise UserError(
      f"{topology.name} needs XLA's CUDA compiler, which is not installed (no GPU is needed, 5 GB "
      "of packages are): pip install -e .[cuda]"
    )
  nodes, gpus = topology.shape
  # partitions x hosts of a partition x devices of a host
  return list(
    jax_topologies.get_topology_desc(
      topology.name,
      "cuda",
      target_config=chips.gpu_target_config(topology.kind),
      topology=f"1x{nodes}x{gpus}",
    ).devices
  )


def _cpu(count: int) -> list[jax.Device]:
  # Read when the backend starts; where it runs already (tests), it has what it has.
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_COUNT)]
  before = os.environ.get("XLA_FLAGS")
  os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT}={count}"])
  try:
    found = jax.devices("cpu")
  finally:
    if before is None:
      del os.environ["XLA_FLAGS"]
    else:
      os.environ["XLA_FLAGS"] = before
  if len(found) < count:
    raise UserError(
      f"cpu:{count} needs {count} simulated devices and this process has {len(found)}: start it "
      f"anew, or with XLA_FLAGS={_DEVICE_COUNT}={count}."
    )
  return found[:count]


def _installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
