"""How long a step must take at least, and which of compute, memory and network decides it.

A bound, not a prediction: it lets everything overlap and every unit run at the maker's peak. The
range of the MFU spans from that bound to a step in which nothing overlaps (see `WORKING_RATES`).
"""

import dataclasses
import math

import numpy as np

from mgen_jax.planning.costs import Collective, Costs
from mgen_jax.planning.topologies import Topology

# Shares of the peak that good programs reach for long: matrix products of thousands of rows, a
# streamed memory, a ring of large messages. They make the lower end of the MFU range only.
WORKING_RATES = {"compute": 0.75, "memory": 0.85, "network": 0.8}


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
  """Collectives of one kind along one set of mesh axes, of one step and one device."""

  kind: str
  axes: tuple[str, ...]
  size: int  # devices of a group
  count: int
  bytes: int  # of the arrays that are gathered, reduced or exchanged
  wire: int  # that the device sends
  seconds: float | None  # on its links alone; None: unknown links


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one step. None throughout where the chip's rates are not known (cpu)."""

  terms: dict[str, float]  # "compute", "memory", "network", "host"
  bound: float | None
  critical: str | None
  serial: float | None  # nothing overlaps, at WORKING_RATES
  mfu_range: tuple[float, float] | None
  traffic: tuple[AxisTraffic, ...]


class Links:
  """Seconds that a collective keeps each kind of link busy."""

  def __init__(self, topology: Topology, mesh: np.ndarray):
    """`mesh`: the devices, as in a `jax.sharding.Mesh`; their order numbers them."""
    self._topology = topology
    flat = list(mesh.flat)
    if topology.chip.platform == "tpu":
      self._places = np.array([(*d.coords, d.core_on_chip) for d in flat])
    elif topology.chip.platform == "gpu":
      ids = np.array([d.id for d in flat])
      self._places = (ids // topology.shape[1])[:, None]

  def busy(self, collective: Collective) -> dict[str, float]:
    """Seconds by link: the axes of the torus, or "nvlink" and "network"."""
    platform = self._topology.chip.platform
    if platform == "tpu":
      return self._torus(collective)
    return self._switched(collective) if platform == "gpu" else {}

  def _torus(self, collective: Collective) -> dict[str, float]:
    """All axes of the torus that the group spans carry their part at once."""
    chip = self._topology.chip
    places = self._places[collective.group]
    lanes = {}
    for axis, size in enumerate((*self._topology.shape, *(1,) * (3 - chip.torus))):
      spanned = len(set(places[:, axis]))
      if spanned > 1:
        ring = chip.wraps and spanned == size and size % chip.wraps == 0
        lanes[f"ici {'xyz'[axis]}"] = 2 if ring else 1
    if not lanes:  # the two devices of one chip: their link is taken as six of the others
      return {"die to die": collective.wire / (12 * chip.link)}
    if collective.kind == "collective-permute":
      lanes = dict.fromkeys(lanes, 1)
    seconds = collective.wire / (sum(lanes.values()) * chip.link)
    return dict.fromkeys(lanes, seconds)

  def _switched(self, collective: Collective) -> dict[str, float]:
    """Inside a node by NVLink; between nodes each GPU of the group sends by its own adapter."""
    chip = self._topology.chip
    nodes, inside = np.unique(self._places[collective.group][:, 0], return_counts=True)
    if len(nodes) == 1:
      return {"nvlink": collective.wire / chip.link}
    if collective.kind == "collective-permute":
      return {"network": collective.wire / chip.network}
    twice = 2 if collective.kind == "all-reduce" else 1
    crossing = twice * collective.bytes * (len(nodes) - 1) / len(nodes) / min(inside)
    busy = {"network": crossing / chip.network}
    if min(inside) > 1:
      busy["nvlink"] = collective.wire / chip.link
    return busy


def roofline(costs: Costs, topology: Topology, mesh: np.ndarray, model_flops: float) -> Roofline:
  """The bound of a program's step on a topology.

  Args:
    costs: of the program of one device.
    topology: the hardware.
    mesh: its devices in the order of the mesh.
    model_flops: of one step on all devices, without recomputation.
  """
  links = Links(topology, mesh)
  busy: dict[str, float] = {}
  exposed = 0.0
  traffic: dict[tuple, list] = {}
  for op in costs.ops:
    one = op.collective
    if one is None:
      continue
    seconds = {link: s * op.times for link, s in links.busy(one).items()}
    for link, s in seconds.items():
      busy[link] = busy.get(link, 0.0) + s
    longest = max(seconds.values(), default=0.0)
    exposed += longest
    sums = traffic.setdefault((one.kind, one.axes, one.size), [0, 0, 0, 0.0])
    for i, value in enumerate((op.times, one.bytes * op.times, one.wire * op.times, longest)):
      sums[i] += value
  known = topology.chip.flops > 0
  rows = tuple(
    AxisTraffic(*key, sums[0], sums[1], sums[2], sums[3] if known else None)
    for key, sums in sorted(traffic.items(), key=lambda item: -item[1][2])
  )
  if not known:
    return Roofline({}, None, None, None, None, rows)
  chip = topology.chip
  terms = {
    "compute": costs.flops / chip.flops,
    "memory": costs.bytes / chip.bandwidth,
    "network": max(busy.values(), default=0.0),
    "host": costs.host_bytes / chip.host,
  }
  critical = max(terms, key=terms.__getitem__)
  bound = terms[critical]
  rates = WORKING_RATES
  serial = terms["host"] + exposed / rates["network"]
  for op in costs.ops:
    compute = op.flops / (chip.flops * rates["compute"])
    serial += op.times * max(compute, op.bytes / (chip.bandwidth * rates["memory"]))
  ideal = model_flops / (topology.size * chip.flops)
  mfu = (ideal / serial, ideal / bound) if bound > 0 else None
  if mfu is not None and not all(map(math.isfinite, mfu)):
    mfu = None
  return Roofline(terms, bound, critical, serial, mfu, rows)
