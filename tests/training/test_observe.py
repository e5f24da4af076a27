"""What is watched beside the metrics: compilations, a profile, Weights & Biases."""

import gzip
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from mgen_jax.config import ObserveConfig
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.training import compiles, metrics
from tests.training import toy


def compile_at(when):
  """A stream whose data compiles something of a new shape at some steps."""

  def on_step(step):
    if step in when:
      jax.jit(lambda x: x * step + 1, inline=False)(jnp.zeros(1000 + step)).block_until_ready()

  return toy.stream(on_step=on_step)


def test_a_compilation_after_the_warm_up_is_counted(tmp_path):
  toy.train(tmp_path, data=compile_at({18}), log_every=4)
  found = {line["step"]: line["compiles"] for line in metrics.read(str(tmp_path))}
  assert found[4] >= len(toy.BUCKETS)  # the steps themselves
  assert found[20] >= 1 and found[16] == found[24] == 0


def test_in_strict_mode_it_stops_the_stage_and_names_the_function(tmp_path):
  strict = ObserveConfig(strict_compiles=True)
  with pytest.raises(compiles.RecompilationError) as error:
    toy.train(tmp_path, data=compile_at({18}), log_every=2, observe=strict)
  message = str(error.value)
  assert "lambda" in message and "around step 18" in message and "strict_compiles" in message


def test_strict_mode_allows_the_warm_up(tmp_path):
  """The first interval, the first validation and the first save may compile."""
  strict = ObserveConfig(strict_compiles=True)
  toy.train(tmp_path, data=compile_at({1}), log_every=2, validate_every=8, observe=strict)
  assert metrics.read(str(tmp_path))[-1]["step"] == 24


def test_the_first_validation_has_been_compiled_before_the_first_step(tmp_path):
  def compiled(folder, data):
    toy.train(folder, data=data, log_every=2, steps=10, validate_every=4, checkpoint_every=10)
    lines = metrics.read(str(folder))
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return {line["step"]: line["compiles"] for line in lines if "compiles" in line}, losses

  ahead = compiled(tmp_path / "ahead", toy.stream())
  late = compiled(tmp_path / "late", toy.stream()._replace(validation_sizes=None))
  assert late[0][4] >= 1 and ahead[0][4] == 0
  assert late[1] == ahead[1] and len(ahead[1]) == 3


def test_a_window_of_steps_is_profiled(tmp_path):
  window = ObserveConfig(profile_from=5, profile_steps=2)
  toy.train(tmp_path, steps=10, log_every=1, observe=window)
  (made,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
  assert list(made.glob("*.xplane.pb"))  # what TensorBoard and XProf read
  (trace,) = made.glob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  steps = {
    event["args"]["step_num"]
    for event in events
    if event.get("name") == "train" and "step_num" in event.get("args", {})
  }
  assert steps == {"5", "6"}


@pytest.mark.parametrize("values", [{"profile_from": -1}, {"profile_steps": 0}])
def test_a_window_that_is_none_is_refused(values):
  with pytest.raises(ConfigError, match="profile_from"):
    ObserveConfig(**values)


class FakeWandb(types.ModuleType):
  """Records what a run is told."""

  def __init__(self):
    super().__init__("wandb")
    self.runs = []

  def init(self, **options):
    self.runs.append(types.SimpleNamespace(options=options, lines=[], finished=False))
    run = self.runs[-1]
    run.define_metric = lambda *args, **kwargs: None
    run.log = run.lines.append
    run.finish = lambda: setattr(run, "finished", True)
    return run


def test_wandb_gets_every_line_and_a_continued_run_is_the_same_one(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  observe = ObserveConfig(wandb="films")
  toy.train(tmp_path, steps=8, observe=observe)
  toy.train(tmp_path, steps=12, observe=observe)
  first, second = fake.runs
  assert first.finished and second.finished
  assert first.options == second.options
  assert first.options["project"] == "films" and first.options["resume"] == "allow"
  told = [line["step"] for run in fake.runs for line in run.lines]
  assert told == list(range(1, 13))
  assert [*first.lines, *second.lines] == metrics.read(str(tmp_path))


def test_wandb_offline_keeps_its_files_in_the_stage(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs wandb, of the extra of that name")
  monkeypatch.setenv("WANDB_MODE", "offline")
  toy.train(tmp_path, steps=4, observe=ObserveConfig(wandb="films"))
  assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_without_wandb_it_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
  with pytest.raises(UserError, match=r"wandb is not installed: run pip install -e"):
    toy.train(tmp_path, observe=ObserveConfig(wandb="films"))
