"""Scores by the protocol of Latte's paper: which frames are compared, how they are kept, sums."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.datasets import score
from data_pipelines.datasets.layouts import SourceClip
from mgen_jax.data import marbles, media
from mgen_jax.errors import UserError


def _clip(seed, motion, frames):
  thing = marbles.Object("red", "circle", "large", motion=motion)
  return marbles.render(marbles.Scene(seed, (thing,)), frames, 32, 48, 8.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Real clips of a few lengths, samples that move, and samples that stand still."""
  root = tmp_path_factory.mktemp("score")
  for name in ("real", "moving", "still"):
    (root / name).mkdir()
  for seed in range(6):
    motion = "moves left" if seed % 2 else "moves up"
    media.write_video(root / "real" / f"{seed}.mp4", _clip(seed, motion, 50), 8.0)
    made = _clip(seed + 6, motion, 50)[::3]
    media.write_video(root / "moving" / f"{seed}.mp4", made, 8.0)
    media.write_video(root / "still" / f"{seed}.mp4", np.repeat(made[:1], 16, 0), 8.0)
  media.write_video(root / "real" / "short.mp4", _clip(9, "moves up", 45), 8.0)
  return root


def test_windows_are_those_of_the_protocol(monkeypatch):
  """spec: one window a clip at a random offset, without replacement; short clips are dropped."""
  clips = [SourceClip(f"{n:02d}", (n,)) for n in range(30)]
  lengths = {clip.id: 40 + number for number, clip in enumerate(clips)}
  monkeypatch.setattr(score.windows, "count_frames", lambda clip: lengths[clip.id])
  monkeypatch.setattr(score.windows, "read", lambda clip, frames: (clip.id, frames))
  drawn = list(score.real_windows(clips, interval=3))
  assert sorted(name for name, _ in drawn) == [f"{n:02d}" for n in range(6, 30)]  # 46 or more
  for name, frames in drawn:
    assert len(frames) == 16 and set(np.diff(frames)) == {3}
    assert frames[0] >= 0 and frames[-1] < lengths[name]
  assert len({int(frames[0]) for _, frames in drawn}) > 3
  assert len(list(score.real_windows(clips, interval=3, count=5))) == 5
  assert score.interval_of("taichi_hd") == 6 and score.interval_of("faceforensics") == 3


def test_frames_are_kept_as_jpeg_of_the_middle_square():
  video = _clip(1, "moves left", 2)
  kept = score.as_kept(video, 64)
  file = io.BytesIO()
  square = Image.fromarray(video[1, :, 8:40])
  square.resize((64, 64), Image.Resampling.LANCZOS).save(file, format="JPEG")  # quality 75
  np.testing.assert_array_equal(kept[1], np.asarray(Image.open(file)))


def test_the_inception_score_is_its_formula():
  sure = np.eye(4)[np.arange(40) % 4]
  assert score.inception_score(sure, 10) == pytest.approx((4.0, 0.0))  # one class each, all alike
  assert score.inception_score(np.full((40, 4), 0.25), 10) == pytest.approx((1.0, 0.0))
  rows = np.array([[0.7, 0.3], [0.2, 0.8]])
  mean = rows.mean(0)
  expected = np.exp((rows * np.log(rows / mean)).sum(1).mean())
  assert score.inception_score(rows, 1)[0] == pytest.approx(expected)
  with pytest.raises(UserError, match="give probabilities"):
    score.inception_score(rows * 3, 1)
  with pytest.raises(UserError, match="too few"):
    score.inception_score(rows, 10)


def test_samples_that_move_are_nearer_than_those_that_stand_still(folders):
  def probabilities(videos):
    return np.full((len(videos), 5), 0.2)

  made = [
    score.score("faceforensics", folders / "real", folders / name) for name in ("moving", "still")
  ]
  assert made[0]["frechet"] < made[1]["frechet"]
  assert made[0]["real_clips"] == 6 and made[0]["videos"] == 6
  with pytest.raises(UserError, match="6 videos are too few"):
    score.score(
      "faceforensics", folders / "real", folders / "still", classifier=probabilities, count=6
    )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--features=nowhere:f"], "--features=nowhere:f cannot be imported"),
    (["--features=math:pi"], "is no function: write it like"),
    (["--samples=absent"], "--samples=absent is no folder"),
    (["--name=taichi_hd"], "is not laid out as taichi_hd: expected one folder of frames"),
  ],
)
def test_faults_are_one_sentence(folders, flags, message):
  command = [sys.executable, "-m", "data_pipelines.datasets.score", "--name=faceforensics"]
  command += [f"--source={folders / 'real'}", f"--samples={folders / 'moving'}", *flags]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert "Traceback" not in done.stderr
