"""Real files come in many forms: all are read whole, and any window of them exactly."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from data_pipelines.curate.containers import Declared, declared, wrong_part
from data_pipelines.curate.decode import DecodeError, Limits, decode_frames
from data_pipelines.curate.stages.packets import Packets
from data_pipelines.curate.stages.probe import Probe
from mgen_jax.data.media import encode_video
from tests.data_pipelines.curate.watching import moving

FPS, FRAMES = 12, 72

FORMS = {
  "plain.mp4": {},
  "ten_bits.mp4": {"pixels": "yuv420p10le"},
  "no_subsampling.mp4": {"pixels": "yuv444p"},
  "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=24:bframes=3"}},
  "interlaced.mp4": {"options": {"x264-params": "interlaced=1"}},
  "fragments.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
  "wide_pixels.mp4": {"aspect": Fraction(4, 3)},
  "starts_late.mp4": {"start": 40},
  "starts_late.mkv": {"start": 40},
  "more_sound.mp4": {"sound": 9},
  "more_sound.mkv": {"sound": 9},
  "irregular.mp4": {"irregular": True},
  "irregular.mkv": {"irregular": True},
  "stream.ts": {},
  "vp9.webm": {"codec": "libvpx-vp9"},
  "lossless.mkv": {"codec": "ffv1"},
  "old.avi": {"codec": "mpeg4"},
  "old.wmv": {"codec": "wmv2", "format": "asf"},
  "animated.gif": {"codec": "gif", "pixels": "rgb8"},
  "edited.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
}


def write(path, codec="libx264", pixels="yuv420p", options=None, muxer=None, format=None,
          aspect=None, rotation=None, start=0, sound=0, irregular=False):  # fmt: skip
  """A film in one of these forms; its frames' times in seconds."""
  steps = np.random.default_rng(0).integers(20, 150, FRAMES)
  times = np.cumsum(steps) if irregular else (np.arange(FRAMES) + start) * 1000 // FPS
  with av.open(str(path), "w", format=format, options=muxer or {}) as container:
    stream = container.add_stream(codec, rate=FPS, options=options or {})
    stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
    if irregular or start:
      stream.codec_context.time_base = Fraction(1, 1000)
    if rotation:
      stream.set_display_rotation(rotation)
    if aspect:
      stream.codec_context.sample_aspect_ratio = aspect
    noise = container.add_stream("aac", rate=48000) if sound else None
    for time, picture in zip(times, moving(3, FRAMES / FPS, FPS, 64, 96), strict=True):
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      if irregular or start:
        frame.pts, frame.time_base = int(time), Fraction(1, 1000)
      for packet in stream.encode(frame):
        container.mux(packet)
    for packet in stream.encode():
      container.mux(packet)
    if noise:
      for place in range(0, 48000 * sound, 1024):
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        block.sample_rate, block.pts = 48000, place
        for packet in noise.encode(block):
          container.mux(packet)
  return (times - times[0]) / 1000


def read(path, *window):
  return [
    (round(time, 4), pts, int(forms("luma", None).sum()))
    for time, pts, forms in decode_frames(str(path), Limits(), *window)
  ]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_whole_and_in_part(name, tmp_path):
  path = tmp_path / name
  times = write(path, **FORMS[name])
  probed = Probe().score(str(path))
  assert probed["error_code"] == "", probed["error"]
  assert probed["duration"] == pytest.approx(times[-1], abs=0.25)
  assert probed["width"] == (128 if "wide" in name else 96)
  frames = read(path)
  assert len(frames) == FRAMES
  np.testing.assert_allclose([time for time, *_ in frames], times, atol=0.011)
  part = read(path, 3.0, 5.0)
  assert part == [frame for frame in frames if 3.0 - 1e-6 <= frame[0] < 5.0 - 1e-6]
  assert len(part) > 10


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])  # of VP9 another decoder shows most
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_upright_however_they_are_stored(rotation, codec, tmp_path):
  path = tmp_path / "phone.mp4"
  write(path, rotation=rotation, codec=codec)
  probed = Probe().score(str(path))
  upright = (96, 64) if rotation == 180 else (64, 96)
  assert (probed["width"], probed["height"]) == upright
  _, _, forms = next(decode_frames(str(path), Limits()))
  rgb = forms("rgb", None).astype(float)
  assert rgb.shape[:2] == upright[::-1]
  shape = rgb.shape[:2]
  for kept in (forms, forms.without_copies(1000), forms.without_copies(48)):
    for luma in (kept("luma", None), kept("rgb", None).mean(axis=2)):
      large = np.asarray(Image.fromarray(luma.astype(np.uint8)).resize(shape[::-1]), float)
      assert np.corrcoef(large.ravel(), rgb.mean(axis=2).ravel())[0, 1] > 0.9


