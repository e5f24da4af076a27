"""Names of hardware: read, refused in one sentence, and compiled for where a compiler is there."""

import importlib.util

import jax
import pytest

from mgen_jax.errors import UserError
from mgen_jax.planning import chips, topologies


@pytest.mark.parametrize(
  ("name", "devices", "hosts"),
  [
    ("v5p:8x8x8", 512, 128),
    ("v5litepod:4x4", 16, 4),
    ("V6E:16x16", 256, 64),
    ("tpu7x:4x4x4", 128, 16),
    ("h100:768x8", 6144, 768),
    ("cpu:8", 8, 1),
  ],
)
def test_a_name_says_how_many_devices_and_hosts(name, devices, hosts):
  topology = topologies.parse(name)
  assert (topology.size, topology.hosts) == (devices, hosts)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5q:8x8x8", ['did you mean "v5p:8x8x8"?', "h100:768x8"]),
    ("cray:8", ["known:", "v5e:16x16"]),
    ("v5p", ["no size", "v5p:8x8x8"]),
    ("v5p:0x8x8", ["no size"]),
    ("v5p:8x8", ["2 sizes", "takes 3"]),
    ("v6e:4x4x4", ["takes 2"]),
    ("h100:8x16", ["16 GPUs in a node"]),
    ("v5e:32x32", ["1024 chips", "256"]),
  ],
)
def test_a_name_that_cannot_be_is_refused_in_one_sentence(name, words):
  with pytest.raises(UserError) as error:
    topologies.parse(name)
  assert all(word in str(error.value) for word in [f'--topology="{name}"', *words])
  assert "\n" not in str(error.value)


def test_simulated_devices_are_those_of_this_process():
  assert topologies.devices(topologies.parse("cpu:4")) == jax.devices()[:4]
  with pytest.raises(UserError, match="needs 4096 simulated devices"):
    topologies.devices(topologies.parse("cpu:4096"))


@pytest.mark.parametrize(
  ("name", "command"),
  [("v5p:2x2x1", "pip install -e .[tpu]"), ("h100:1x8", "pip install -e .[cuda]")],
)
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch, name, command):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError) as error:
    topologies.devices(topologies.parse(name))
  assert command in str(error.value)


def test_every_chip_has_figures_in_the_right_units():
  for name, chip in chips.CHIPS.items():
    assert name in topologies.EXAMPLES
    topologies.parse(topologies.EXAMPLES[name])
    if chip.platform != "cpu":
      assert 10 * chips.GIB < chip.memory < 300 * chips.GIB
      assert 1e14 < chip.flops < 1e16 and 5e11 < chip.bandwidth < 1e13
      assert chip.network < chip.link < chip.bandwidth
