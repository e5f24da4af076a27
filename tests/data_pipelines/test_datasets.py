"""The four data sets, on small folders of the same layout that Marbles has rendered."""

import copy
import json
import sys

import numpy as np
import pytest

from data_pipelines.datasets import folder, layouts, windows
from mgen_jax.data import ingest, marbles, media, sources
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import ConfigError, UserError

SIZE, LENGTH = 32, 60


def _clip(seed, frames=LENGTH, height=SIZE, width=SIZE):
  thing = marbles.Object("red", "circle", "large", motion="moves right")
  return marbles.render(marbles.Scene(seed, (thing,)), frames, height, width, 8.0)


def _write_frames(path, video):
  path.mkdir(parents=True)
  for number, frame in enumerate(video):
    media.write_image(path / f"frame_{number}.png", frame)  # "10" comes after "9", not after "1"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
  """A small folder of each layout."""
  root = tmp_path_factory.mktemp("sources")
  (root / "faceforensics" / "train").mkdir(parents=True)
  for number in range(2):
    path = root / "faceforensics" / "train" / f"{number:03d}.mp4"
    media.write_video(path, _clip(number, height=48), 25.0)
  for name in ("YoYo", "Archery"):
    (root / "ucf101" / name).mkdir(parents=True)
    media.write_video(root / "ucf101" / name / f"v_{name}_g01_c01.avi", _clip(3), 25.0)
  media.write_video(root / "ucf101" / "YoYo" / "v_YoYo_g02_c01.avi", _clip(4, frames=20), 25.0)
  _write_frames(root / "sky_timelapse" / "a_1", _clip(5))
  _write_frames(root / "sky_timelapse" / "b_2", _clip(6, frames=48))  # the loader wants more
  _write_frames(root / "taichi_hd" / "c", _clip(7, frames=48))
  return root


def test_frames_are_those_of_the_released_loaders():
  """spec: 16 frames of a window of 48: a truncated linspace has two gaps of 4."""
  rng = np.random.default_rng(0)
  spread = windows.indices(48, rng, spread=True)
  assert spread.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47]
  assert windows.indices(48, rng, spread=False).tolist() == list(range(0, 48, 3))
  starts = {int(windows.indices(60, rng, spread=True)[0]) for _ in range(500)}
  assert starts == set(range(12))  # 0 .. N - 49
  with pytest.raises(ValueError):
    windows.indices(47, rng, spread=True)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_folder_becomes_clips_that_an_experiment_can_read(roots, tmp_path, name):
  counts = folder.write(name, roots / name, tmp_path / "out", size=SIZE, windows_per_clip=2)
  short = {"ucf101": 1, "sky_timelapse": 1}.get(name, 0)
  clips = {"faceforensics": 2, "ucf101": 3, "sky_timelapse": 2, "taichi_hd": 1}[name]
  classes = 2 if name == "ucf101" else 0
  expected = {"clips": clips, "windows": 2 * (clips - short), "too_short": short}
  assert counts == {**expected, "classes": classes}
  index = ingest.scan(tmp_path / "out", held_out=0.0)
  assert len(index.clips) == counts["windows"]
  for clip in index.clips:
    assert (clip.frames, clip.height, clip.width) == (16, SIZE, SIZE)
  captions = {clip.caption for clip in index.clips}
  assert captions == ({"Archery", "YoYo"} if classes else {layouts.layout(name).title})
  names = json.loads((tmp_path / "out" / "classes.json").read_text())
  assert names == (["Archery", "YoYo"] if classes else [])


def test_windows_are_the_frames_they_say(roots):
  """Frame folders keep pixels, so the window can be compared with the clip itself."""
  (clip,) = layouts.scan("taichi_hd", roots / "taichi_hd")
  layout = layouts.layout("taichi_hd")
  (made,) = windows.windows(clip, layout, count=1, size=SIZE, seed=0)
  expected = _clip(7, frames=48)[::3]
  flipped = expected[:, :, ::-1]
  assert np.array_equal(made, expected) or np.array_equal(made, flipped)
  seen = {
    bool(np.array_equal(video, flipped))
    for video in windows.windows(clip, layout, count=12, size=SIZE, seed=1)
  }
  assert seen == {True, False}  # half of them are flipped


def test_pictures_are_resized_as_the_loaders_do():
  video = _clip(0, frames=1, height=48, width=64)
  torch = pytest.importorskip("torch")
  tensor = torch.tensor(video).permute(0, 3, 1, 2) / 255.0
  short = torch.nn.functional.interpolate(tensor, scale_factor=32 / 48, mode="bilinear")
  left = round((short.shape[-1] - 32) / 2)
  expected = short[..., left : left + 32].permute(0, 2, 3, 1).numpy() * 255
  np.testing.assert_allclose(windows.resize(video, 32, "short_side"), expected, atol=1.01)
  square = torch.nn.functional.interpolate(tensor[..., 8:56], size=(32, 32), mode="bilinear")
  expected = square.permute(0, 2, 3, 1).numpy() * 255
  np.testing.assert_allclose(windows.resize(video, 32, "square"), expected, atol=1.01)