def test_headers_are_read_without_a_decoder():
  video = moving(1, 1, FPS, 64, 96)
  for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4")):
    data = encode_video(video, FPS, container=suffix, codec=codec)
    found = declared(io.BytesIO(data))
    if suffix == ".mp4":
      assert found == Declared(pixels=96 * 64, seconds=pytest.approx(1.0, abs=0.1))
    else:
      assert found == Declared(size=len(data))
    assert declared(io.BytesIO(data[:40])).pixels == 0
  assert declared(io.BytesIO(b"")) == Declared()


def test_a_part_of_a_header_whose_name_cannot_be_is_damage(tmp_path):
  """Players skip it as something they do not know; FFmpeg's `hdlr` within `minf` is one."""
  data = encode_video(moving(1, 1, FPS, 64, 96), FPS, container=".mov", codec="mpeg4")
  assert declared(io.BytesIO(data)).misnamed == b""
  place = data.rindex(b"hdlr")
  flipped = data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :]
  path = tmp_path / "v.mov"
  path.write_bytes(flipped)
  scores = Probe().score(str(path))
  assert scores["error_code"] == "damaged" and "`dlr" in scores["error"]
  nested = b"".join((8 * left).to_bytes(4, "big") + b"moov" for left in range(20_000, 0, -1))
  assert declared(io.BytesIO(nested)).misnamed == b""  # and does not follow it to its end
  ended = (20).to_bytes(4, "big") + b"moov" + bytes(4) + (8).to_bytes(4, "big") + b"free"
  assert declared(io.BytesIO(ended)).misnamed == b""  # zeros end a list in QuickTime


def test_checksums_of_matroska_tell_where_a_byte_was_altered(tmp_path):
  video = moving(1, 1, FPS, 64, 96)
  data = encode_video(video, FPS, container=".mkv")
  assert wrong_part(io.BytesIO(data)) is None
  cluster = data.index(b"\x1f\x43\xb6\x75")
  place = len(data) // 2
  altered = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
  assert cluster < place and wrong_part(io.BytesIO(altered)) == cluster
  for name, content, code in (("a.mkv", data, None), ("b.mkv", altered, "damaged")):
    (tmp_path / name).write_bytes(content)
    found = Packets().score(str(tmp_path / name))
    assert found.get("error_code") == code and (found["packets_md5"] is None) == bool(code)
  for other in (".webm", ".mp4"):  # these have none
    codec = "libvpx-vp9" if other == ".webm" else "libx264"
    found = encode_video(video, FPS, container=other, codec=codec)
    assert wrong_part(io.BytesIO(found[:900] + b"x" + found[901:])) is None
  assert wrong_part(io.BytesIO(b"")) is None


@pytest.mark.parametrize("lost", [0, 1])
def test_an_avi_that_lost_a_frame_is_damaged(lost, tmp_path):
  path = tmp_path / "old.avi"
  write(path, codec="mjpeg", pixels="yuvj420p")
  data = bytearray(path.read_bytes())
  places = [n for n in range(len(data)) if data[n : n + 4] == b"00dc"]
  movie = data.index(b"movi")
  frames = [n for n in places if n > movie][:FRAMES]
  if lost:
    data[frames[30] : frames[30] + 4] = b"JUNK"  # the index still lists it
  path.write_bytes(data)
  if not lost:
    assert len(read(path)) == FRAMES
    return
  with pytest.raises(DecodeError) as caught:
    read(path)
  assert caught.value.code == "damaged"
