"""What one bad file may do to a run: nothing. 500 mutants, hangs, crashes and hunger for memory."""

import collections
import errno
import io
import os
import struct
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from data_pipelines.curate import decode, jpegs
from data_pipelines.curate.decode import DecodeError, Guard, Limits, refuse_link
from data_pipelines.curate.stages.motion import Motion
from data_pipelines.curate.stages.packets import Packets
from data_pipelines.curate.stages.probe import Probe
from data_pipelines.curate.stages.scan import Scan
from data_pipelines.curate.stages.split import Split
from data_pipelines.curate.watch import watch
from mgen_jax.data.media import encode_video
from tests.data_pipelines.curate.watching import moving

CODES = {
  *("empty", "not_media", "no_video", "wrong_extension", "too_large", "too_long"),
  *("truncated", "damaged", "decode_timeout", "out_of_memory", "crashed"),
}
SMALL = Limits(memory=1 << 30, patience=20.0)


# What the child does for the tests; found there by name.


def sleeps(seconds):
  time.sleep(seconds)


def announces_and_sleeps(seconds):
  decode._announce(seconds)
  time.sleep(seconds)
  return "done"


def aborts():
  os.abort()


def hoards(megabytes):
  return len([np.ones(1 << 17) for _ in range(megabytes)])


def stumbles():
  raise ValueError("a bug of ours")


def pid():
  return os.getpid()


def curate(path):
  """Probes and watches a file as a run does: its error code, or "" and its scores."""
  row = {"source_id": "x"} | Probe(max_pixels=4_000_000, max_duration=3600.0).score(path)
  row |= {} if row["error_code"] else Packets().score(path)
  if row["error_code"]:
    return row["error_code"], None
  split = Split(head=0.0, shortest=0.5)
  watched = watch(path, row, (Scan(),), split, None, (Motion(),), Limits(pixels=4_000_000))
  return "", watched


def starves(kind):
  raise kind(errno.ENOMEM, os.strerror(errno.ENOMEM))


def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def code_of(guard, function, *arguments):
  with pytest.raises(DecodeError) as caught:
    guard.call(function, *arguments)
  return caught.value.code


def test_hangs_crashes_and_hunger_are_error_codes_and_the_next_file_is_fine():
  with Guard(Limits(memory=1 << 30, patience=8.0)) as guard:
    first = guard.call(pid)
    assert guard.call(pid) == first
    assert code_of(guard, aborts) == "crashed"
    assert code_of(guard, hoards, 3000) == "out_of_memory"
    assert guard.call(hoards, 20) == 20
    assert guard.call(pid) != first
    before = time.monotonic()
    assert code_of(guard, sleeps, 60) == "decode_timeout"
    assert time.monotonic() - before < 60
    with pytest.raises(RuntimeError, match="a bug of ours"):
      guard.call(stumbles)
    assert guard.call(hoards, 1) == 1
    assert guard.started == 5


@pytest.mark.parametrize("kind", [OSError, ImportError])
def test_a_folder_or_a_library_that_finds_no_memory_is_hunger_too(kind):
  with Guard() as guard:
    assert code_of(guard, starves, kind) == "out_of_memory"


def test_a_long_file_has_a_later_deadline():
  with Guard(Limits(patience=6.0, slowest=20.0)) as guard:
    guard.call(pid)
    assert guard.call(announces_and_sleeps, 7) == "done"


def test_a_limit_that_nothing_fits_in_is_an_error_code_too():
  with Guard(Limits(memory=1 << 20)) as guard:
    assert code_of(guard, pid) == "out_of_memory"


def test_a_child_that_hangs_does_not_outlive_a_killed_run(tmp_path):
  script = tmp_path / "hang.py"
  script.write_text(
    "import time\nfrom data_pipelines.curate.decode import Guard\n"
    "if __name__ == '__main__':\n"
    "  guard = Guard()\n  guard._start()\n  print(guard._process.pid, flush=True)\n"
    "  guard.call(time.sleep, 600)\n"
  )
  with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as run:
    child = int(run.stdout.readline())
    run.kill()
  for _ in range(300):
    if not _alive(child):
      break
    time.sleep(0.1)
  assert not _alive(child)


