"""Frechet distances: the formula, and features that order damage."""

import numpy as np
import pytest
from scipy import linalg

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


@pytest.mark.parametrize("features", [frechet.random_frame_features, frechet.random_clip_features])
def test_random_features_order_damage_and_never_change(features):
  rng = np.random.default_rng(1)
  clips = np.repeat(np.repeat(rng.integers(0, 256, (8, 4, 8, 8, 3)), 4, 2), 4, 3).astype(np.uint8)
  noisy = [
    np.clip(clips + level * rng.standard_normal(clips.shape), 0, 255).astype(np.uint8)
    for level in (10, 60)
  ]
  base = features(clips)
  assert base.shape == ((32 if features is frechet.random_frame_features else 8), 64)
  near, far = (frechet.distance(base, features(x)) for x in noisy)
  assert 0 < near < far
  np.testing.assert_array_equal(base, features(clips))
