"""The checked-in plans: what `make plans` asks for divides, and what is there is what it wrote."""

import importlib
import json

import pytest

from mgen_jax import config as config_lib
from mgen_jax.planning import topologies
from plans import regenerate

NAMES = [entry.name for entry in regenerate.PLANS]
MADE = sorted(regenerate.HERE.glob("*.json"))


def resolved(entry):
  """The experiment with the entry's changes made as the command makes them."""
  values = importlib.import_module("experiments.t2v_30b").get_config(entry.hardware)
  for change in entry.changes:
    key, _, value = change.partition("=")
    values.update_from_flattened_dict({f"stages.{entry.stage}.{key}": int(value)})
  return config_lib.resolve(values)


@pytest.mark.parametrize("entry", regenerate.PLANS, ids=NAMES)
def test_every_plan_is_of_a_stage_that_divides_over_its_hardware(entry):
  made, topology = resolved(entry), topologies.parse(entry.topology)
  if "--what=sample" in entry.flags:
    assert made.stages[entry.stage].task.sampler.dtype == "bfloat16"
    return
  config_lib.check_devices(made, topology.size, topology.hosts, (entry.stage,))
  if entry.hardware == "h100" and not entry.changes:  # as many GPUs as the paper had
    devices = importlib.import_module("experiments.t2v_30b").devices("h100")
    assert topology.size == devices[entry.stage]


def test_the_names_are_different():
  assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_a_saved_plan_is_that_of_its_entry(path):
  entry = next(entry for entry in regenerate.PLANS if entry.name == path.stem)
  record = json.loads(path.read_text())
  assert (record["stage"], record["topology"]) == (entry.stage, entry.topology)
  assert record["fits"] == (record["memory_gib"]["total"] <= record["memory_gib"]["limit"])
  assert record == regenerate.tidy(record)
  text = path.with_suffix(".txt").read_text()
  assert text.startswith(f"python -m mgen_jax.plan {' '.join(entry.command())}\n")
  assert "/tmp" not in text + path.read_text() and "/home" not in text + path.read_text()


def test_the_index_is_that_of_the_plans():
  assert (regenerate.HERE / "README.md").read_text() == regenerate.index()


def test_figures_are_rounded_and_seconds_of_the_machine_whole():
  record = {"compile_seconds": 12.7, "a": [{"b": 1.23456789, "count": 7}], "fits": True}
  assert regenerate.tidy(record) == {
    "compile_seconds": 13, "a": [{"b": 1.2346, "count": 7}], "fits": True,
  }  # fmt: skip


def test_a_missing_compiler_is_one_sentence(monkeypatch):
  monkeypatch.setattr(regenerate.importlib.util, "find_spec", lambda name: None)
  assert "libtpu (the extra tpu) and XLA for CUDA" in regenerate.missing()
  assert "pip install -e .[tpu,cuda]" in regenerate.missing()
