"""What people see of a run: the dashboard and the picture, from the files that a run leaves."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mgen_jax import config, plot, watch
from mgen_jax.errors import UserError
from tests import least


def line(step, **more):
  return {
    "step": step, "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0, "mfu": 0.41, "data_wait": 0.02,
    "examples_per_second": 30.0, "step_seconds": 0.5, "step_seconds/4x32x32": 0.75,
    "peak_memory_gib": 3.5, "compiles": 0, "goodput": 0.8, **more,
  }  # fmt: skip


def ledger(*runs):
  return [
    {"run": number, "time": began, "step": step, "seconds": seconds}
    for number, (began, points) in enumerate(runs, 1)
    for step, seconds in points
  ]


@pytest.fixture
def run_folder(tmp_path):
  """A run whose first stages are done and whose t2v, restarted once, is at step 3 of 4."""
  folder = tmp_path / "run"
  folder.mkdir()
  made = config.resolve(least.get_config())
  (folder / "config.json").write_text(config.to_json(made))
  for stage in ("ingest", "autoencoder", "encode"):
    (folder / stage).mkdir()
    (folder / stage / "done.json").write_text(json.dumps({"seconds": 90.0, "steps": 4}))
  write_stage(folder / "t2v", [line(1, compiles=9), line(2), line(3), line(3, loss=float("nan"))])
  return folder


def write_stage(folder, lines):
  folder.mkdir(parents=True, exist_ok=True)
  validation = {"step": 2, "validation_loss": 1.25}
  text = (
    "".join(json.dumps(x) + "\n" for x in [*lines, validation]) + '{"step": 5, "lo'
  )  # cut short
  (folder / "metrics.jsonl").write_text(text)
  first = (1000.0, [(0, {}), (2, {"step": 60.0, "compile": 20.0})])
  second = (1090.0, [(1, {}), (3, {"step": 60.0, "data": 10.0})])
  records = ledger(first, second)
  (folder / "goodput.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))


def shown(folder, now, width=120):
  screen = Console(width=width, record=True, file=io.StringIO())
  screen.print(watch.draw(folder, watch.look(folder, now)))
  return screen.export_text()


def test_a_terminal_of_eighty_columns_holds_every_figure(run_folder):
  now = (run_folder / "t2v").stat().st_mtime
  wide, narrow = shown(run_folder, now).splitlines(), shown(run_folder, now, 80).splitlines()
  (line,) = (line for line in narrow if line.split()[:1] == ["t2v"])
  (full,) = (line for line in wide if line.split()[:1] == ["t2v"])
  assert line.split()[-4:] == full.split()[-4:] and "41.0%" in line
  assert not any("…" in row for row in narrow[: narrow.index(line)])


def test_the_dashboard_shows_what_each_stage_does(run_folder):
  now = (run_folder / "t2v").stat().st_mtime
  views = {view.name: view for view in watch.look(run_folder, now)}
  assert [views[name].state for name in views] == ["done", "done", "done", "running", "waiting"]
  text = shown(run_folder, now)
  rows = {row.split()[0]: row for row in text.splitlines() if row.strip()}
  assert "90 s" in rows["ingest"] and "done" in rows["ingest"]
  assert "3/4" not in rows["autoencoder"] and "41.0%" in rows["t2v"]
  # 120 of 160 s were steps, 30 of which a restart had to do again; 10 s passed between the runs.
  assert "56%" in rows["t2v"]
  for words in ("lost 19%", "down 6%", "4x32x32 0.75 s", "3.5 GiB", "after the first line 0"):
    assert words in text, words


def test_a_stage_that_says_nothing_for_long_is_marked(run_folder):
  now = (run_folder / "t2v" / "metrics.jsonl").stat().st_mtime
  assert "nothing for 10 min" in shown(run_folder, now + 600)


def test_once_draws_and_ends(run_folder, capsys):
  assert watch.main([str(run_folder), "--once"]) == 0
  assert "t2v" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
  assert watch.main([str(tmp_path), "--once"]) == 2
  assert plot.main([str(tmp_path)]) == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 2 and all(error.startswith("error: ") for error in errors)
  assert watch.main([str(tmp_path), "--every=-1"]) == 2
  assert "--every=-1 must be more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("values", "bars"), [([1, 2, 3], "▁▅█"), ([5, 5], "▁▁"), ([float("nan")], ""), ([], "")]
)
def test_a_sparkline(values, bars):
  assert watch.sparkline(values) == bars


def test_several_runs_are_one_picture(run_folder, tmp_path):
  write_stage(tmp_path / "other" / "t2v", [line(s) for s in range(1, 40)])
  out = tmp_path / "pictures" / "both.png"
  flags = [f"--out={out}", "--metrics=loss,validation_loss,step_seconds/4x32x32", "--smooth=0.9"]
  assert plot.main([str(run_folder), str(tmp_path / "other" / "t2v"), *flags]) == 0
  assert np.asarray(Image.open(out).convert("L")).std() > 10
  figure = plot.draw(plot.gather([run_folder, tmp_path / "other" / "t2v"], None), ["loss"])
  losses, times = (axis for axis in figure.axes if axis.get_visible())
  assert [curve.get_label() for curve in losses.lines] == ["run/t2v", "other/t2v"]
  assert losses.lines[0].get_ydata().tolist() == [2.0, 1.0, 2 / 3]  # without what is not finite
  shares = [sum(bar.get_width() for bar in bars) for bars in zip(*times.containers, strict=True)]
  np.testing.assert_allclose(shares, 1.0)


def test_hours_are_those_of_the_steps(run_folder):
  (curve,) = plot.gather([run_folder], "t2v")
  xs, _ = plot.points(curve, "loss", "hours")
  np.testing.assert_allclose(xs, np.asarray([1, 2, 3]) * 0.5 / 3600)


def test_an_average_has_no_pull_of_its_start():
  np.testing.assert_allclose(plot.smoothed(np.full(5, 3.0), 0.9), 3.0)
  assert abs(plot.smoothed(np.asarray([0.0, 1.0] * 50), 0.95)[-1] - 0.5) < 0.03


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--metrics=lss"], "no run has lss: choose --metrics from"),
    (["--stage=t2w"], "has no metrics of stage t2w"),
    (["--smooth=1"], "--smooth=1.0 must lie in"),
    (["--out=a.jpeg"], "--out=a.jpeg must end in"),
    (["--out=/dev/null/a.png"], "--out=/dev/null/a.png cannot be made"),
  ],
)
def test_a_picture_that_cannot_be_drawn_is_one_sentence(run_folder, capsys, flags, words):
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(run_folder)
    assert plot.main([str(run_folder), *flags]) == 2
  assert words in capsys.readouterr().err


def test_a_run_that_has_not_logged_yet_can_be_watched(run_folder):
  (run_folder / "t2v" / "metrics.jsonl").unlink()
  (run_folder / "t2v" / "goodput.jsonl").unlink()
  assert "0/4" in shown(run_folder, (run_folder / "t2v").stat().st_mtime)
  with pytest.raises(UserError, match="has no metrics"):
    plot.gather([run_folder], None)


def test_a_line_that_a_crash_has_spoiled_is_named(run_folder, tmp_path, capsys):
  path = next(run_folder.glob("*/metrics.jsonl"))
  lines = path.read_bytes().splitlines(keepends=True)
  for spoiled in (b"\0\0\0\n", b"[1]\n", b'{"step": \n', b"\xff\n"):
    path.write_bytes(b"".join([lines[0], spoiled, *lines[1:]]))
    assert watch.main([str(run_folder), "--once"]) == 2
    assert plot.main([str(path.parent), f"--out={tmp_path}/a.png"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(f"line 2 of {path} cannot be read" in line for line in said)
  path.write_bytes(b"".join(lines) + b'{"step": 99, "lo')  # being written
  assert watch.main([str(run_folder), "--once"]) == 0
