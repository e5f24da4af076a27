"""Marbles: what is seen and heard is what the captions and the truth say, by seed alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from mgen_jax.data.marbles import (
  COLOURS,
  COMPASS,
  EDIT_KINDS,
  MOTIONS,
  PITCHES,
  SHAPES,
  SIZES,
  Object,
  Scene,
  WorldConfig,
  caption,
  evaluation_prompts,
  is_held_out,
  mask,
  possible_edits,
  render,
  sample_edit,
  sample_scene,
  simulate,
  soundtrack,
)
from mgen_jax.errors import ConfigError

FPS = 8.0
SHAPES_OF_FRAMES = ((64, 64), (48, 80), (80, 48))
FULL = WorldConfig()
SIMPLE = WorldConfig(
  shapes=("circle", "square", "triangle", "cross"),
  motions=tuple(COMPASS),
  textures=("plain",),
  backgrounds=("dark grey",),
  cameras=("static",),
  max_objects=1,
)


# Words


def test_captions_of_a_simple_world_say_no_more_than_needed():
  scene = Scene(0, (Object("red", "circle", "small", motion="moves left"),))
  assert caption(scene) == "a small red circle moves left"


def test_captions_name_all_that_could_have_been_otherwise():
  things = (
    Object("red", "circle", "small", "striped", "moves up and left"),
    Object("blue", "star", "large", "plain", "falls"),
    Object("green", "cross", "large", "plain", "bounces", hidden=True),
  )
  scene = Scene(0, things, "white", "zooms in", name_background=True)
  assert caption(scene) == (
    "a small striped red circle moves up and left, and a large blue star falls"
    " on a white background, the camera zooms in"
  )


def test_the_world_is_as_large_as_promised():
  assert len(COLOURS) >= 6 and len(SHAPES) >= 4 and len(SIZES) >= 2 and len(COMPASS) == 8
  assert {"stays still", "falls", "bounces"} <= set(MOTIONS)


def test_sampling_uses_every_word_and_names_no_object_twice():
  seen = set()
  for seed in range(400):
    scene = sample_scene(seed, FULL)
    assert scene == sample_scene(seed, FULL)
    kinds = [(thing.colour, thing.shape) for thing in scene.objects]
    assert len(set(kinds)) == len(kinds)
    seen |= {len(kinds), scene.background, scene.camera}
    for thing in scene.objects:
      seen |= {thing.colour, thing.shape, thing.size, thing.texture, thing.motion}
  words = itertools.chain.from_iterable(
    getattr(FULL, field.name)
    for field in dataclasses.fields(FULL)
    if isinstance(getattr(FULL, field.name), tuple)
  )
  assert seen == {1, 2, 3, *words}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"colours": ("red", "gren")}, 'did you mean "green"'),
    ({"shapes": ()}, "at least one"),
    ({"motions": ("moves left", "moves left")}, "each once"),
    ({"max_objects": 4}, "max_objects 4"),
    ({"min_objects": 2, "max_objects": 1}, "min_objects is 2"),
    ({"colours": ("red",), "shapes": ("circle",)}, "cannot be made"),
    ({"split": "test"}, 'split is "test"'),
  ],
)
def test_a_world_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    WorldConfig(**changes)


# What is held out


@pytest.mark.parametrize("config", [FULL, SIMPLE])
def test_training_shows_every_pair_but_not_every_combination(config):
  words = (config.colours, config.shapes, config.motions)
  kept = [c for c in itertools.product(*words) if not is_held_out(*c)]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert {(c[i], c[j]) for c in kept} == set(itertools.product(words[i], words[j]))
  share = 1 - len(kept) / len(list(itertools.product(*words)))
  assert 0.2 < share < 0.3


def test_splits_do_not_leak():
  for split, held_out in (("train", False), ("held_out", True)):
    config = dataclasses.replace(FULL, split=split)
    for seed in range(100):
      for thing in sample_scene(seed, config).objects:
        assert is_held_out(thing.colour, thing.shape, thing.motion) == held_out


def test_a_world_that_keeps_nothing_back_is_asked_for_all_of_it():
  config = dataclasses.replace(SIMPLE, split="all")
  count = len(COLOURS) * len(config.shapes) * len(config.motions)
  prompts = evaluation_prompts(config, count, seed=1)
  assert len({(p.colour, p.shape, p.motion) for p in prompts}) == count


def test_held_out_prompts_are_new_to_training_and_cover_both_sizes():
  config = dataclasses.replace(SIMPLE, split="train")
  count = sum(is_held_out(*c) for c in itertools.product(COLOURS, config.shapes, config.motions))
  prompts = evaluation_prompts(config, 2 * count, seed=1)
  assert all(is_held_out(p.colour, p.shape, p.motion) for p in prompts)
  assert len({(p.colour, p.shape, p.motion) for p in prompts[:count]}) == count
  assert len({p.text for p in prompts}) == 2 * count
  assert {p.size for p in prompts[:8]} == set(SIZES)
  assert prompts[0].text == (
    f"a {prompts[0].size} {prompts[0].colour} {prompts[0].shape} {prompts[0].motion}"
  )
  assert prompts == evaluation_prompts(config, 2 * count, seed=1)
  assert prompts != evaluation_prompts(config, 2 * count, seed=2)


# Motion


@pytest.mark.parametrize("size", SHAPES_OF_FRAMES)
@pytest.mark.parametrize("frames", [16, 24])
def test_objects_keep_their_course_inside_the_frame_and_move_visibly(size, frames):
  for seed in range(40):
    scene = sample_scene(seed, SIMPLE)
    track = simulate(scene, frames, *size, FPS)
    centres, radii = track.in_pixels(*size)
    assert (centres - radii[..., None]).min() >= -1e-9
    assert (centres + radii[..., None] <= np.array(size[::-1]) + 1e-9).all()
    way = (centres[0, -1] - centres[0, 0]) / min(size)
    step = np.array(COMPASS[scene.objects[0].motion])
    assert np.hypot(*way) >= 0.25
    assert way @ step / np.hypot(*way) / np.hypot(*step) > 0.9999


def test_objects_of_any_scene_stay_in_view_and_apart():
  for seed in range(150):
    scene = sample_scene(seed, FULL)
    size = SHAPES_OF_FRAMES[seed % 3]
    track = simulate(scene, (1, 4, 16, 48)[seed % 4], *size, FPS)
    centres, radii = track.in_pixels(*size)
    assert (centres - radii[..., None]).min() >= -1e-4
    assert (centres + radii[..., None] - np.array(size[::-1])).max() <= 1e-4
    for a, b in itertools.combinations(range(len(scene.objects)), 2):
      gaps = np.linalg.norm(track.positions[a] - track.positions[b], axis=-1)
      assert gaps.min() > track.radii[a] + track.radii[b]


def test_bounces_are_where_a_path_meets_a_wall_whatever_the_frame_rate():
  scene = Scene(3, (Object("red", "circle", "small", motion="bounces"),))
  slow, fast = simulate(scene, 24, 64, 64, 8.0), simulate(scene, 2400, 64, 64, 800.0)
  assert slow.bounces == fast.bounces
  assert slow.bounces
  for bounce in fast.bounces:
    x, y = fast.positions[0, round(bounce.time * 800.0)]
    r = fast.radii[0]
    gap = {"left wall": x - r, "right wall": 1 - r - x, "ceiling": y - r, "floor": 1 - r - y}
    assert abs(gap[bounce.other]) < 0.002


def test_what_falls_gets_faster_until_the_floor():
  scene = Scene(5, (Object("red", "square", "small", motion="falls"),))
  track = simulate(scene, 240, 64, 64, 120.0)
  first = track.bounces[0]
  assert first.other == "floor"
  fall = np.diff(track.positions[0, : int(first.time * 120), 1])
  assert (np.diff(fall) > 0).all()
  assert np.ptp(track.positions[0, :, 0]) == 0


def test_free_objects_bounce_off_each_other_and_keep_their_energy():
  things = tuple(
    Object(colour, "circle", "large", motion="bounces") for colour in ("red", "green", "blue")
  )
  met = 0
  for seed in range(10):
    track = simulate(Scene(seed, things), 4800, 64, 64, 1200.0)
    meetings = [bounce for bounce in track.bounces if bounce.other.startswith("object")]
    met += len(meetings)
    speeds = np.linalg.norm(np.diff(track.positions, axis=1) * 1200, axis=-1)
    energy = (speeds**2).sum(axis=0)
    assert np.median(abs(energy / energy[0] - 1)) < 1e-6
    for a, b in itertools.pairwise(meetings):
      if a.time == b.time:
        assert a.other == f"object {b.object}"
  assert met > 10


def test_cameras_move_the_picture_the_right_way():
  still = (Object("red", "circle", "small"),)
  for move, axis, sign in (("pans left", 0, 1), ("pans down", 1, -1)):
    centres, _ = simulate(Scene(0, still, camera=move), 16, 64, 64, FPS).in_pixels(64, 64)
    way = centres[0, -1] - centres[0, 0]
    assert sign * way[axis] > 5 and way[1 - axis] == 0
  for move, grows in (("zooms in", True), ("zooms out", False)):
    _, radii = simulate(Scene(0, still, camera=move), 16, 64, 64, FPS).in_pixels(64, 64)
    assert (radii[0, -1] > radii[0, 0]) == grows


# Pictures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_an_object_is_drawn_where_and_how_the_truth_says(shape, size):
  scene = Scene(1, (Object("red", shape, size, motion="moves right"),))
  video = render(scene, 4, 64, 96, FPS)
  share = mask(scene, 0, 4, 64, 96, FPS)
  background, colour = np.array([40, 42, 46]), np.array(COLOURS["red"])
  wanted = background + (colour - background) * share[..., None]
  assert abs(video - wanted).max() <= 1
  centres, radii = simulate(scene, 4, 64, 96, FPS).in_pixels(64, 96)
  for t in range(4):
    rows, columns = (share[t] > 0.5).any(1).nonzero()[0], (share[t] > 0.5).any(0).nonzero()[0]
    assert abs(columns.mean() + 0.5 - centres[0, t, 0]) <= 1
    assert abs(rows.mean() + 0.5 - centres[0, t, 1]) <= 0.25 * radii[0, t]


def test_the_double_is_the_single_after_averaging():
  for seed in range(24):
    scene = sample_scene(seed, FULL)
    single = render(scene, 4, 48, 80, FPS).astype(float)
    double = render(scene, 4, 96, 160, FPS).astype(float)
    averaged = double.reshape(4, 48, 2, 80, 2, 3).mean(axis=(2, 4))
    error = abs(averaged - single)
    assert error.mean() < 1.0
    assert np.quantile(error, 0.99) < 24


def test_positions_do_not_depend_on_the_number_of_pixels():
  scene = sample_scene(7, FULL)
  single, double = (simulate(scene, 8, side, side, FPS) for side in (64, 128))
  np.testing.assert_array_equal(single.positions, double.positions)


# Sound


def test_every_bounce_starts_its_tone_on_its_sample():
  scene = Scene(4, (Object("red", "star", "small", motion="bounces"),))
  track = simulate(scene, 24, 64, 64, FPS)
  samples = soundtrack(scene, track)
  assert len(samples) == 3 * 48000 and abs(samples).max() <= 1
  first = round(track.bounces[0].time * 48000)
  assert not samples[: first + 1].any()
  assert samples[first + 1 : first + 20].any()
  spectrum = abs(np.fft.rfft(samples[first : first + 9600]))
  assert abs(np.argmax(spectrum) * 5 - PITCHES["star"]) <= 5


def test_shapes_sound_different_and_silence_is_silent():
  pitches = sorted(PITCHES.values())
  assert set(PITCHES) == set(SHAPES)
  assert min(b / a for a, b in itertools.pairwise(pitches)) > 1.15
  still = Scene(0, (Object("red", "circle", "small"),))
  assert not soundtrack(still, simulate(still, 16, 64, 64, FPS)).any()


# Edits


def test_an_edited_twin_differs_only_inside_the_object_it_names():
  kinds = set()
  for seed in range(60):
    scene = sample_scene(seed, FULL)
    track = simulate(scene, 6, 64, 64, FPS)
    edit = sample_edit(scene, FULL, track, seed)
    kinds.add(edit.kind)
    before, after = (render(each, 6, 64, 64, FPS) for each in (edit.source, edit.target))
    changed = (before != after).any(axis=-1)
    assert changed.any(), edit.instruction
    if edit.kind == "background":
      continue
    inside = np.maximum(*(mask(s, edit.object, 6, 64, 64, FPS) for s in (edit.source, edit.target)))
    assert not changed[inside == 0].any(), edit.instruction
    words = edit.instruction.split()
    assert edit.source.objects[edit.object].shape in words
  assert kinds == set(EDIT_KINDS)


def test_edits_stay_in_their_split_and_leave_what_is_met_alone():
  config = dataclasses.replace(FULL, split="train", min_objects=3)
  for seed in range(15):
    scene = sample_scene(seed, config)
    track = simulate(scene, 24, 64, 64, FPS)
    met = {b.object for b in track.bounces if b.other.startswith("object")}
    for edit in possible_edits(scene, config, track):
      for thing in edit.target.objects:
        assert not is_held_out(thing.colour, thing.shape, thing.motion)
      if edit.kind in ("remove", "add"):
        assert edit.object not in met
