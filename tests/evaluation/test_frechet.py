"""Frechet distances: the formula, and features that order damage as eyes do."""

import numpy as np
import pytest
from scipy import linalg

from mgen_jax.data import marbles
from mgen_jax.errors import UserError
from mgen_jax.evaluation import frechet


def test_distance_is_the_formula_of_two_normals():
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((60, 5)), 2.0 * rng.standard_normal((80, 5)) + 0.5
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  expected = np.square(a.mean(0) - b.mean(0)).sum()
  expected += np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
  assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-8)
  assert frechet.distance(a, a) == pytest.approx(0.0, abs=1e-9)
  with pytest.raises(UserError, match="have no Frechet distance"):
    frechet.distance(a[:1], b)


def test_distance_along_common_axes_is_the_closed_form():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.standard_normal((3, 3)))[0]
  points = rng.standard_normal((4000, 3))
  points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
  first = points @ np.diag([1.0, 2.0, 3.0]) @ basis
  second = points @ np.diag([2.0, 2.0, 1.0]) @ basis + np.array([1.0, 0.0, 2.0])
  assert frechet.distance(first, second) == pytest.approx(5.0 + 1.0 + 0.0 + 4.0, rel=1e-6)


@pytest.mark.parametrize(
  ("features", "shape"),
  [(frechet.random_frame_features, (32, 64)), (frechet.random_clip_features, (8, 160))],
)
def test_random_features_order_damage_and_never_change(features, shape):
  rng = np.random.default_rng(1)
  clips = np.repeat(np.repeat(rng.integers(0, 256, (8, 4, 8, 8, 3)), 4, 2), 4, 3).astype(np.uint8)
  noisy = [
    np.clip(clips + level * rng.standard_normal(clips.shape), 0, 255).astype(np.uint8)
    for level in (10, 60)
  ]
  base = features(clips)
  assert base.shape == shape
  near, far = (frechet.distance(base, features(x)) for x in noisy)
  assert 0 < near < far
  np.testing.assert_array_equal(base, features(clips))


def _clips(colour, motion, count=12):
  things = [(marbles.Object(colour, "circle", "large", motion=motion),) for _ in range(count)]
  scenes = [marbles.Scene(seed, thing) for seed, thing in enumerate(things)]
  return np.stack([marbles.render(scene, 8, 32, 32, 4.0) for scene in scenes])


def test_videos_of_another_colour_or_without_motion_are_farther_away():
  real = _clips("red", "moves left", 24)
  others = {
    "same": real[12:],
    "colour": _clips("blue", "moves left"),
    "still": np.repeat(real[12:, :1], 8, 1),
  }
  base = frechet.random_clip_features(real[:12])
  gaps = {k: frechet.distance(base, frechet.random_clip_features(v)) for k, v in others.items()}
  assert gaps["same"] < 0.5 * gaps["colour"] and gaps["same"] < 0.5 * gaps["still"]
