"""The judge tells from pixels alone what Marbles rendered, also after coding and blur."""

import collections
import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from mgen_jax.data import media
from mgen_jax.data.marbles import (
  COMPASS,
  SHAPES,
  Object,
  Scene,
  Verdict,
  WorldConfig,
  chance,
  judge,
  render,
  sample_scene,
)

FPS = 8.0
WORLD = WorldConfig(
  motions=(*COMPASS, "stays still"),
  textures=("plain",),
  backgrounds=("dark grey",),
  cameras=("static",),
  max_objects=1,
)
SIZES, LENGTHS = ((64, 64), (48, 80)), (16, 24)


def clips(config, count):
  """(object, frames) of single-object scenes, at both sizes and both lengths."""
  for seed in range(count):
    scene = sample_scene(seed, config)
    frames, size = LENGTHS[seed // 2 % 2], SIZES[seed % 2]
    yield scene.objects[0], render(scene, frames, *size, FPS)


def coded(frames):
  return media.read_video(media.encode_video(frames, FPS))


def blurred(frames, sigma=1.0, noise=8.0):
  rng = np.random.default_rng(frames.shape[0])
  soft = ndimage.gaussian_filter(frames.astype(float), (0, sigma, sigma, 0))
  return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


def score(config, count, change):
  """The share of right words of each kind, in percent."""
  right = collections.Counter()
  for thing, frames in clips(config, count):
    verdict = judge(change(frames))
    right["colour"] += verdict.colour == thing.colour
    right["shape"] += verdict.shape == thing.shape
    right["size"] += verdict.size == thing.size
    right["direction"] += verdict.direction == thing.motion
  return {word: 100 * right[word] / count for word in ("colour", "shape", "size", "direction")}


def test_it_is_right_on_coded_clips():
  assert min(score(WORLD, 200, coded).values()) >= 99


def test_it_is_right_on_blurred_and_noisy_clips():
  assert min(score(WORLD, 40, blurred).values()) >= 95
  assert min(score(WORLD, 40, lambda frames: coded(blurred(frames))).values()) >= 95


def test_it_is_right_on_pale_clips():
  assert min(score(WORLD, 40, lambda v: blurred((0.4 * v + 70).astype(np.uint8))).values()) >= 95


@pytest.mark.parametrize(
  "changes",
  [
    {"backgrounds": ("white", "black", "beige", "gradient", "noisy")},
    {"textures": ("striped", "dotted", "checked")},
  ],
)
def test_other_backgrounds_and_textures_do_not_mislead_it(changes):
  assert min(score(dataclasses.replace(WORLD, **changes), 40, coded).values()) >= 97


def test_one_frame_has_no_direction_but_all_else():
  right = 0
  for thing, frames in clips(WORLD, 40):
    verdict = judge(coded(frames[8:9]))
    assert verdict.direction is None and verdict.displacement is None
    right += (verdict.colour, verdict.shape, verdict.size) == (
      thing.colour,
      thing.shape,
      thing.size,
    )
  assert right >= 39


def test_it_follows_the_largest_of_several_objects():
  things = (
    Object("yellow", "star", "small", motion="moves left"),
    Object("blue", "square", "large", motion="moves right"),
  )
  verdict = judge(coded(render(Scene(2, things), 16, 64, 64, FPS)))
  assert (verdict.colour, verdict.shape, verdict.direction) == ("blue", "square", "moves right")


def test_it_sees_nothing_where_there_is_nothing():
  rng = np.random.default_rng(0)
  noise = np.clip(rng.normal(60, 8, (16, 64, 64, 3)), 0, 255).astype(np.uint8)
  soft = ndimage.gaussian_filter(rng.normal(0, 1, (16, 64, 64, 3)), (0, 2, 2, 0))
  blobs = np.clip(60 + 8 * soft / soft.std(), 0, 255).astype(np.uint8)
  empty = np.full((16, 64, 64, 3), 40, np.uint8)
  for frames in (noise, blobs, empty, noise[:1], empty[:1]):
    assert judge(frames) == Verdict()


def test_it_measures_place_and_pace():
  scene = Scene(1, (Object("red", "circle", "large", motion="moves up and right"),))
  verdict = judge(render(scene, 16, 64, 64, FPS))
  assert verdict.radius == pytest.approx(0.2, rel=0.05)
  x, y = verdict.displacement
  assert x == pytest.approx(-y, rel=0.05) and np.hypot(x, y) > 0.25
  assert verdict.confidence > 0.9


def test_it_chooses_among_the_words_of_a_world():
  config = dataclasses.replace(WORLD, shapes=("square", "triangle"), colours=("green", "blue"))
  scene = Scene(1, (Object("cyan", "circle", "large"),))
  verdict = judge(render(scene, 4, 64, 64, FPS), config)
  assert verdict.shape == "square" and verdict.colour in ("green", "blue")


def test_chance_is_one_in_the_number_of_words():
  assert chance(WORLD) == {
    "colour": 1 / 7, "shape": 1 / len(SHAPES), "size": 1 / 2, "direction": 1 / 9,
  }  # fmt: skip
