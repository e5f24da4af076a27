"""Kept clips become a folder that training reads, and a report that people read."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import export as exporting
from data_pipelines.curate import funnel, report
from data_pipelines.curate import run as running
from data_pipelines.curate.config import ExportConfig
from data_pipelines.curate.decode import Guard
from data_pipelines.curate.stage import ROWS
from mgen_jax.data import ingest, media
from mgen_jax.data.ingest import CAPTIONS_NAME
from tests.data_pipelines.curate import small
from tests.data_pipelines.curate.test_run import Here, curate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  videos = small.write_videos(folder / "videos", 10)
  run, _, table = curate(small.recipe(), videos, folder / "out")
  counts = exporting.export(run, table, Here(), ExportConfig(), limits=small.LIMITS)
  return run, table, counts


def test_training_reads_what_is_exported(made):
  run, table, counts = made
  folder = run.store.root / exporting.FOLDER
  kept = {row["clip_id"]: row for row in table.to_pylist() if row["keep"]}
  assert counts["clips"] == len(kept) and counts["failed"] == 0
  index = ingest.scan(folder)
  assert {Path(clip.path).stem for clip in index.clips} == set(kept)
  for clip in index.clips:
    row = kept[Path(clip.path).stem]
    assert clip.caption == row["caption"]
    assert (clip.width, clip.height, clip.fps, clip.frames) == (64, 48, 8.0, 4)
    light = media.read_video(folder / clip.path).mean()
    # Its own half of the source, not the other; luma is stored from 16 to 235.
    assert abs(light - (row["light"] - 16) * 255 / 219) < 4
  stored = {row["clip_id"]: row for row in _index(run).to_pylist()}
  assert stored.keys() == kept.keys()
  assert all(stored[clip]["source_id"] == kept[clip]["source_id"] for clip in kept)


def _index(run):
  return running.read_table(run.store.root / exporting.FOLDER / exporting.INDEX_NAME)


def test_the_export_follows_the_selection_and_cuts_only_what_is_new(made):
  run, table, _ = made
  folder = run.store.root / exporting.FOLDER / "clips"
  before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  again = exporting.export(run, table, Here(), ExportConfig(), limits=small.LIMITS)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  dropped = sorted(before)[0]
  keep = [
    k and f"{clip}.mp4" != dropped
    for k, clip in zip(table["keep"].to_pylist(), table["clip_id"].to_pylist(), strict=True)
  ]
  fewer = table.set_column(table.column_names.index("keep"), "keep", [keep])
  counts = exporting.export(run, fewer, Here(), ExportConfig(), limits=small.LIMITS)
  assert counts["clips"] == again["clips"] - 1
  left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert left == {name: time for name, time in before.items() if name != dropped}
  exporting.export(run, table, Here(), ExportConfig(), limits=small.LIMITS)
  assert {path.name for path in folder.iterdir()} == set(before)


def test_a_clip_that_was_altered_is_named(made):
  run, table, _ = made
  assert exporting.faults(run) == []
  path = next((run.store.root / exporting.FOLDER / "clips").iterdir())
  data = path.read_bytes()
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  assert [path.name in fault for fault in exporting.faults(run)] == [True]
  path.write_bytes(data[:-5])
  exporting.export(run, table, Here(), ExportConfig(), limits=small.LIMITS)
  assert path.read_bytes() == data  # cut again, and the same


def test_a_cut_keeps_rate_and_sound(tmp_path):
  """Frames by their time and the sound that belongs to them."""
  fps, seconds = 10.0, 4
  frames = np.zeros((int(fps) * seconds, 32, 48, 3), np.uint8)
  frames += (np.arange(len(frames)) * 5)[:, None, None, None].astype(np.uint8)
  time = np.arange(48_000 * seconds) / 48_000
  sound = np.where(time < 2, 0.0, 0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
  media.write_video(tmp_path / "a.mp4", frames, fps, audio=sound, crf=4)
  clip = {"start": 2.0, "end": 3.5, "fps": fps, "has_audio": True}
  with Guard(small.LIMITS) as guard:
    target = str(tmp_path / "b.mp4")
    arguments = (str(tmp_path / "a.mp4"), target, clip, ExportConfig(crf=4), small.LIMITS)
    assert guard.call(exporting.cut, *arguments) == 15
  found = media.read_video(tmp_path / "b.mp4")
  wanted = frames[20:35]
  assert np.abs(found.astype(int) - wanted).max() <= 4
  heard = media.read_audio(tmp_path / "b.mp4", 48_000)
  assert abs(len(heard) / 48_000 - 1.5) < 0.1
  assert np.abs(heard[2400:-4800]).max() > 0.3


def test_a_step_that_takes_more_than_half_is_named(made):
  run, table, _ = made
  assert funnel.steep(run.recipe, funnel.rows(run.recipe, table)) == []
  dark = dataclasses.replace(run, recipe=small.recipe(light=small.Light(darkest=160.0)))
  rows = funnel.rows(dark.recipe, running.decide(dark))
  (sentence,) = funnel.steep(dark.recipe, rows)
  left = {row["key"]: row["left"] for row in rows}
  assert sentence == (
    f'"aesthetics" leaves {left["aesthetics"]} of {left["scene"]}; its settings are those of'
    " --config.light"
  )


def test_the_funnel_has_the_papers_rows_and_loses_nobody(made):
  run, table, _ = made
  rows = funnel.rows(run.recipe, table)
  keys = [row["key"] for row in rows]
  assert [key for key in keys if key in ROWS] == list(ROWS)
  assert keys[0] == "pool" and rows[0]["left"] == table.num_rows
  assert all(a["left"] - b["removed"] == b["left"] for a, b in itertools.pairwise(rows))
  assert rows[-1]["left"] == sum(table["keep"].to_pylist())
  by_key = {row["key"]: row for row in rows}
  assert by_key["readable"]["removed"] == 1
  assert by_key["aesthetics"]["removed"] == table["first_fail"].to_pylist().count("dark")
  assert by_key["duplicates"]["removed"] == table["first_fail"].to_pylist().count("twin")
  assert by_key["aesthetics"]["threshold"] == "light ≥ 40"


def test_the_report_is_one_page_that_fetches_nothing(made):
  run, table, _ = made
  costs = running.costs(run)
  root, limits = run.store.root, small.LIMITS
  found = report.write(root, run.name, run.recipe, table, costs, run.input_root, limits)
  page = (root / "report.html").read_text()
  assert "http" not in page.replace("http-equiv", "")
  for word in ("no duplicates", "light ≥ 40", "probe_failed", "data:image/jpeg;base64,", "dark"):
    assert word in page
  assert page.count("<svg") == len(found["histograms"]) == 5
  stored = json.loads((root / "report.json").read_text())
  assert stored["funnel"] == found["funnel"]
  assert stored["costs"]["stages"]["light"]["cpu_s"] > 0 and stored["costs"]["frames"] > 0
  plot = next(h for h in found["histograms"] if h["column"] == "light")
  assert sum(plot["kept"]) == found["kept"]
  assert sum(plot["kept"]) + sum(plot["rejected"]) == plot["scored"]


def test_a_report_of_nothing_kept_is_still_a_report(made, tmp_path):
  run, _, _ = made
  strict = small.recipe(light=small.Light(darkest=300.0))
  table = running.decide(dataclasses.replace(run, recipe=strict))
  assert not any(table["keep"].to_pylist())
  costs = running.costs(run)
  report.write(tmp_path, "small", strict, table, costs, run.input_root, small.LIMITS)
  assert "No clip has a bucket" in (tmp_path / "report.html").read_text()


def test_captions_name_files_inside_the_export(made):
  run, _, _ = made
  lines = (run.store.root / exporting.FOLDER / CAPTIONS_NAME).read_text().splitlines()
  assert all(json.loads(line)["file"].startswith("clips/") for line in lines)
