"""Every stage that sees frames, alone: against FFmpeg where it has the same, else against truth."""

import itertools

import av
import numpy as np
import pytest

pytest.importorskip("cv2")

from data_pipelines.curate.decode import Limits, decode_frames
from data_pipelines.curate.stage import Frame
from data_pipelines.curate.stages.border import Border
from data_pipelines.curate.stages.camera import CLASSES, Camera
from data_pipelines.curate.stages.jitter import Jitter
from data_pipelines.curate.stages.motion import Motion
from data_pipelines.curate.stages.scan import Scan
from data_pipelines.curate.stages.slideshow import Slideshow
from data_pipelines.curate.stages.static import Static
from data_pipelines.curate.stages.vectors import Vectors
from mgen_jax.data.marbles import defects
from mgen_jax.data.marbles.render import render
from mgen_jax.data.media import write_video
from mgen_jax.errors import UserError
from tests.data_pipelines.curate.onnx_file import write_mean_colour
from tests.data_pipelines.curate.watching import (
  fails,
  moving,
  scene,
  scores,
  scores_of,
  sliding,
  texture,
)


def ffmpeg(path, name, arguments, key):
  """The metadata `key` that a filter gives every frame of a file."""
  values = []
  with av.open(str(path)) as container:
    graph = av.filter.Graph()
    source = graph.add_buffer(template=container.streams.video[0])
    chain = [source, graph.add(name, arguments), graph.add("buffersink")]
    source.link_to(chain[1])
    chain[1].link_to(chain[2])
    graph.configure()
    for frame in container.decode(video=0):
      graph.push(frame)
      values.append(float(graph.pull().metadata[key]))
  return np.array(values)


# VMAF motion


@pytest.mark.parametrize(("height", "width", "codec"), [
  (64, 48, "libx264"), (96, 160, "libx264"), (480, 854, "libx264"), (120, 90, "mpeg4"),
])  # fmt: skip
def test_vmaf_motion_is_that_of_ffmpeg(height, width, codec, tmp_path):
  video = moving(3, seconds=1, height=height, width=width)
  path = tmp_path / "video.mp4"
  write_video(path, video, 12, codec=codec)
  expected = ffmpeg(path, "vmafmotion", "", "lavfi.vmafmotion.score")
  found = scores(Motion(), path)
  assert expected.mean() > 0.2
  assert found["vmaf_motion"] == pytest.approx(expected.mean(), abs=0.01)
  assert found["clip_frames"] == len(video)


def test_motion_at_30_frames_does_not_depend_on_the_rate(tmp_path):
  video = sliding((1, 0), 96)
  fast, slow = (scores_of(Motion(), video[::n], 48 / n, tmp_path, crf=10) for n in (1, 2))
  assert slow["vmaf_motion"] > 1.7 * fast["vmaf_motion"]
  assert slow["vmaf_motion_30"] == pytest.approx(fast["vmaf_motion_30"], rel=0.15)
  assert slow["clip_fps"] == pytest.approx(24)


def test_either_value_of_motion_can_decide():
  assert [rule.column for rule in Motion().rules()] == ["vmaf_motion_30"]
  paper = Motion(min_raw=2.0, min_at_30=None)
  assert [(rule.column, rule.at_least) for rule in paper.rules()] == [("vmaf_motion", 2.0)]


def test_one_frame_has_no_motion(tmp_path):
  assert scores_of(Motion(), moving(1)[:1], 12, tmp_path)["vmaf_motion"] is None


# Scenes


def test_the_scene_score_is_that_of_ffmpeg(tmp_path):
  path = tmp_path / "video.mp4"
  write_video(path, np.concatenate([moving(5, 1), moving(6, 1)]), 12)
  expected = ffmpeg(path, "select", "gte(scene\\,0)", "lavfi.scene_score")
  observer = Scan().observer({})
  found = []
  for index, (time, pts, forms) in enumerate(decode_frames(str(path), Limits())):
    observer.frame(Frame(index, time, pts, forms))
    found.append(observer._recent[-1].score)
  np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("seed", range(6))
