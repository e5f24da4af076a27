"""The Frechet distance: known values, and that it orders videos as eyes do."""

import numpy as np
import pytest

from mgen_jax.data import marbles
from mgen_jax.evaluation import frechet


def test_it_is_that_of_gaussians():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.standard_normal((3, 3)))[0]
  points = rng.standard_normal((4000, 3))
  points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
  first = points @ np.diag([1.0, 2.0, 3.0]) @ basis  # same axes: the distance has a closed form
  second = points @ np.diag([2.0, 2.0, 1.0]) @ basis + np.array([1.0, 0.0, 2.0])
  assert frechet.distance(first, second) == pytest.approx(5.0 + 1.0 + 0.0 + 4.0, rel=1e-6)
  assert frechet.distance(first, first) == pytest.approx(0.0, abs=1e-6)


def _clips(colour, motion, count=12):
  things = [(marbles.Object(colour, "circle", "large", motion=motion),) for _ in range(count)]
  scenes = [marbles.Scene(seed, thing) for seed, thing in enumerate(things)]
  return np.stack([marbles.render(scene, 8, 32, 32, 4.0) for scene in scenes])


def test_videos_of_another_colour_or_without_motion_are_farther_away():
  real = _clips("red", "moves left", 24)
  near = frechet.of_videos(real[:12], real[12:])
  other = frechet.of_videos(real[:12], _clips("blue", "moves left"))
  still = frechet.of_videos(real[:12], np.repeat(real[12:, :1], 8, 1))
  assert near < 0.5 * other and near < 0.5 * still
