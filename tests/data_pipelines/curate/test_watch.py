"""One pass over a file: the clips it finds are the split's, and every stage sees what it should."""

import dataclasses
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("cv2")

from data_pipelines.curate.decode import Limits
from data_pipelines.curate.stage import FrameStage
from data_pipelines.curate.stages.camera import Camera
from data_pipelines.curate.stages.motion import Motion
from data_pipelines.curate.stages.probe import Probe
from data_pipelines.curate.stages.scan import Scan
from data_pipelines.curate.stages.split import Split
from data_pipelines.curate.stages.static import Static
from data_pipelines.curate.watch import watch
from mgen_jax.data.media import write_video
from tests.data_pipelines.curate.watching import moving, texture


@dataclasses.dataclass(frozen=True)
class Seen(FrameStage):
  """Says which frames it was given."""

  name: ClassVar[str] = "seen"
  columns: ClassVar[dict] = {"seen": pa.list_(pa.float64()), "ends": pa.float64()}

  def observer(self, row):
    return _Seen(row)


@dataclasses.dataclass(frozen=True)
class Sampled(Seen):
  name: ClassVar[str] = "sampled"
  rate: ClassVar[float] = 2.0


@dataclasses.dataclass(frozen=True)
class Live(Seen):
  name: ClassVar[str] = "live"
  live: ClassVar[bool] = True


class _Seen:
  def __init__(self, row):
    self.row, self.seen = row, []

  def frame(self, frame):
    self.seen.append((frame.index, round(frame.time, 6), frame.pts, int(frame.luma.sum())))

  def scores(self):
    return {"seen": self.seen, "ends": self.row.get("end")}


def film(path, lengths, fps=8, size=(48, 64)):
  """Shots of a pattern that moves, so many frames each, another pattern in each shot."""
  shots = []
  for seed, length in enumerate(lengths):
    large = texture(seed, size[0], size[1] + length) // (1 + seed % 2)
    shots += [large[:, t : t + size[1]] for t in range(length)]
  write_video(path, np.stack(shots), fps)


def known(path, name="a"):
  return {"source_id": name} | Probe().score(str(path))


def one_pass(path, split, stages, name="a"):
  row = known(path, name)
  return row, watch(str(path), row, (Scan(),), split, None, stages, Limits())


@pytest.mark.parametrize("seed", range(5))
def test_clips_are_seen_while_they_pass(seed, tmp_path):
  rng = np.random.default_rng(seed)
  path = tmp_path / "film.mp4"
  lengths = [int(n) for n in rng.integers(10, 160, 5)]
  film(path, lengths)
  split = Split(head=0.5, longest=4.0, shortest=2.0, clips_per_source=2, seed=seed)
  stages = (Motion(), Static(), Camera())
  row, found = one_pass(path, split, stages)
  # It was one decode, the clips are those that the split names, ...
  assert found.frames == sum(lengths)
  expected = split.clips({**row, **found.source})
  assert [{k: clip[k] for k in expected[0]} for clip in found.clips] == expected
  # ... inside one scene each ...
  edges = np.cumsum([0, *lengths]) / 8
  for clip in expected:
    assert clip["clip_seconds"] + 0.05 >= 2
    assert clip["clip_seconds"] <= 4
    scene = np.searchsorted(edges, clip["start"] + 1e-6) - 1
    assert clip["end"] <= edges[scene + 1] + 1e-6
    assert clip["start"] >= 0.5
  # ... and a look at the clips alone gives the same scores.
  again = watch(str(path), row, (), None, expected, stages, Limits())
  assert again.clips == found.clips


def test_stages_get_the_frames_they_ask_for_in_one_pass_or_two(tmp_path):
  path = tmp_path / "film.mp4"
  film(path, [60, 60])
  split = Split(head=0.0, longest=3.0, shortest=2.0)
  stages = (Sampled(), Live(), Seen())
  for stage in stages:
    row, found = one_pass(path, split, (stage,))
    clips = split.clips({**row, **found.source})
    again = watch(str(path), row, (), None, clips, (stage,), Limits())
    for first, second, clip in zip(found.clips, again.clips, clips, strict=True):
      assert first["seen"] == second["seen"]
      times = [time for _, time, _, _ in first["seen"]]
      if stage.rate:
        assert times == [0, 0.5, 1, 1.5, 2, 2.5]
        assert [index for index, *_ in first["seen"]] == [0, 4, 8, 12, 16, 20]
      else:
        assert len(times) == 24
      assert first["ends"] == (None if stage.live else clip["end"])
      assert first["seen"][0][2] == clip["start_pts"]
    # Only a stage that is neither costs a second look.
    extra = sum(len(clip["seen"]) for clip in found.clips)
    assert found.frames == 120 + (extra if isinstance(stage, Seen) and type(stage) is Seen else 0)


def test_the_choice_is_a_function_of_seed_and_source(tmp_path):
  path = tmp_path / "film.mp4"
  film(path, [320])
  split = Split(head=0.0, longest=2.0, shortest=1.0, clips_per_source=1)
  row, found = one_pass(path, split, ())
  source = {**row, **found.source}
  picks = {
    split.clips({**source, "source_id": str(name)})[0]["start"] for name in range(40)
  }  # fmt: skip
  assert len(picks) > 8  # of the 20 windows
  assert split.clips(source) == split.clips(source)
  assert picks <= {2.0 * k for k in range(20)}


def test_full_windows_come_before_short_ones(tmp_path):
  source = {
    "source_id": "s", "cuts": [5.0, 26.0], "scan_seconds": 33.0, "time_base": 0.001, "first_pts": 7,
  }  # fmt: skip
  clips = Split().clips(source)
  # The first scene is too short without its head; the second has 16 s and a rest, the third 7 s.
  assert [(clip["start"], clip["end"]) for clip in clips] == [(5.0, 21.0), (26.0, 33.0)]
  assert clips[0]["start_pts"] == 5007
  assert clips[0]["scene"] == 1
  assert Split(shortest=10.0).clips(source)[-1]["end"] == 21.0


def test_a_film_of_short_shots_gives_no_clip(tmp_path):
  path = tmp_path / "film.mp4"
  film(path, [10] * 8)
  _, found = one_pass(path, Split(head=0.0), (Motion(),))
  assert found.clips == []
  assert found.source["scenes"] == 8


def test_luma_and_rgb_are_as_displayed(tmp_path):
  from data_pipelines.curate.decode import decode_frames

  path = tmp_path / "v.mp4"
  video = moving(1, 0.5)
  write_video(path, video, 12, crf=1)
  _, _, forms = next(decode_frames(str(path), Limits()))
  assert forms("luma", None).shape == (96, 160)
  assert forms("luma", 40).shape == (24, 40)
  assert forms("luma", 1000).shape == (96, 160)
  assert forms("rgb", 50).shape == (30, 50, 3)
  assert abs(forms("rgb", None).astype(int) - video[0]).mean() < 6
  grey = forms("luma", None).astype(float)
  mean = grey[:96, :160].reshape(24, 4, 40, 4).mean(axis=(1, 3))
  assert abs(forms("luma", 40) - mean).max() <= 1.5