def _alive(number):
  try:
    with open(f"/proc/{number}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_a_link_out_of_the_folder_is_refused(tmp_path):
  inside, outside = tmp_path / "in", tmp_path / "out"
  inside.mkdir()
  outside.mkdir()
  (outside / "v.mp4").write_bytes(b"x")
  (inside / "v.mp4").write_bytes(b"x")
  (inside / "good.mp4").symlink_to(inside / "v.mp4")
  (inside / "bad.mp4").symlink_to(outside / "v.mp4")
  (inside / "folder").symlink_to(outside)
  refuse_link(inside / "good.mp4", inside)
  for name in ("bad.mp4", "folder/v.mp4", "../out/v.mp4"):
    with pytest.raises(DecodeError) as caught:
      refuse_link(inside / name, inside)
    assert caught.value.code == "linked_outside"


# Mutants


ORIGINALS = {}


def motion_jpeg(video, fps):
  """An AVI of JPEGs, whose headers say the size of each frame themselves."""
  file = io.BytesIO()
  with av.open(file, "w", format="avi") as container:
    stream = container.add_stream("mjpeg", rate=fps)
    stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuvj420p"
    for picture in video:
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      for packet in stream.encode(frame):
        container.mux(packet)
    for packet in stream.encode():
      container.mux(packet)
  return file.getvalue()


@pytest.fixture(scope="module")
def originals():
  video = moving(11, 1.5, height=64, width=96)
  ORIGINALS.update(
    {
      ".mp4": encode_video(video, 12),
      ".mkv": encode_video(video, 12, container=".mkv"),
      ".webm": encode_video(video, 12, container=".webm", codec="libvpx-vp9"),
      ".avi": motion_jpeg(video, 12),
      ".mov": encode_video(video, 12, container=".mov", codec="mpeg4"),
    }
  )
  return ORIGINALS


def bit_flips(data, suffix, rng):
  data = bytearray(data)
  for place in rng.integers(0, len(data), int(rng.integers(1, 40))):
    data[place] ^= 1 << int(rng.integers(8))
  return bytes(data), suffix


def truncation(data, suffix, rng):
  return data[: int(rng.integers(1, len(data)))], suffix


def wrong_extension(data, suffix, rng):
  others = [s for s in (".mp4", ".mkv", ".avi", ".ts", ".txt", ".jpg") if s != suffix]
  others = [s for s in others if (s, suffix) not in ((".mp4", ".mov"), (".mkv", ".webm"))]
  return data, others[int(rng.integers(len(others)))]


def no_bytes(data, suffix, rng):
  return b"", suffix


def huge_header(data, suffix, rng):
  side = 20_000
  if suffix == ".avi":  # in each picture's own header
    return _replaced(data, b"\xff\xc0\x00\x11\x08", struct.pack(">HH", side, side), 5), suffix
  if suffix in (".mkv", ".webm"):  # in VP9's, from the fifth bit after its sync code
    return _huge_vp9(data if suffix == ".webm" else ORIGINALS[".webm"], side), ".webm"
  kind = b"avc1" if b"avc1" in data[data.find(b"stsd") :] else b"mp4v"
  place = data.find(kind, data.find(b"stsd")) + 28
  return data[:place] + struct.pack(">HH", side, side) + data[place + 4 :], suffix


def _huge_vp9(data, side):
  data, place = bytearray(data), -1
  while (place := data.find(b"\x49\x83\x42", place + 1)) >= 0:
    bits = int.from_bytes(data[place + 3 : place + 8], "big")
    sizes = (side - 1) << 16 | (side - 1)
    bits = bits & ~(0xFFFFFFFF << 4) | sizes << 4
    data[place + 3 : place + 8] = bits.to_bytes(5, "big")
  return bytes(data)


def absurd_duration(data, suffix, rng):
  long = struct.pack(">I", 2**31 - 1)
  if suffix in (".mp4", ".mov"):
    if rng.integers(2):
      return _replaced(data, b"stts", struct.pack(">I", 2**28), 16, once=True), suffix
    return _replaced(_replaced(data, b"mdhd", long, 20), b"mvhd", long, 20), suffix
  if suffix == ".avi":  # a frame lasts hours
    return _replaced(data, b"strh", struct.pack("<I", 2**28), 28, once=True), suffix
  return _replaced(data, b"\x44\x89\x88", struct.pack(">d", 1e15), 3, once=True), suffix


def _replaced(data, mark, value, offset, once=False):
  data, place = bytearray(data), -1
  while (place := data.find(mark, place + 1)) >= 0:
    data[place + offset : place + offset + len(value)] = value
    if once:
      break
  return bytes(data)


def flipped_jpegs(original, count):
  """Files of one flipped bit in an image's coded data, and the frame that it is in."""
  rng = np.random.default_rng(1)
  starts = [place for place in range(len(original)) if original.startswith(b"\xff\xda", place)]
  for _ in range(count):
    frame = int(rng.integers(len(starts)))
    data = bytearray(original)
    end = original.index(b"\xff\xd9", starts[frame])
    data[int(rng.integers(starts[frame] + 20, end))] ^= 1 << int(rng.integers(8))
    yield bytes(data), frame


def test_images_of_motion_jpeg_that_end_before_their_data_are_damage(originals, tmp_path):
  path = tmp_path / "v.avi"
  path.write_bytes(originals[".avi"])
  whole = Packets().score(path)
  assert whole["packets_md5"] and "error_code" not in whole
  found = []
  for data, frame in flipped_jpegs(originals[".avi"], 30):
    path.write_bytes(data)
    scores = Packets().score(path)
    if scores.get("error_code"):
      assert scores["error_code"] == "damaged"
      assert f"number {frame}:" in scores["error"]
      found.append(frame)
  assert len(found) >= 15


def jpeg(picture):
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "JPEG")
  return file.getvalue()


