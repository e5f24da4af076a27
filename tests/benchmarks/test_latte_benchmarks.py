"""The benchmarks of Latte compare the same step, and tell arms apart in a table."""

import dataclasses

import pytest

from benchmarks import latte_ablations, latte_step
from mgen_jax.data import marbles
from mgen_jax.models import latte


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_both_sides_are_the_same_step(dtype, within):
  pytest.importorskip("torch", reason="needs torch, of the extra test")
  config = dataclasses.replace(latte.size("S/8"), layers=2, width=48, heads=4, dtype=dtype)
  steps = latte_step.steps_of(config, frames=2, side=16)
  assert steps["jax"]() == pytest.approx(steps["torch"](), rel=within)


def test_every_class_is_asked_for_alike():
  world = marbles.WorldConfig(
    colours=("red", "blue"), shapes=("circle",), motions=("moves left", "moves up"), max_objects=1,
    textures=("plain",), backgrounds=("dark grey",), cameras=("static",), sizes=("large",),
  )  # fmt: skip
  texts = [prompt.text for prompt in latte_ablations.prompts_of(world, 8)]
  assert {texts.count(text) for text in texts} == {2}
  # A model by text has learned the words of captions, and no others.
  assert marbles.caption(marbles.sample_scene(0, world)) in texts


def test_the_table_and_its_picture_hold_every_arm():
  rows = [
    {"arm": name, "frechet": 0.1, "colour": 0.9, "shape": 0.5, "direction": 0.7}
    for name in ("v1", "v2")
  ]
  rows.append({"arm": "other clips", "frechet": 0.01})  # nothing was asked for
  table = latte_ablations.markdown(rows).splitlines()
  assert table[0].startswith("| arm | frechet") and len(table) == 5
  assert table[-1] == "| other clips | 0.01 | - | - | - |"
  figure = latte_ablations.plot(rows, {"colour": 0.5, "shape": 0.5, "direction": 0.25})
  assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["v1", "v2"]
  assert len(figure.axes[0].get_yticklabels()) == 3
