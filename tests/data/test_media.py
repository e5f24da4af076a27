"""Media files: read by time, written whole, and every damaged one named."""

import re
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mgen_jax.data import media
from mgen_jax.data.media import MediaError

SECOND = 48000


def ramp(frames=16, height=32, width=48):
  """Frames that tell their own number: grey 20 + 10 k; a red corner tells what is up and left."""
  video = np.empty((frames, height, width, 3), np.uint8)
  video[:] = (20 + 10 * np.arange(frames))[:, None, None, None]
  video[:, : height // 4, : width // 4] = (220, 30, 30)
  return video


def numbers(video):
  """The frame numbers of a decoded ramp, from its lower right part."""
  half_h, half_w = video.shape[1] // 2, video.shape[2] // 2
  grey = video[:, half_h:, half_w:].mean(axis=(1, 2, 3))
  return np.round((grey - 20) / 10).astype(int).tolist()


@pytest.fixture
def clip(tmp_path):
  path = tmp_path / "clip.mp4"
  media.write_video(path, ramp(), 8, audio=np.zeros(2 * SECOND, np.float32))
  return path


def write_by_hand(path, video, times, *, rotation=None, ratio=None, codec="mpeg4"):
  """A file with its own time stamps (milliseconds), rotation flag or pixel aspect."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=30)
    stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    stream.codec_context.qmin, stream.codec_context.qmax = 2, 2
    if ratio:
      stream.sample_aspect_ratio = ratio
    if rotation is not None:
      stream.set_display_rotation(rotation)
    for rgb, time in zip(video, times, strict=True):
      frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
      frame.pts, frame.time_base = time, Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.mark.parametrize(
  ("suffix", "codec", "name"),
  [
    (".mp4", "libx264", "h264"),
    (".mov", "mpeg4", "mpeg4"),
    (".avi", "mpeg4", "mpeg4"),
    (".webm", "libvpx-vp9", "vp9"),
    (".mkv", "libx264", "h264"),
  ],
)
def test_what_is_written_is_read_back(tmp_path, suffix, codec, name):
  path = tmp_path / f"clip{suffix}"
  media.write_video(path, ramp(), 8, codec=codec)
  info = media.probe(path)
  assert (info.kind, info.height, info.width, info.codec) == ("video", 32, 48, name)
  assert (info.frames, info.fps, info.has_audio) == (16, 8.0, False)
  assert info.duration == pytest.approx(2.0, abs=0.02)
  video = media.read_video(path)
  assert video.shape == (16, 32, 48, 3)
  assert numbers(video) == list(range(16))
  assert abs(video.astype(int) - ramp()).mean() < 3


def test_flat_colours_come_back_without_a_bias(tmp_path):
  video = np.full((4, 64, 64, 3), (40, 42, 46), np.uint8)
  media.write_video(tmp_path / "flat.mp4", video, 8)
  assert abs(media.read_video(tmp_path / "flat.mp4").astype(int) - video).max() <= 1


def test_same_input_gives_same_bytes():
  audio = np.sin(np.arange(SECOND) / 10).astype(np.float32)
  first = media.encode_video(ramp(), 8, audio=audio)
  assert first == media.encode_video(ramp(), 8, audio=audio)
  assert numbers(media.read_video(first)) == list(range(16))


def test_mp4_can_start_playing_before_it_is_whole():
  data = media.encode_video(ramp(), 8)
  assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_frames_are_those_on_screen_at_the_middle_of_each_interval(clip):
  assert numbers(media.read_video(clip, frames=8)) == [1, 3, 5, 7, 9, 11, 13, 15]
  assert numbers(media.read_video(clip, frames=1)) == [8]
  assert numbers(media.read_video(clip, frames=4, start=0.5, duration=0.5)) == [4, 5, 6, 7]
  # More than there are: frames repeat, none is made up.
  assert numbers(media.read_video(clip, frames=4, start=0.25, duration=0.25)) == [2, 2, 3, 3]
  assert numbers(media.read_video(clip, start=1.75)) == [14, 15]


def test_a_window_far_into_a_video_is_found(tmp_path):
  video = np.empty((240, 16, 16, 3), np.uint8)
  video[:] = (5 * np.arange(240) % 250)[:, None, None, None]
  path = tmp_path / "long.mp4"
  media.write_video(path, video, 24, crf=4)
  got = media.read_video(path, frames=6, start=8.0, duration=0.25)
  assert abs(got.mean(axis=(1, 2, 3)) - 5 * np.arange(192, 198) % 250).max() < 2


def test_variable_rates_are_sampled_by_time_not_by_index(tmp_path):
  path = tmp_path / "vfr.mp4"
  # Frame 0 stays for a second, then 1 to 4 pass within 0.4 s.
  write_by_hand(path, ramp(5), [0, 1000, 1100, 1200, 1300])
  assert numbers(media.read_video(path, frames=5, start=0.0, duration=1.25)) == [0, 0, 0, 0, 2]
  assert numbers(media.read_video(path)) == [0, 1, 2, 3, 4]


def test_rotation_flags_are_applied(tmp_path):
  path = tmp_path / "turned.mp4"
  video = ramp(3)
  write_by_hand(path, video, [0, 33, 67], rotation=90)
  info = media.probe(path)
  assert (info.height, info.width) == (48, 32)
  got = media.read_video(path)
  assert got.shape == (3, 48, 32, 3)
  # Turned by 90 degrees counter-clockwise, the upper left corner becomes the lower left one.
  assert got[0, -4, 4, 0] > 150
  assert got[0, 4, 4, 0] < 100
  assert media.read_video(path, size=(24, 16)).shape == (3, 24, 16, 3)


def test_pixels_that_are_not_square_are_stretched(tmp_path):
  path = tmp_path / "wide.mp4"
  write_by_hand(path, ramp(3), [0, 33, 67], ratio=Fraction(2, 1), codec="libx264")
  info = media.probe(path)
  assert (info.height, info.width) == (32, 96)
  assert media.read_video(path).shape == (3, 32, 96, 3)


@pytest.mark.parametrize("size", [(16, 16), (32, 80), (20, 12), (64, 64)])
def test_size_covers_then_crops_the_centre(clip, size):
  got = media.read_video(clip, frames=2, size=size)
  assert got.shape == (2, *size, 3)
  assert numbers(got) == [4, 12]


def test_square_crop_keeps_the_middle(tmp_path):
  video = np.full((2, 32, 96, 3), 30, np.uint8)
  video[:, :, 32:64] = 220
  media.write_video(tmp_path / "wide.mp4", video, 8)
  got = media.read_video(tmp_path / "wide.mp4", size=(16, 16))
  assert got.mean() > 205


def test_sound_comes_back_at_its_time(tmp_path):
  audio = np.zeros((2 * SECOND, 2), np.float32)
  audio[SECOND : SECOND + 4800, 0] = 0.5 * np.sin(np.arange(4800) * 0.05)
  for suffix, codec in ((".mp4", "libx264"), (".webm", "libvpx-vp9")):
    path = tmp_path / f"sound{suffix}"
    media.write_video(path, ramp(), 8, audio=audio, codec=codec)
    assert media.probe(path).has_audio
    got = media.read_audio(path, SECOND)
    assert got.shape == audio.shape
    assert got.dtype == np.float32
    assert abs(int(np.argmax(abs(got[:, 0]) > 0.1)) - SECOND) < 100  # 2 ms
    assert abs(got[:, 1]).max() < 0.05
  slower = media.read_audio(tmp_path / "sound.mp4", 16000)
  assert abs(len(slower) - 32000) < 32


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".webm", "libvpx-vp9")])
def test_a_part_of_the_sound_is_that_part_of_all_of_it(tmp_path, suffix, codec):
  noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2 * SECOND, 2)).astype(np.float32)
  path = tmp_path / f"noise{suffix}"
  media.write_video(path, ramp(), 8, audio=noise, codec=codec)
  for rate in (SECOND, 16000):
    whole = media.read_audio(path, rate)
    for start, end in ((0.0, 0.01), (0.3, 1.1), (1.9, 9.0), (5.0, 6.0)):
      part = media.read_audio(path, rate, start, end)
      np.testing.assert_array_equal(part, whole[round(start * rate) : round(end * rate)])


def test_a_video_without_sound_says_so(tmp_path):
  media.write_video(tmp_path / "mute.mp4", ramp(), 8)
  with pytest.raises(MediaError, match="no sound"):
    media.read_audio(tmp_path / "mute.mp4", SECOND)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_truncated_files_are_refused_by_name(tmp_path, suffix):
  codec = {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}[suffix]
  noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3)).astype(np.uint8)
  whole = media.encode_video(noise, 8, container=suffix, codec=codec)
  path = tmp_path / f"cut{suffix}"
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(MediaError, match=re.escape(f"cut{suffix} is")):
    media.probe(path)
  if suffix != ".avi":  # the header of AVI does not say how long it should be
    with pytest.raises(MediaError, match=r"truncated|damaged"):
      media.read_video(path)
    with pytest.raises(MediaError, match=r"truncated|damaged"):
      media.read_video(path, frames=8)


def bad_files(folder):
  files = {
    "text.mp4": b"this is not a video\n" * 100,
    "empty.mp4": b"",
    "head.mp4": media.encode_video(ramp(), 8)[:600],
    "playlist.mp4": b"#EXTM3U\n#EXTINF:2,\n/etc/hostname\n",
    "concat.mp4": b"ffconcat version 1.0\nfile 'clip.mp4'\n",
  }
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return [*files, "missing.mp4", "."]


def test_what_is_no_video_gives_a_sentence_with_its_name(clip):
  for name in bad_files(clip.parent):
    path = clip.parent / name
    for read in (media.probe, media.read_video):
      with pytest.raises(MediaError, match=re.escape(str(path))) as caught:
        read(path)
      assert str(caught.value).endswith(".")


def test_sound_alone_is_no_video(tmp_path):
  with av.open(str(tmp_path / "song.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=SECOND, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
    frame.rate, frame.pts = SECOND, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  with pytest.raises(MediaError, match="no video track"):
    media.probe(tmp_path / "song.mp4")


def test_windows_outside_the_video_are_refused(clip):
  for window in ({"start": -1.0}, {"start": 3.0}, {"duration": 0.0}):
    with pytest.raises(MediaError, match="outside the video"):
      media.read_video(clip, frames=4, **window)
  with pytest.raises(MediaError, match="truncated"):
    media.read_video(clip, frames=4, start=1.0, duration=5.0)
  with pytest.raises(MediaError, match="at least one"):
    media.read_video(clip, frames=0)


@pytest.mark.parametrize(
  ("video", "fps", "message"),
  [
    (np.zeros((2, 31, 48, 3), np.uint8), 8, "31x48 is odd.*use 32x48"),
    (np.zeros((2, 32, 48, 3), np.float32), 8, "uint8"),
    (np.zeros((32, 48, 3), np.uint8), 8, "T, H, W, 3"),
    (np.zeros((0, 32, 48, 3), np.uint8), 8, "T, H, W, 3"),
    (np.zeros((2, 32, 48, 3), np.uint8), 0, "rate above zero"),
  ],
)
def test_what_cannot_be_written_is_refused(tmp_path, video, fps, message):
  with pytest.raises(MediaError, match=message):
    media.write_video(tmp_path / "out.mp4", video, fps)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "codec"), [("out.webm", "libx264"), ("out.mp4", "nonsense"), ("out.txt", "libx264")]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, name, codec):
  (tmp_path / name).write_bytes(b"old")
  with pytest.raises(MediaError):
    media.write_video(tmp_path / name, ramp(), 8, codec=codec)
  assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


def test_writing_into_a_folder_that_is_not_there_is_a_user_error(tmp_path):
  with pytest.raises(MediaError, match="could not be written"):
    media.write_video(tmp_path / "no" / "out.mp4", ramp(), 8)
  with pytest.raises(MediaError, match="could not be written"):
    media.write_image(tmp_path / "no" / "out.png", ramp()[0])


def test_images_are_read_upright_and_opaque(tmp_path):
  picture = ramp(1, 32, 48)[0]
  media.write_image(tmp_path / "a.png", picture)
  assert (media.read_image(tmp_path / "a.png") == picture).all()
  info = media.probe(tmp_path / "a.png")
  assert (info.kind, info.height, info.width, info.frames) == ("image", 32, 48, 1)
  assert media.read_image(tmp_path / "a.png", size=(16, 16)).shape == (16, 16, 3)

  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
  Image.fromarray(picture).save(tmp_path / "phone.jpg", exif=exif)
  turned = media.read_image(tmp_path / "phone.jpg")
  assert turned.shape == (48, 32, 3)
  assert turned[4, -4, 0] > 150
  assert (media.probe(tmp_path / "phone.jpg").height, turned[-4, -4, 0] < 100) == (48, True)

  clear = np.zeros((8, 8, 4), np.uint8)
  Image.fromarray(clear).save(tmp_path / "clear.png")
  assert (media.read_image(tmp_path / "clear.png") == 255).all()


def test_damaged_images_are_refused(tmp_path):
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
  media.write_image(tmp_path / "a.png", noise)
  data = (tmp_path / "a.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
  (tmp_path / "text.png").write_bytes(b"no image")
  for name in ("cut.png", "text.png", "missing.png"):
    with pytest.raises(MediaError, match=name):
      media.read_image(tmp_path / name)


def test_contact_sheet_holds_every_picture(tmp_path):
  video = ramp(10)
  sheet = media.contact_sheet(video, columns=4)
  assert sheet.shape == (4 + 3 * 36, 4 + 4 * 52, 3)
  assert (sheet[4:36, 4:52] == video[0]).all()
  assert (sheet[4 + 36 : 36 + 36, 4 + 52 : 52 + 52] == video[5]).all()
  labelled = media.contact_sheet(video, columns=4, labels=["a small red circle"] * 10, scale=2)
  assert labelled.shape[1] == 4 + 4 * 100
  assert labelled.shape[0] > 4 + 3 * 68
  media.write_image(tmp_path / "sheet.png", labelled)
