"""Which bucket a clip goes to, and why it goes to none."""

import dataclasses

import pytest

from mgen_jax.data.buckets import (
  Bucket,
  Rejection,
  assign,
  frames_at,
  group,
  parse_bucket,
  sampling_rate,
)
from mgen_jax.errors import UserError

VIDEOS = [Bucket(16, 64, 64), Bucket(24, 64, 64), Bucket(16, 48, 80), Bucket(24, 48, 80)]
IMAGES = [Bucket(1, 64, 64), Bucket(1, 48, 80)]


@dataclasses.dataclass(frozen=True)
class FakeClip:
  kind: str
  width: int
  height: int
  frames: int = 1
  fps: float = 8.0


def test_a_bucket_is_read_from_its_name():
  for bucket in VIDEOS + IMAGES:
    assert parse_bucket(bucket.name) == bucket


@pytest.mark.parametrize("text", ["16x64", "16x64x64x3", "ax64x64", "16*64*64", "", "0x64x64"])
def test_what_is_not_a_bucket_is_refused(text):
  with pytest.raises(UserError, match="bucket"):
    parse_bucket(text)


def test_the_longest_bucket_that_the_frames_fill_wins():
  for frames, expected in [(16, 16), (23, 16), (24, 24), (500, 24)]:
    assert assign(frames, 8.0, 320, 320, VIDEOS).frames == expected


def test_the_nearest_aspect_ratio_wins_among_equal_lengths():
  assert assign(24, 8.0, 640, 360, VIDEOS) == Bucket(24, 48, 80)
  assert assign(24, 8.0, 300, 320, VIDEOS) == Bucket(24, 64, 64)
  # 1.30 is nearer to 1 than to 5/3 by difference of logarithms only barely not: log-midpoint 1.291
  assert assign(24, 8.0, 1300, 1000, VIDEOS, max_crop=0.5) == Bucket(24, 48, 80)
  assert assign(24, 8.0, 1280, 1000, VIDEOS, max_crop=0.5) == Bucket(24, 64, 64)


def test_a_shorter_bucket_is_taken_when_the_longest_would_crop_too_much():
  assert assign(24, 8.0, 64, 64, [Bucket(24, 48, 80), Bucket(16, 64, 64)]) == Bucket(16, 64, 64)


def test_of_two_sizes_the_largest_without_enlargement_wins():
  sizes = [Bucket(16, 64, 64), Bucket(16, 128, 128), Bucket(16, 256, 256)]
  assert assign(16, 8.0, 200, 200, sizes) == Bucket(16, 128, 128)
  assert assign(16, 8.0, 32, 32, sizes) == Bucket(16, 64, 64)


def test_every_rejection_has_its_reason():
  assert assign(15, 8.0, 64, 64, VIDEOS) == Rejection.TOO_SHORT
  assert assign(16, 8.0, 64, 128, VIDEOS) == Rejection.CROPPED
  assert assign(16, 8.0, 64, 128, VIDEOS, max_crop=0.5) == Bucket(16, 64, 64)
  assert assign(48, 8.0, 64, 64, VIDEOS, target_fps=16.0) == Rejection.TOO_SLOW
  assert assign(16, 8.0, 64, 64, []) == Rejection.NO_BUCKET


def test_exactly_the_allowed_crop_is_allowed():
  assert assign(16, 8.0, 400, 300, [Bucket(16, 48, 80)]) == Bucket(16, 48, 80)  # loses 20 %


def test_a_target_rate_counts_the_frames_that_are_left():
  assert frames_at(60, 30.0, None) == 60
  assert frames_at(60, 30.0, 8.0) == 16
  assert assign(60, 30.0, 64, 64, VIDEOS, target_fps=8.0).frames == 16
  # Film on its way to television: 23.976 serves 24, and loses no frame by it.
  assert assign(24, 24000 / 1001, 64, 64, VIDEOS, target_fps=24.0).frames == 24


PAPER = [Bucket(n, 256, 256) for n in (128, 192, 256)]


@pytest.mark.parametrize(
  ("seconds", "frames", "rate"),
  [(4, 128, 32), (5, 128, 25.6), (8, 128, 16), (9, 192, 21.33), (12, 192, 16), (12.5, 256, 20.48),
   (16, 256, 16), (40, 256, 16)],
)  # fmt: skip
def test_a_range_of_rates_gives_the_buckets_of_the_paper(seconds, frames, rate):
  """Movie Gen, Table 2: 4-8 s at 32-16, 8-12 s at 24-16, 12-16 s at 21-16 frames a second."""
  bucket = assign(round(seconds * 60), 60.0, 320, 320, PAPER, target_fps=(16.0, 32.0))
  assert bucket.frames == frames
  found = sampling_rate(round(seconds * 60), 60.0, frames, (16.0, 32.0))
  assert found == pytest.approx(rate, abs=0.01)


def test_no_frame_is_shown_twice_to_reach_a_rate_of_the_range():
  def at(seconds, fps):
    return assign(round(seconds * fps), fps, 320, 320, PAPER, target_fps=(16.0, 32.0))

  assert at(5.4, 24.0).frames == 128
  assert at(5.0, 24.0) == Rejection.TOO_SLOW  # spec: a 24-fps source needs 5.33 s
  assert at(9.0, 16.0).frames == 128  # 192 frames would need 21 a second: a window of 8 s instead
  assert at(3.9, 60.0) == Rejection.TOO_SHORT
  assert at(20.0, 15.0) == Rejection.TOO_SLOW
  assert at(16.0, 24000 / 1501).frames == 256  # 15.99, as good as 16


def test_grouping_keeps_order_and_counts_every_clip():
  clips = [
    FakeClip("video", 64, 64, frames=24),
    FakeClip("video", 160, 96, frames=16),
    FakeClip("video", 64, 64, frames=3),
    FakeClip("image", 80, 80),
    FakeClip("image", 20, 200),
    FakeClip("video", 128, 128, frames=25),
  ]
  groups = group(clips, VIDEOS + IMAGES)
  assert groups.clips[Bucket(24, 64, 64)] == (clips[0], clips[5])
  assert groups.clips[Bucket(16, 48, 80)] == (clips[1],)
  assert groups.clips[Bucket(1, 64, 64)] == (clips[3],)
  assert groups.clips[Bucket(24, 48, 80)] == ()
  assert groups.rejected == {Rejection.TOO_SHORT: 1, Rejection.CROPPED: 1}
  assert "16x48x80" in groups.table()
  assert "shorter than every bucket" in groups.table()


def test_videos_give_images_too_when_asked():
  short = FakeClip("video", 64, 64, frames=3)
  long = FakeClip("video", 160, 96, frames=16)
  groups = group([short, long], VIDEOS + IMAGES, images_from_videos=True)
  assert groups.clips[Bucket(1, 64, 64)] == (short,)
  assert groups.clips[Bucket(1, 48, 80)] == (long,)
  assert groups.clips[Bucket(16, 48, 80)] == (long,)
  assert groups.rejected == {Rejection.TOO_SHORT: 1}
  assert group([short], IMAGES, images_from_videos=True).rejected == {}
  assert group([short], IMAGES).rejected == {Rejection.NO_BUCKET: 1}
