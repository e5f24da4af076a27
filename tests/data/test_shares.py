"""Batches of equal tokens, and the share of the steps that each bucket gets."""

import pytest

from mgen_jax.data.buckets import Bucket
from mgen_jax.data.shares import Part, batch_for, of_steps, table
from mgen_jax.errors import UserError

IMAGE, WIDE = Bucket(1, 64, 64), Bucket(1, 48, 80)
SHORT, LONG = Bucket(128, 64, 64), Bucket(256, 64, 64)


def test_batches_hold_the_tokens_that_fit_and_divide():
  """Latent frames of 32, 24 and 16 get batches as 3 : 4 : 6."""
  batches = [batch_for(LONG, 256 * frames, 1_000_000, 8) for frames in (32, 24, 16)]
  assert batches == [120, 160, 240]
  for batch, frames in zip(batches, (32, 24, 16), strict=True):
    assert 1_000_000 * (1 - 8 / batch) < batch * 256 * frames <= 1_000_000
  assert batch_for(LONG, 1000, 8000, 8) == 8
  with pytest.raises(UserError, match=r"256x64x64 have 8,000 tokens: raise it to that"):
    batch_for(LONG, 1000, 7999, 8)


def test_weights_are_shares_of_the_steps():
  parts = {IMAGE: Part(10, 8, 1.0), SHORT: Part(1000, 8, 3.0)}
  assert of_steps(parts) == {IMAGE: 0.25, SHORT: 0.75}


def test_by_examples_every_example_is_drawn_equally_often():
  parts = {IMAGE: Part(900, 30), SHORT: Part(100, 10), LONG: Part(50, 5, weight=2.0)}
  share = of_steps(parts, by="examples")
  epochs = {b: share[b] * p.batch / p.examples for b, p in parts.items()}
  assert epochs[IMAGE] == pytest.approx(epochs[SHORT]) == pytest.approx(epochs[LONG] / 2)
  assert sum(share.values()) == pytest.approx(1)


def test_images_and_videos_keep_the_ratio_that_is_asked_for():
  parts = {IMAGE: Part(9, 3), WIDE: Part(3, 3), SHORT: Part(40, 4), LONG: Part(10, 2)}
  share = of_steps(parts, by="examples", images_to_videos=0.1)
  assert share[IMAGE] + share[WIDE] == pytest.approx(1 / 11)
  assert share[IMAGE] / share[WIDE] == pytest.approx(3)
  assert share[SHORT] / share[LONG] == pytest.approx(2)
  only = {bucket: parts[bucket] for bucket in (SHORT, LONG)}
  assert of_steps(only, images_to_videos=0.1) == {SHORT: 0.5, LONG: 0.5}


def test_the_table_says_what_a_stage_draws():
  parts = {IMAGE: Part(1600, 64, 1.0, 64), LONG: Part(50, 5, 3.0, 2048)}
  header, image, clip = table(parts, of_steps(parts), steps=1000).split("\n")
  assert header.split()[:3] == ["bucket", "examples", "batch"]
  assert image.split() == ["1x64x64", "1,600", "64", "4,096", "25.0", "%", "10.00"]
  assert clip.split() == ["256x64x64", "50", "5", "10,240", "75.0", "%", "75.00"]
