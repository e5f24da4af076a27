"""Folders of Marbles clips: whole or absent, the same for any number of workers, labels exact."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from mgen_jax.data import media
from mgen_jax.data.marbles import (
  COMPASS,
  DEFECTS,
  Object,
  Scene,
  WorldConfig,
  read_truth,
  render,
  sample_scene,
  write_dataset,
)
from mgen_jax.data.marbles import __main__ as command
from mgen_jax.data.marbles.defects import corrupt_bytes, plant
from mgen_jax.errors import UserError

FPS = 8.0
FULL = WorldConfig()
SIMPLE = WorldConfig(
  motions=tuple(COMPASS),
  textures=("plain",),
  backgrounds=("dark grey",),
  cameras=("static",),
  max_objects=1,
)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
  """A dataset of the full world, every second clip with a defect."""
  out = tmp_path_factory.mktemp("marbles") / "spoilt"
  sizes, frames = ((64, 64), (48, 80)), (16, 24)
  write_dataset(
    out, 2 * len(DEFECTS), FULL, sizes=sizes, frames=frames, fps=FPS, workers=1, defects=DEFECTS
  )
  return out


def with_defect(folder, name):
  (record,) = [r for r in read_truth(folder)[1::2] if r["defects"] == [name]]
  return record, folder / record["file"]


def files_of(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def steps(video):
  """Mean difference of each frame from the one before."""
  return abs(np.diff(video.astype(int), axis=0)).mean(axis=(1, 2, 3))


# Datasets


def test_a_dataset_holds_clips_captions_and_truth(tmp_path):
  out = tmp_path / "out"
  seen = []
  write_dataset(
    out, 8, SIMPLE, sizes=((64, 64), (48, 80)), frames=(16, 24), fps=FPS, workers=1,
    progress=lambda done, total: seen.append((done, total)),
  )  # fmt: skip
  assert seen == [(i + 1, 8) for i in range(8)]
  captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
  records = read_truth(out)
  assert [c["file"] for c in captions] == [f"clip_{i:05d}.mp4" for i in range(8)]
  assert [c["caption"] for c in captions] == [r["caption"] for r in records]
  shapes = set()
  for record in records:
    info = media.probe(out / record["file"])
    shapes.add((info.frames, info.height, info.width))
    assert (info.frames, info.fps) == (record["frames"], FPS)
    assert info.has_audio
    assert len(record["objects"][0]["positions"]) == record["frames"]
  assert shapes == set(itertools.chain(*([(t, 64, 64), (t, 48, 80)] for t in (16, 24))))
  page = (out / "index.html").read_text()
  assert all(record["file"] in page and record["caption"] in page for record in records)


def test_the_number_of_workers_changes_no_byte(tmp_path):
  for workers in (1, 2):
    write_dataset(
      tmp_path / str(workers), 6, FULL, workers=workers, defects=("corrupt", "jitter"), edits=True,
      doubles=True,
    )  # fmt: skip
  first, second = files_of(tmp_path / "1"), files_of(tmp_path / "2")
  assert first == second
  assert sum(name.endswith(".mp4") for name in first) == 6 + 3 + 3


def test_another_seed_gives_other_clips(tmp_path):
  for seed in (0, 1):
    write_dataset(tmp_path / str(seed), 1, SIMPLE, workers=1, seed=seed)
  assert files_of(tmp_path / "0")["clip_00000.mp4"] != files_of(tmp_path / "1")["clip_00000.mp4"]


def test_a_finished_folder_is_not_rendered_again(tmp_path):
  out = tmp_path / "out"
  assert write_dataset(out, 2, SIMPLE, workers=1) == str(out)
  before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
  assert write_dataset(out, 2, SIMPLE, workers=1) == str(out)
  assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path):
  out = tmp_path / "out"
  write_dataset(out, 2, SIMPLE, workers=1)
  before = files_of(out)
  with pytest.raises(UserError, match="clips = 2, not 3"):
    write_dataset(out, 3, SIMPLE, workers=1)
  with pytest.raises(UserError, match="held_out"):
    write_dataset(out, 2, dataclasses.replace(SIMPLE, split="held_out"), workers=1)
  assert files_of(out) == before
  (out / "clip_00001.mp4").unlink()
  with pytest.raises(UserError, match="lost 1 clips"):
    write_dataset(out, 2, SIMPLE, workers=1)
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "holiday.mp4").write_bytes(b"mine")
  with pytest.raises(UserError, match="holds no Marbles"):
    write_dataset(mine, 2, SIMPLE, workers=1)
  assert files_of(mine) == {"holiday.mp4": b"mine"}


def test_an_interrupted_rendering_leaves_nothing_behind(tmp_path):
  def stop(done, total):
    if done == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_dataset(tmp_path / "out", 4, SIMPLE, workers=1, progress=stop)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"clips": 0}, "at least one"),
    ({"sizes": ((63, 64),)}, "even"),
    ({"sizes": ((16, 128),)}, "four times"),
    ({"frames": ()}, "frames is"),
    ({"fps": 0}, "fps is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"workers": -1}, "workers is -1"),
    ({"defects": ("wobble",)}, "wobble.*known"),
  ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, changes, message):
  settings = {"clips": 2, "workers": 1} | changes
  with pytest.raises(UserError, match=message):
    write_dataset(tmp_path / "out", config=SIMPLE, **settings)
  assert not list(tmp_path.iterdir())


def test_sound_in_the_file_falls_on_the_bounce(tmp_path):
  config = dataclasses.replace(SIMPLE, motions=("bounces", "falls"))
  write_dataset(tmp_path / "out", 8, config, workers=1)
  for record in read_truth(tmp_path / "out"):
    samples = media.read_audio(tmp_path / "out" / record["file"], 48000)[:, 0]
    heard = int(np.argmax(abs(samples) > 0.1)) / 48000
    assert abs(heard - record["objects"][0]["bounces"][0]["time"]) < 0.01
    assert len(samples) == 2 * 48000


# Defects


def test_every_second_clip_is_spoilt_and_the_others_are_not(spoilt):
  records = read_truth(spoilt)
  assert [r["defects"] for r in records[1::2]] == [[defect] for defect in DEFECTS]
  for record in records[::2]:
    still = all(thing["motion"] == "stays still" for thing in record["objects"])
    still = still and record["camera"]["move"] == "static"
    assert record["defects"] == (["static"] if still else [])


def test_static_clips_do_not_move(spoilt):
  record, path = with_defect(spoilt, "static")
  assert steps(media.read_video(path)).max() < 1
  assert {thing["motion"] for thing in record["objects"]} == {"stays still"}
  assert "moves" not in record["caption"] and "camera" not in record["caption"]


def test_slideshows_change_only_at_their_shots(spoilt):
  record, path = with_defect(spoilt, "slideshow")
  change = steps(media.read_video(path))
  edges = [shot["first_frame"] - 1 for shot in record["shots"][1:]]
  assert len(edges) == 3
  assert change[edges].min() > 20
  assert np.delete(change, edges).max() < 2


def test_hard_cuts_are_at_the_frame_they_name(spoilt):
  record, path = with_defect(spoilt, "hard_cut")
  cut = record["shots"][1]["first_frame"]
  change = steps(media.read_video(path))
  assert np.argmax(change) == cut - 1
  assert change[cut - 1] > 3 * np.delete(change, cut - 1).max()
  assert all(b["time"] < cut / FPS for thing in record["objects"] for b in thing["bounces"])


def test_letterboxes_have_black_bars_and_a_picture_between(spoilt):
  record, path = with_defect(spoilt, "letterbox")
  video, bars = media.read_video(path), record["bars"]
  height, width = video.shape[1:3]
  inside = np.zeros((height, width), bool)
  inside[bars["top"] : height - bars["bottom"], bars["left"] : width - bars["right"]] = True
  assert 0.1 < 1 - inside.mean() < 0.4
  rim = inside ^ np.pad(inside, 2)[2:-2, 2:-2]
  assert np.median(video[:, ~inside & ~rim]) < 6
  (x, y) = np.array(record["objects"][0]["positions"]).T
  assert (x > bars["left"]).all() and (y < height - bars["bottom"]).all()


def test_overlaid_text_is_in_its_box_and_nowhere_else():
  for seed in range(6):
    scene = sample_scene(seed, FULL)
    clip = plant("text_overlay", scene, 4, 48, 80, FPS, seed)
    changed = (clip.frames != render(scene, 4, 48, 80, FPS)).any(axis=(0, 3))
    x0, y0, x1, y1 = clip.details["box"]
    inside = np.zeros_like(changed)
    inside[y0:y1, x0:x1] = True
    assert changed.any() and not changed[~inside].any()
    contrast = abs(clip.frames.astype(int) - render(scene, 4, 48, 80, FPS)).max()
    assert contrast > 100 and y1 - y0 >= 6


def test_jitter_shakes_the_picture_by_the_offsets_it_names():
  still = Scene(2, (Object("red", "circle", "small"),))
  clip = plant("jitter", still, 8, 64, 64, FPS, 3)
  offsets = np.array(clip.details["offsets"])
  assert abs(np.diff(offsets, axis=0)).max() >= 4
  first = clip.frames[0, 16:48, 16:48]
  for frame, (x, y) in zip(clip.frames, offsets - offsets[0], strict=True):
    if abs(x) <= 16 and abs(y) <= 16:
      np.testing.assert_array_equal(frame[16 - y : 48 - y, 16 - x : 48 - x], first)


def test_near_duplicates_are_almost_another_clip(spoilt):
  record, path = with_defect(spoilt, "near_duplicate")
  original = spoilt / record["duplicate_of"]
  assert path.read_bytes() != original.read_bytes()
  difference = abs(media.read_video(path).astype(int) - media.read_video(original))
  assert 1 < difference.mean() < 10


def test_small_short_and_corrupt_clips_are_so(spoilt):
  _, path = with_defect(spoilt, "too_small")
  info = media.probe(path)
  assert min(info.height, info.width) <= 24
  _, path = with_defect(spoilt, "too_short")
  assert media.probe(path).frames <= 4
  _, path = with_defect(spoilt, "corrupt")
  with pytest.raises(media.MediaError):
    media.probe(path)


def test_every_kind_of_corruption_is_found(tmp_path):
  data = media.encode_video(render(sample_scene(0, FULL), 16, 64, 64, FPS), FPS)
  kinds = set()
  for seed in range(12):
    broken, how = corrupt_bytes(data, seed)
    kinds.add(how)
    (tmp_path / "broken.mp4").write_bytes(broken)
    with pytest.raises(media.MediaError):
      media.probe(tmp_path / "broken.mp4")
  assert len(kinds) == 3


# The command


def test_the_command_renders_and_says_where(tmp_path, capsys):
  out = tmp_path / "look"
  options = ["--clips", "4", "--size", "48x64", "--frames", "8", "--workers", "1", "--sheet"]
  assert command.main(["--out", str(out), *options, "--defects", "corrupt", "--edits"]) == 0
  printed = capsys.readouterr().out
  assert str(out) in printed and "index.html" in printed
  assert media.read_image(tmp_path / "look_sheet.png").shape[0] > 48
  assert len(list(out.glob("*.mp4"))) == 4 and len(list((out / "edited").glob("*.mp4"))) == 2


def test_the_command_answers_a_fault_with_one_sentence(tmp_path, capsys):
  out = str(tmp_path / "look")
  assert command.main(["--out", out, "--colours", "red,bleu"]) == 2
  error = capsys.readouterr().err
  assert 'did you mean "blue"' in error and len(error.splitlines()) == 1
