"""Every benchmark runs, at the smallest size, and says what it measured; times are not looked at.

What can be told without a clock is: both sides do the same step, a scan keeps a program short, a
warm start compiles nothing, and memory is what a plan promises.
"""

import dataclasses
import json
import sys

import jax
import pytest

from benchmarks import (
  autoencoder,
  common,
  compilation_cache,
  first_step,
  loop_overhead,
  memory,
  t5_encoder,
  transformer_step,
)
from mgen_jax.encoders import sizes
from mgen_jax.parallel import mesh as mesh_lib
from tests.training import toy

SMALL = ["--tokens=16,32", "--batch=1", "--layers=1", "--width=24", "--heads=2", "--mlp_width=32"]


def test_a_step_is_measured_over_a_sweep_and_drawn(tmp_path):
  flags = ["--no_torch", "--rounds=1", f"--out={tmp_path}/a.json", f"--plot={tmp_path}/a.png"]
  record = transformer_step.main([*SMALL, *flags])
  assert json.loads((tmp_path / "a.json").read_text()) == record
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  assert [row["tokens"] for row in record["rows"]] == [16, 32]
  assert record["rows"][1]["gflop"] > record["rows"][0]["gflop"]
  assert record["machine"]["platform"] == "cpu" and record["parameters"] > 10_000


def test_both_sides_make_the_same_steps():
  pytest.importorskip("torch", reason="needs torch, of the extra test")
  parsed = transformer_step.parse([*SMALL, "--remat=full", "--eager"])
  config = transformer_step.model_for(parsed)
  params = transformer_step.make_params(config)
  inputs = transformer_step.make_inputs(config, 2, 16)
  ours = transformer_step.jax_step(config, params, inputs)
  theirs = transformer_step.torch_step(config, params, inputs, compiled=False)
  losses = [(ours(), theirs()) for _ in range(6)]
  for a, b in losses:
    assert a == pytest.approx(b, rel=2e-4)
  assert losses[-1][0] < losses[0][0]  # the update is a part of the step


def test_sides_that_differ_are_no_comparison(monkeypatch):
  pytest.importorskip("torch", reason="needs torch, of the extra test")
  monkeypatch.setattr(transformer_step, "torch_step", lambda *_, **__: lambda: 9.9)
  with pytest.raises(SystemExit, match="not the same step"):
    transformer_step.main([*SMALL, "--eager", "--rounds=1"])


@pytest.mark.slow
def test_long_clips_are_coded_in_pieces_and_drawn(tmp_path, monkeypatch):
  """In this process, so that nothing but the columns can be told of the memory."""
  here = lambda name, flags: autoencoder.child(name, flags.frames, flags.side)  # noqa: E731
  monkeypatch.setattr(autoencoder, "run_child", here)
  small = {"multipliers": (1,), "space_down": (), "time_down": (0,)}
  monkeypatch.setattr(autoencoder, "PIECES", dataclasses.replace(autoencoder.PIECES, **small))
  monkeypatch.setattr(autoencoder.cpu, "keep_memory", lambda: None)  # is of the whole process
  flags = ["--part=pieces", "--side=16", "--lengths=64", f"--plot={tmp_path}/a.png"]
  record = autoencoder.main([*flags, f"--out={tmp_path}/a.json"])
  assert json.loads((tmp_path / "a.json").read_text()) == record
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  assert [(row["mode"], row["frames"]) for row in record["memory"]] == [
    ("blend", 64), ("exact", 64), ("whole", 64),
  ]  # fmt: skip
  none, blend, exact = record["rows"]
  assert exact["latents"] < 1e-4 and exact["largest"] < 1e-4
  assert none["beside seams"] > blend["beside seams"] > 100 * exact["beside seams"]


def test_encoders_are_compared_on_the_same_features(tmp_path, monkeypatch):
  pytest.importorskip("transformers", reason="needs transformers, of the extra test")
  base = sizes.SIZES["t5-base"].config
  small = dataclasses.replace(base, vocab=99, width=24, heads=2, head_dim=8)
  monkeypatch.setitem(sizes.SIZES, "t5-base", sizes.Size("t5", small))
  flags = ["--layers=2", "--batch=2", "--length=16", "--rounds=1", "--threads=1"]
  record = t5_encoder.main([*flags, f"--out={tmp_path}/a.json"])
  assert json.loads((tmp_path / "a.json").read_text()) == record
  assert [row["side"] for row in record["rows"]] == ["jax", "xla", "torch"]
  assert all(row["max_abs_error"] <= 1e-5 for row in record["rows"])
  monkeypatch.setattr(t5_encoder, "LIMIT", -1.0)
  with pytest.raises(SystemExit, match="not the same encoder"):
    t5_encoder.main(flags)


@pytest.mark.parametrize(("tokens", "grid"), [(16, (1, 4, 4)), (256, (4, 8, 8)), (4096, (16,) * 3)])
def test_a_number_of_tokens_is_a_grid_of_patches(tokens, grid):
  assert transformer_step.grid_of(tokens) == grid


def test_ratios_are_of_medians_with_their_spread():
  above = common.Times([2.0, 2.0, 8.0], [4.0, 4.0, 4.0])
  below = common.Times([1.0, 4.0, 1.0], [2.0, 2.0, 8.0])
  assert common.ratios(above, below) == {"ratio": 2.0, "low": 0.5, "high": 8.0, "cpu_ratio": 2.0}


@pytest.mark.slow
def test_a_scanned_program_does_not_grow_with_its_layers(monkeypatch):
  record = first_step.main(["--layers=1,3", "--width=24", "--tokens=16", "--rounds=1"])
  lines = {(row["layers"], row["how"]): row["stablehlo_lines"] for row in record["rows"]}
  assert lines[3, "unrolled"] > 1.1 * lines[1, "unrolled"]
  assert lines[3, "scanned"] == lines[1, "scanned"]
  assert {"trace_s", "lower_s", "compile_s", "run_s", "ratio"} <= set(record["rows"][0])


@pytest.mark.slow
def test_a_warm_start_adds_no_program_to_the_cache():
  record = compilation_cache.main(["--rounds=1", "--layers=1", "--width=24"])
  cold, warm = record["rows"]
  assert (cold["start"], warm["start"]) == ("cold", "warm")
  assert cold["programs"] > 0 and warm["programs"] == cold["programs"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from Linux")
def test_a_step_takes_the_memory_that_its_plan_says():
  record = memory.main(["--width=288", "--layers=2", "--batch=128", "--remat=none"])
  (row,) = record["rows"]
  assert row["planned_mib"] > 300  # large against what else a process takes
  assert 0.8 < row["ratio"] < 1.25


def test_the_loop_and_the_bare_step_take_the_same_steps(monkeypatch):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  stage = loop_overhead.Stage(toy.ToyTask(), toy.stage(), toy.stream(), mesh)
  orders = []
  monkeypatch.setattr(
    loop_overhead,
    "bare_steps",
    lambda stage, make=loop_overhead.bare_steps: _noting(make(stage), orders),
  )
  (row,) = loop_overhead.rounds_of(stage, 6, 2, 1)
  assert all(row[name] > 0 for name in ("bare", "silent", "logging", "saving"))
  # After four steps that are not timed, what the data of the toy has.
  assert orders == [[toy.BUCKETS[step % 2] for step in range(4, 10)]] * 3


def _noting(run, orders):
  def noted(order):
    orders.append(list(order))
    return run(order)

  return noted