def test_a_long_film_of_images_has_time(originals, tmp_path, monkeypatch):
  announced = []
  monkeypatch.setattr(decode, "_announce", announced.append)
  path = tmp_path / "v.avi"
  path.write_bytes(originals[".avi"])
  Packets().score(path)
  assert announced == [pytest.approx(1.5)]


def test_what_most_images_of_a_film_have_is_a_habit_of_its_recorder():
  """Padding before the end, two fields in a packet: other players show these films well."""
  pictures = [jpeg(picture) for picture in moving(3, 1.0)[:10]]
  padded = [picture[:-2] + bytes([18] * 40) + picture[-2:] for picture in pictures]
  fields = [picture + bytes(5) + picture for picture in pictures]
  torn = fields[3][: -len(pictures[3]) // 2] + b"\xff\xd9"  # in its second field

  def found(packets, pixels=1 << 20):
    damage = jpegs.Damage(pixels)
    for packet in packets:
      damage.add(packet)
    return damage.found()

  assert found(pictures) is None
  assert found(padded) is None
  assert found([*pictures, padded[0]]).startswith("1 of its 11 images are; number 10:")
  assert found(fields) is None
  assert "number 3:" in found([*fields[:3], torn, *fields[4:]])
  large = jpeg(np.zeros((2000, 2000, 3), np.uint8))
  assert "2000 x 2000 pixels" in found([*pictures, large])


MUTATIONS = {
  bit_flips: 200, truncation: 130, wrong_extension: 40, no_bytes: 10, huge_header: 60,
  absurd_duration: 60,
}  # fmt: skip
EXPECTED = {
  truncation: {"truncated", "not_media", "damaged", "no_video"},
  wrong_extension: {"wrong_extension"},
  no_bytes: {"empty"},
  huge_header: {"too_large", "damaged"},
  absurd_duration: {"too_long", "truncated"},
}


def pictures(path):
  with av.open(str(path)) as container:
    return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(float)


def worst_psnr(path, suffix):
  """Of its frames against those of the file that it was made from, in dB."""
  found, wanted = pictures(path), pictures(path.with_name(f"good{suffix}"))
  assert found.shape == wanted.shape
  worst = np.square(found - wanted).mean(axis=(1, 2, 3)).max()
  return 10 * np.log10(255**2 / max(worst, 1e-9))


def test_no_mutant_of_500_does_harm(originals, tmp_path):
  """Each is rejected with a reason, but those whose flipped bits hardly change a picture: these are
  whole videos, in which nothing contradicts anything."""
  assert sum(MUTATIONS.values()) == 500
  rng = np.random.default_rng(0)
  counts = collections.Counter()
  kept = []
  with Guard(SMALL) as guard:
    for suffix, data in originals.items():
      path = tmp_path / f"good{suffix}"
      path.write_bytes(data)
      assert guard.call(curate, str(path))[0] == "", suffix
    start = guard.call(resident)
    for mutate, number in MUTATIONS.items():
      for i in range(number):
        suffix = list(originals)[i % len(originals)]
        data, name = mutate(originals[suffix], suffix, rng)
        path = tmp_path / f"{mutate.__name__}_{i}{name}"
        path.write_bytes(data)
        try:
          code, _ = guard.call(curate, str(path))
        except DecodeError as error:
          code = error.code
        counts[mutate.__name__, suffix, code] += 1
        if mutate is not bit_flips:
          assert code in EXPECTED[mutate], (mutate.__name__, suffix, code)
        elif code:
          assert code in CODES
        else:
          kept.append((path.name, worst_psnr(path, suffix)))
        path.unlink()
    assert guard.call(resident) - start < 100 << 20
    assert guard.started <= 3
  assert len(kept) <= 3 and min(psnr for _, psnr in kept) > 40, (kept, counts)
