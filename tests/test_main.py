"""The whole recipe as a user runs it: started, killed, stopped, spread over devices.

Over hosts: `test_hosts.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mgen_jax.data import media
from mgen_jax.training import metrics

pytestmark = pytest.mark.slow

STAGES = ("ingest", "autoencoder", "encode", "t2i", "t2v", "evaluate")
TRAINED = ("autoencoder", "t2i", "t2v")


def command(workdir, *flags):
  flags = ("--config=tests/tiny.py", f"--workdir={workdir}", *flags)
  return [sys.executable, "-m", "mgen_jax.main", *flags]


def environment(devices=1):
  return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def run(workdir, *flags, devices=1):
  return subprocess.run(
    command(workdir, *flags), env=environment(devices), capture_output=True, text=True, check=False
  )


def losses(workdir, stage):
  lines = metrics.read(str(workdir / stage))
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole")
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_run_ends_with_a_report_and_the_command_to_sample(whole):
  report = json.loads((whole / "report.json").read_text())
  assert {"ingest", "autoencoder", "encode", "t2i", "t2v", "total"} <= set(report["seconds"])
  assert {"colour", "direction", "shape", "prompts"} <= set(report["judge"])
  assert {"colour", "direction", "shape"} <= set(report["chance"])
  assert np.isfinite(report["reconstruction"]["psnr"])
  assert report["peak_memory_gib"] > 0
  page = (whole / "report.html").read_text()
  assert "<video" in page and "http://" not in page and "https://" not in page


def test_the_resolved_config_is_in_the_workdir(whole):
  values = json.loads((whole / "config.json").read_text())
  assert values["name"] == "tiny" and values["stages"]["t2v"]["optimizer"]["b2"] == 0.95


def test_the_same_command_again_does_nothing(whole):
  before = {stage: losses(whole, stage) for stage in TRAINED}
  again = run(whole)
  assert again.returncode == 0 and again.stderr.count("is done") == 6
  assert before == {stage: losses(whole, stage) for stage in TRAINED}


def test_kill_9_at_any_point_and_the_same_command_continues_bit_for_bit(whole, tmp_path):
  # More moments, on a smaller task: tests/training/test_resume.py and benchmarks/reliability.py.
  # Killed at moments of progress and not by the clock: a slow machine gets as far as a fast one.
  rng = np.random.default_rng(0)
  for moment in (
    "ingest/index.jsonl",
    "encode/train",
    "t2v/metrics.jsonl",
  ):
    process = subprocess.Popen(
      command(tmp_path), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / moment).exists():
      time.sleep(0.01)
    time.sleep(0.3 * rng.random())
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was still at it
  done = run(tmp_path)
  assert done.returncode == 0, done.stderr
  for stage in TRAINED:
    assert losses(tmp_path, stage) == losses(whole, stage)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_its_own_code(whole, tmp_path, signum):
  process = subprocess.Popen(
    command(tmp_path, "--config.stages.autoencoder.steps=100000"),
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  log = tmp_path / "autoencoder" / "metrics.jsonl"
  deadline = time.time() + 120
  while time.time() < deadline and process.poll() is None:
    if log.exists() and log.read_text().count("\n") >= 2:
      break
    time.sleep(0.05)
  process.send_signal(signum)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + signum
  assert "everything is saved" in stderr and "Traceback" not in stderr
  done = run(tmp_path, "--stage=autoencoder")
  assert done.returncode == 0, done.stderr
  stopped = losses(tmp_path, "autoencoder")
  assert all(stopped[step] == loss for step, loss in losses(whole, "autoencoder").items())


def test_eight_devices_give_the_same_losses(whole, tmp_path):
  """Each stage from the same start: what rounds apart in one, Adam makes larger in those after."""
  for first, trained in (("autoencoder", ("autoencoder",)), ("t2i", ("t2i", "t2v"))):
    workdir = shutil.copytree(whole, tmp_path / first)
    for stage in STAGES[STAGES.index(first) :]:
      shutil.rmtree(workdir / stage)
    done = run(workdir, devices=8)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is done") == STAGES.index(first)
    for stage in trained:
      expected, found = losses(whole, stage), losses(workdir, stage)
      assert found.keys() == expected.keys()
      np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


def test_a_folder_of_ones_own_videos_takes_the_same_path(tmp_path):
  """Other sizes, rates, containers and codecs, two ways of captions, a broken file among them."""
  folder = tmp_path / "mine"
  (folder / "more").mkdir(parents=True)
  rng = np.random.default_rng(0)
  kinds = ((".mp4", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx-vp9"))
  lines = []
  for index in range(18):
    height, width = ((48, 48), (64, 66), (40, 60))[index % 3]
    video = np.full((12, height, width, 3), rng.integers(0, 255, 3), np.uint8)
    video[:, 8:24, 8 + index : 24 + index] = rng.integers(0, 255, 3)
    suffix, codec = kinds[index // 3 % 3]
    path = folder / ("more" if index % 2 else ".") / f"clip{index}{suffix}"
    media.write_video(path, video, (12.0, 25.0, 30.0)[index % 3], codec=codec)
    if index < 9:
      lines.append({"file": str(path.relative_to(folder)), "caption": f"number {index}"})
    else:
      path.with_suffix(".txt").write_text(f"number {index}")
  (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "broken.mp4").write_bytes(b"no video at all")
  (folder / "broken.txt").write_text("a broken file")
  done = run(tmp_path / "run", f"--config.data.videos={folder}")
  assert done.returncode == 0, done.stderr
  assert "skipped broken.mp4" in done.stderr and "1 of 19 files left out" in done.stderr
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  assert report["judge"] is None and np.isfinite(report["reconstruction"]["psnr"])


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.stages.t2v.optimzer.lr=1"], ["optimzer", '"--config.stages.t2v.optimizer.lr"']),
    (["--config.stages.t2v.steps=many"], ["--config.stages.t2v.steps", "many"]),
    (["--config.stages.t2v.buckets.b4x32x32.batch=9"], ["b4x32x32.batch is 9", "set it to 8"]),
    (["--config.data.videos=EMPTY"], ["EMPTY", "no videos or images"]),
    (["--stage=t2w"], ["--stage=t2w", '"t2v"']),
    (["--stage=t2v"], ["stage t2v needs stage encode"]),
    (["--workdir=USED"], ["USED", "name an empty folder"]),
  ],
)
def test_bad_input_is_one_sentence_and_costs_nothing(tmp_path, flags, words):
  (tmp_path / "EMPTY").mkdir()
  (tmp_path / "USED").mkdir()
  (tmp_path / "USED" / "thesis.tex").write_text("precious")
  flags = [
    f.replace("EMPTY", f"{tmp_path}/EMPTY").replace("USED", f"{tmp_path}/USED") for f in flags
  ]
  devices = 8 if "batch" in flags[0] else 1
  done = run(tmp_path / "run", *flags, devices=devices)
  assert done.returncode == 2
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
  assert all(word in said[0] for word in words), said
  assert "compiled" not in done.stderr


def test_a_workdir_of_another_experiment_is_refused(whole):
  values = json.loads((whole / "config.json").read_text())
  other = whole / "config.json"
  text = other.read_text()
  other.write_text(json.dumps({**values, "name": "else"}))
  try:
    done = run(whole)
  finally:
    other.write_text(text)
  assert done.returncode == 2 and 'belongs to the experiment "else"' in done.stderr
