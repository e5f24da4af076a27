"""The bound of a step, and which link carries what."""

import types

import numpy as np
import pytest

from mgen_jax.planning import roofline, topologies
from mgen_jax.planning.costs import Collective, Costs, Op

GB = 10**9


def torus(shape):
  """Devices with coordinates, in order."""
  return np.array(
    [
      types.SimpleNamespace(coords=list(where), core_on_chip=0, id=i)
      for i, where in enumerate(np.ndindex(*shape))
    ]
  )


def gather(group, size_bytes, kind="all-gather"):
  members = len(group)
  wire = size_bytes * (members - 1) // members * (2 if kind == "all-reduce" else 1)
  return Collective(kind, ("fsdp",), np.array(group), members, size_bytes, wire)


def test_an_axis_of_the_whole_torus_has_two_lanes():
  topology = topologies.parse("v5p:8x8x8")
  links = roofline.Links(topology, torus((8, 8, 8)))
  along_z = gather(range(8), 8 * GB)
  assert links.busy(along_z) == {"ici z": pytest.approx(7 / 200)}


def test_a_part_of_an_axis_is_a_line():
  topology = topologies.parse("v5p:8x8x8")
  links = roofline.Links(topology, torus((8, 8, 8)))
  assert links.busy(gather(range(4), 4 * GB)) == {"ici z": pytest.approx(3 / 100)}


def test_a_plane_carries_on_four_lanes():
  topology = topologies.parse("v5p:8x8x8")
  links = roofline.Links(topology, torus((8, 8, 8)))
  busy = links.busy(gather(range(64), 64 * GB))
  assert busy == {"ici y": pytest.approx(63 / 400), "ici z": pytest.approx(63 / 400)}


def test_gpus_of_a_node_talk_by_nvlink_and_nodes_by_all_their_adapters():
  topology = topologies.parse("h100:4x8")
  links = roofline.Links(topology, torus((4, 8)))
  assert links.busy(gather(range(8), 8 * GB)) == {"nvlink": pytest.approx(7 / 450)}
  everywhere = links.busy(gather(range(32), 32 * GB))
  assert everywhere["network"] == pytest.approx(32 * 3 / 4 / 8 / 50)
  one_of_each = links.busy(gather(range(0, 32, 8), 4 * GB))
  assert one_of_each == {"network": pytest.approx(3 / 50)}


def test_the_slowest_of_compute_memory_and_network_is_the_bound():
  topology = topologies.parse("v5p:2x2x1")
  ops = (
    Op("matmul", "", 2, int(459e12), int(0.1 * 2765e9), 0),
    Op("gather", "", 1, 0, 0, 0, gather(range(2), 100 * GB)),
  )
  found = roofline.roofline(Costs(ops, (), ()), topology, torus((2, 2, 1)), 2 * 4 * 459e12)
  assert found.critical == "compute"
  assert found.bound == pytest.approx(2.0)
  assert found.terms["memory"] == pytest.approx(0.2)
  assert found.terms["network"] == pytest.approx(0.5)
  assert found.mfu_range[1] == pytest.approx(1.0)
  rates = roofline.WORKING_RATES
  assert found.serial == pytest.approx(2 / rates["compute"] + 0.5 / rates["network"])
  assert found.mfu_range[0] == pytest.approx(2.0 / found.serial)


def test_simulated_devices_have_no_speed():
  found = roofline.roofline(Costs((), (), ()), topologies.parse("cpu:4"), torus((4,)), 1.0)
  assert found.bound is None and found.mfu_range is None
