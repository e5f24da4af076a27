"""Accuracies count what a prompt asks for, and say how sure they are and what guessing gives."""

import types

import numpy as np
import pytest

from mgen_jax.data import marbles
from mgen_jax.evaluation import alignment


def prompt(colour="red", shape="circle", motion="moves left") -> marbles.Prompt:
  return marbles.Prompt(f"a small {colour} {shape} {motion}", colour, shape, motion, "small")


def seen(colour="red", shape="circle", direction="moves left"):
  return types.SimpleNamespace(colour=colour, shape=shape, direction=direction)


def test_accuracies_are_shares_of_the_videos_that_are_right():
  verdicts = [
    alignment.compare(seen(), prompt()),
    alignment.compare(seen(colour="blue"), prompt()),
    alignment.compare(seen(colour=None, shape=None, direction=None), prompt()),
    alignment.compare(seen(direction="moves right"), prompt()),
  ]
  found = alignment.accuracies(verdicts)
  assert (found["colour"], found["shape"], found["direction"]) == (0.5, 0.75, 0.5)
  assert found["all"] == 0.25 and found["prompts"] == 4
  assert found["interval"]["colour"] == alignment.wilson(2, 4)


def test_what_a_prompt_does_not_say_does_not_count():
  verdicts = [
    alignment.compare(seen(direction="moves up"), prompt(motion="bounces")),
    alignment.compare(seen(), prompt()),
  ]
  found = alignment.accuracies(verdicts)
  assert found["direction"] == 1.0 and found["counted"]["direction"] == 1
  assert found["all"] == 1.0 and found["counted"]["all"] == 2


def test_an_image_is_asked_for_no_direction():
  verdict = alignment.compare(seen(direction=None), prompt(), frames=1)
  found = alignment.accuracies([verdict])
  assert (
    found["all"] == 1.0 and found["direction"] is None and found["interval"]["direction"] is None
  )


@pytest.mark.parametrize(
  ("motion", "direction"),
  [("falls", "moves down"), ("stays still", "stays still"), ("moves up", "moves up")],
)
def test_a_motion_is_seen_as_its_direction(motion, direction):
  world = marbles.WorldConfig(
    motions=(motion,), textures=("plain",), backgrounds=("dark grey",), cameras=("static",),
    max_objects=1,
  )  # fmt: skip
  for seed in range(4):
    scene = marbles.sample_scene(seed, world)
    thing = scene.objects[0]
    clip = marbles.render(scene, 16, 64, 64, 8.0)
    verdict = alignment.judge_video(clip, prompt(thing.colour, thing.shape, motion), world)
    assert verdict.all_right, verdict
    assert verdict.checks[2].wanted == direction


def test_chance_is_one_of_the_words_of_the_world():
  world = marbles.WorldConfig(
    colours=("red", "blue"),
    shapes=("circle", "square", "star", "cross"),
    motions=("moves left", "moves right", "falls", "moves down", "bounces"),
  )
  found = alignment.chance(world)
  assert (found["colour"], found["shape"]) == (1 / 2, 1 / 4)
  assert found["direction"] == pytest.approx(1 / 3)  # a fall is seen as "moves down"
  assert found["all"] == pytest.approx(1 / 24)


def test_the_interval_is_the_one_of_wilson():
  # Newcombe (1998), table I: 81 of 263, and 15 of 148.
  np.testing.assert_allclose(alignment.wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
  np.testing.assert_allclose(alignment.wilson(15, 148), (0.0624, 0.1605), atol=5e-5)
  low, high = alignment.wilson(96, 96)
  assert high == pytest.approx(1.0) and 0.95 < low < 0.97
  assert alignment.wilson(0, 29)[0] == pytest.approx(0.0)


def test_videos_of_another_world_are_told():
  world = marbles.WorldConfig(
    colours=("red",), shapes=("circle",), motions=("moves left",), max_objects=1
  )
  clips = [
    marbles.render(
      marbles.Scene(0, (marbles.Object("red", "circle", "large", motion=motion),)), 8, 64, 64, 4.0
    )
    for motion in ("moves left", "moves right")
  ]
  verdicts = [alignment.judge_video(clip, None, world) for clip in clips]
  assert alignment.of_world(verdicts, world) == 0.5
  still = [alignment.judge_video(clip[:1], None, world) for clip in clips]
  assert alignment.of_world(still, world) == 1.0  # an image has no direction
  found = alignment.accuracies(verdicts)  # they were asked for nothing
  assert found["all"] is None and found["counted"]["all"] == 0 and found["prompts"] == 2