@pytest.mark.parametrize(
  ("name", "other", "message"),
  [
    ("faceforensics", "taichi_hd", "expected videos like train/000.mp4; found c/"),
    ("ucf101", "faceforensics/train", "expected one folder for each class.*found 000.mp4"),
    ("sky_timelapse", "ucf101", "expected one folder of frames.*found Archery/, YoYo/"),
    ("taichi_hd", "nowhere", "is no folder"),
  ],
)
def test_another_layout_is_refused_with_what_was_expected_and_found(roots, name, other, message):
  with pytest.raises(UserError, match=message):
    layouts.scan(name, roots / other)


def test_frames_that_cannot_be_used_are_named(roots, tmp_path):
  _write_frames(tmp_path / "sky" / "a", _clip(8))
  wanted = {"source": tmp_path / "sky", "out": tmp_path / "out", "size": 32}
  wanted |= {"name": "sky_timelapse", "windows_per_clip": 3}
  # One of three frames in a row is in the window, wherever it starts.
  bad = [tmp_path / "sky" / "a" / f"frame_{number}.png" for number in (28, 29, 30)]
  for path in bad:
    media.write_image(path, _clip(8, 1, 48)[0])
  with pytest.raises(UserError, match=r"frame_\d+.png is 48 x 32, and .* of the same clip 32 x 32"):
    folder.write(**wanted)
  for path in bad:
    path.write_text("no picture")
  with pytest.raises(UserError, match=r"frame_\d+.png cannot be read.*replace or remove it"):
    folder.write(**wanted)
  assert not (tmp_path / "out").exists()
  with pytest.raises(UserError, match=r"clip c: its frames are 32 x 32 and not 256 x 256"):
    folder.write("taichi_hd", roots / "taichi_hd", tmp_path / "out")


def test_an_unknown_data_set_is_refused():
  with pytest.raises(ConfigError, match="ucf101"):
    layouts.layout("kinetics")


@pytest.mark.parametrize("name", ["ucf101", "taichi_hd"])
def test_the_builder_prepares_random_access_clips(roots, tmp_path, name):
  for package in ("tensorflow_datasets", "importlib_resources"):
    pytest.importorskip(package, reason="needs the extra data")
  from data_pipelines.datasets import builders

  builder = builders.BUILDERS[name](
    source=roots / name, size=SIZE, data_dir=tmp_path, file_format="array_record"
  )
  builder.download_and_prepare()
  clips = builder.as_data_source(split="train")
  assert len(clips) == {"ucf101": 2, "taichi_hd": 1}[name]
  labels = {int(clips[i]["label"]) for i in range(len(clips))}
  assert labels == ({0, 1} if name == "ucf101" else {-1})
  assert clips[0]["video"].shape == (16, SIZE, SIZE, 3) and clips[0]["video"].dtype == np.uint8


def _curated(folder):
  for number in range(4):
    path = folder / "sub" / f"{number}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    media.write_video(path, _clip(number, frames=12 + number), 8.0)
    path.with_suffix(".txt").write_text(f"clip {number}, größer")
  media.write_image(folder / "still.png", _clip(9, frames=1)[0])
  (folder / "still.txt").write_text("a picture")
  return ingest.scan(folder, held_out=0.3)


def test_a_curated_set_is_exported_and_read_without_tensorflow(tmp_path):
  for package in ("tensorflow_datasets", "importlib_resources"):
    pytest.importorskip(package, reason="needs the extra data")
  from data_pipelines.datasets import clips

  index = _curated(tmp_path / "videos")
  out = clips.export(tmp_path / "videos", tmp_path / "tfds", held_out=0.3)
  assert clips.export(tmp_path / "videos", tmp_path / "tfds", held_out=0.3) == out  # it is there
  bucket = Bucket(8, SIZE, SIZE)
  for split in ("train", "held_out"):
    exported, groups = clips.sources(
      tmp_path / "tfds", [bucket, Bucket(1, SIZE, SIZE)], split=split
    )
    plain, same = sources.media_sources(index, [bucket, Bucket(1, SIZE, SIZE)], split=split)
    assert groups.table() == same.table()
    for each in plain:
      # As a worker process gets it, and without a random number: the same windows.
      source = copy.deepcopy(exported[each])
      assert len(source) == len(plain[each])
      for number in range(len(source)):
        a, b = source.example(number, None), plain[each].example(number, None)
        np.testing.assert_array_equal(a.pop("video"), b.pop("video"))
        assert a == b
  assert "tensorflow" not in sys.modules

  assert clips.restore(out, tmp_path / "back") == 5
  again = ingest.scan(tmp_path / "back", held_out=0.3)
  assert again.sha256 == index.sha256
  for clip in index.clips:
    assert (tmp_path / "back" / clip.path).read_bytes() == clip.open(index.folder).read_bytes()

  (tmp_path / "videos" / "still.txt").write_text("another text")
  with pytest.raises(UserError, match="holds other clips"):
    clips.export(tmp_path / "videos", tmp_path / "tfds", held_out=0.3)
  with pytest.raises(UserError, match="no data set"):
    clips.sources(tmp_path / "videos", [Bucket(8, SIZE, SIZE)], split="train")