def test_hard_cuts_are_found_to_the_frame(seed, tmp_path):
  clip = defects.plant("hard_cut", scene(seed), 36, 96, 128, 12, seed)
  found = scores_of(Scan(), clip.frames, 12, tmp_path, crf=26)
  (cut,) = found["cuts"]
  assert round(cut * 12) == clip.details["shots"][1]["first_frame"]
  assert found["scenes"] == 2


def test_a_cut_between_scenes_alike_in_brightness_is_found(tmp_path):
  video = np.concatenate([sliding((1, 0), 20, seed=1), sliding((1, 0), 20, seed=2)])
  found = scores_of(Scan(), video, 12, tmp_path)
  assert [round(cut * 12) for cut in found["cuts"]] == [20]


def test_a_flash_is_no_cut(tmp_path):
  video = moving(7).copy()
  video[15:17] = np.minimum(video[15:17].astype(int) + 140, 255)
  assert scores_of(Scan(), video, 12, tmp_path)["cuts"] == []


def test_shots_a_second_reject_quick_cutting(tmp_path):
  pictures = [np.repeat(texture(i, 96, 160)[None] // (1 + i % 2 * 3), 8, axis=0) for i in range(6)]
  found = scores_of(Scan(), np.concatenate(pictures), 12, tmp_path)
  assert found["scenes"] == 6
  assert fails(Scan(), found)
  assert not fails(Scan(), scores_of(Scan(), moving(8), 12, tmp_path))


# Slideshows and stills


def test_a_slideshow_passes_the_motion_threshold_and_fails_its_own(tmp_path):
  # Six pictures a second apart: what the average of motion sees are the changes.
  pictures = [np.repeat(texture(i, 96, 160)[None], 6, axis=0) for i in range(6)]
  path = tmp_path / "video.mp4"
  write_video(path, np.concatenate(pictures), 6)
  assert not fails(Motion(min_raw=2.0, min_at_30=None), scores(Motion(), path))
  found = scores(Slideshow(), path)
  assert found["slide_changes"] == 5
  assert fails(Slideshow(), found)


def test_a_slideshow_that_dissolves_is_one(tmp_path):
  stills = [texture(i, 96, 160).astype(float) for i in range(4)]
  frames = []
  for one, other in itertools.pairwise(stills):
    frames += [one] * 24 + [one + (other - one) * t / 6 for t in range(1, 6)]
  found = scores_of(Slideshow(), np.stack(frames).astype(np.uint8), 12, tmp_path)
  assert found["slide_changes"] == 3
  assert fails(Slideshow(), found)


def test_moving_shots_with_cuts_are_no_slideshow(tmp_path):
  video = np.concatenate([moving(seed, 1.5) for seed in (1, 2, 3)])
  assert not fails(Slideshow(), scores_of(Slideshow(), video, 12, tmp_path))


def test_a_small_thing_that_moves_is_not_static(tmp_path):
  video = np.repeat(texture(0, 96, 160)[None], 36, axis=0).copy()
  assert fails(Static(), scores_of(Static(), video, 12, tmp_path, crf=28))
  for t in range(36):
    video[t, 40:48, 20 + 3 * t : 28 + 3 * t] = 255
  assert not fails(Static(), scores_of(Static(), video, 12, tmp_path, crf=28))


# Borders


def boxed(video, top, left, colour=0):
  out = np.full_like(video, colour)
  height, width = video.shape[1:3]
  inner = video[:, : height - 2 * top, : width - 2 * left]
  out[:, top : height - top, left : width - left] = inner
  return out


@pytest.mark.parametrize(("top", "left", "colour"), [
  (12, 0, 0), (0, 24, 0), (10, 20, 0), (8, 0, 255), (2, 0, 16),
])  # fmt: skip
def test_bars_are_measured(top, left, colour, tmp_path):
  found = scores_of(Border(), boxed(moving(9), top, left, colour), 12, tmp_path)
  assert found["border_top"] == pytest.approx(top / 96, abs=0.02)
  assert found["border_right"] == pytest.approx(left / 160, abs=0.02)
  assert fails(Border(), found)


def test_subtitles_in_a_bar_leave_it_a_bar(tmp_path):
  video = boxed(moving(9), 16, 0)
  video[6:20, -12:-4, 50:100:2] = 240
  found = scores_of(Border(), video, 12, tmp_path)
  assert found["border_bottom"] == pytest.approx(16 / 96, abs=0.02)


def test_a_picture_set_into_its_own_blur_has_a_border(tmp_path):
  inner, around = moving(9, width=80), moving(9)
  video = (around // 3 + 20).copy()
  video[:, :, 40:120] = inner // 2 + 110
  found = scores_of(Border(), video, 12, tmp_path)
  assert found["border_left"] == pytest.approx(0.25, abs=0.03)
  assert fails(Border(), found)


@pytest.mark.parametrize("world", [
  {"backgrounds": ["black"]},
  {"backgrounds": ["gradient"]},
  {"backgrounds": ["white"], "cameras": ["pans up", "pans left", "zooms out"]},
])  # fmt: skip
def test_plain_pictures_have_no_border(world, tmp_path):
  for seed in range(3):
    video = render(scene(seed, **world), 36, 96, 128, 12)
    assert not fails(Border(), scores_of(Border(), video, 12, tmp_path)), (world, seed)


# Motion vectors


@pytest.mark.parametrize(("source", "codec"), [("mestimate", "libx264"), ("native", "mpeg4")])
def test_motion_vectors_are_as_long_as_the_camera_is_fast(source, codec, tmp_path):
  # Of these encoders, only MPEG-4's vectors all point to the frame before.
  stage = Vectors(source=source, pairs=0)
  found = scores_of(stage, sliding((3, 0), 24), 24, tmp_path, codec=codec)
  assert found["mv_mean"] == pytest.approx(3, abs=0.6)
  assert found["mv_768"] == pytest.approx(found["mv_mean"] * 768 / 96 * 24 / 30)
  assert found["mv_coverage"] > 0.8


def test_a_few_pairs_say_what_all_say(tmp_path):
  video = sliding((2, 1), 24)
  few = scores_of(Vectors(pairs=4.0), video, 24, tmp_path)
  assert few["mv_mean"] == pytest.approx(5**0.5, abs=0.5)


def test_vectors_of_wide_frames_are_in_pixels_of_the_source(tmp_path):
  found = scores_of(Vectors(width=80, pairs=0), sliding((4, 0), 12), 24, tmp_path)
  assert found["mv_mean"] == pytest.approx(4, abs=1.0)


# Shake


def test_shake_is_seen_and_a_fast_pan_is_not(tmp_path):
  rng = np.random.default_rng(0)
  large = texture(3, 160, 224)
  spots = rng.integers(0, 60, (36, 2))
  shaken = np.stack([large[y : y + 96, x : x + 160] for y, x in spots])
  assert fails(Jitter(), scores_of(Jitter(), shaken, 12, tmp_path))
  assert not fails(Jitter(), scores_of(Jitter(), sliding((6, 2), 36), 12, tmp_path))


@pytest.mark.parametrize("height", [36, 37, 64])
def test_grain_is_no_shake_at_any_size(height):
  """Also where the sides suit a Fourier transform, which OpenCV then does on the picture itself."""
  rng = np.random.default_rng(0)
  observer = Jitter().observer({})
  for index in range(30):
    grain = np.uint8(128 + rng.normal(0, 2, (height, 64)))
    observer.frame(Frame(index, index / 12, index, lambda form, width, grain=grain: grain))
  assert observer.scores()["shake"] < 0.05


# Camera


def seen_by(zoom=0.0, roll=0.0, pan=0.0, tilt=0.0, shake=0.0, frames=36):
  """A texture through a camera that zooms (log), rolls (degrees), pans and tilts over the clip."""
  import cv2

  rng = np.random.default_rng(1)
  large = texture(4, 288, 480)
  video = []
  for t in range(frames):
    part = t / frames
    x, y = 240 + 96 * pan * part, 144 - 96 * tilt * part
    x, y = (x, y) + shake * 96 * rng.normal(size=2)
    matrix = cv2.getRotationMatrix2D((float(x), float(y)), roll * part, float(np.exp(zoom * part)))
    matrix[:, 2] += [80 - x, 48 - y]
    video.append(cv2.warpAffine(large, matrix, (160, 96)))
  return np.stack(video)


@pytest.mark.parametrize(("move", "expected"), [
  ({"pan": 0.3}, "pan right"), ({"pan": -0.3}, "pan left"),
  ({"tilt": 0.3}, "tilt up"), ({"tilt": -0.3}, "tilt down"),
  ({"zoom": 0.3}, "zoom in"), ({"zoom": -0.3}, "zoom out"),
  ({"roll": 20.0}, "roll"), ({}, "static shot"), ({"shake": 0.008}, "handheld shot"),
  ({"pan": 0.3, "shake": 0.004}, "pan right"),
])  # fmt: skip
def test_camera_moves_that_geometry_decides(move, expected, tmp_path):
  found = scores_of(Camera(), seen_by(**move), 12, tmp_path)
  assert found["camera"] == expected
  assert found["camera_confidence"] > 0.5


def test_things_that_move_are_not_the_camera(tmp_path):
  for seed in range(4):
    video = render(
      scene(seed, backgrounds=["noisy"], cameras=["static"], motions=["moves left"]),
      36, 96, 160, 12,
    )  # fmt: skip
    assert scores_of(Camera(), video, 12, tmp_path)["camera"] == "static shot"


def test_marbles_cameras_on_a_textured_background(tmp_path):
  """The promise is nine in ten; these are all there are, twice."""
  names = {
    "static": "static shot", "pans left": "pan left", "pans right": "pan right",
    "pans up": "tilt up", "pans down": "tilt down", "zooms in": "zoom in", "zooms out": "zoom out",
  }  # fmt: skip
  right = total = 0
  for camera, expected in names.items():
    for seed in (20, 21):
      shown = scene(seed, backgrounds=["noisy"], cameras=[camera])
      video = render(shown, 36, 96, 160, 12)
      right += scores_of(Camera(), video, 12, tmp_path)["camera"] == expected
      total += 1
  assert right >= 0.9 * total, f"{right} of {total}"


def test_a_trained_classifier_decides_if_it_is_given(tmp_path):
  pytest.importorskip("onnxruntime")
  # It says class 12 for what begins dark and ends bright, class 13 for the other way round.
  weights = np.zeros((24, 16), np.float32)
  weights[:, 12] = np.linspace(-1, 1, 24)
  weights[:, 13] = -weights[:, 12]
  model = write_mean_colour(tmp_path / "camera.onnx", weights, shape=(1, 24, 24, 40, 3))
  rising = np.repeat(np.linspace(20, 220, 36), 96 * 160 * 3).reshape(36, 96, 160, 3)
  for video, expected in ((rising, "arc shot"), (rising[::-1], "tracking shot")):
    found = scores_of(Camera(model=model), video.astype(np.uint8), 12, tmp_path)
    assert found["camera"] == expected
  assert Camera(model=model).scorer().startswith("onnx ")
  assert Camera().scorer() == "similarity"


def test_a_classifier_that_cannot_be_is_a_sentence(tmp_path):
  pytest.importorskip("onnxruntime")
  assert len(CLASSES) == 16
  with pytest.raises(UserError, match="is no file"):
    Camera(model="/nowhere.onnx").scorer()
  (tmp_path / "no.onnx").write_bytes(b"0" * 5000)
  with pytest.raises(UserError, match="no ONNX network"):
    Camera(model=str(tmp_path / "no.onnx")).observer({})
  images = write_mean_colour(tmp_path / "images.onnx", np.ones((3, 96), np.float32))
  with pytest.raises(UserError, match=r"must take \[1, T, H, W, 3\]"):
    Camera(model=images).observer({})


# Where nothing was seen


@pytest.mark.parametrize("stage", [
  Border(), Camera(), Jitter(), Motion(), Scan(), Slideshow(), Static(), Vectors(),
], ids=lambda stage: stage.name)  # fmt: skip
def test_no_frame_gives_every_column(stage):
  assert set(stage.observer({}).scores()) == set(stage.columns)
