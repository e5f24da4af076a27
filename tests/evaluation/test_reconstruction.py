"""PSNR and SSIM against values known by hand and against a slow, literal reference."""

import numpy as np
import pytest

from mgen_jax.evaluation import reconstruction


def videos(seed: int, shape=(2, 3, 16, 20, 3)) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
  """SSIM of two frames [H, W, 3] as it is defined, one 7x7 window after the other."""
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  values = []
  for channel in range(3):
    for top in range(a.shape[0] - 6):
      for left in range(a.shape[1] - 6):
        x = a[top : top + 7, left : left + 7, channel].astype(float).ravel()
        y = b[top : top + 7, left : left + 7, channel].astype(float).ravel()
        (xx, xy), (_, yy) = np.cov(x, y)  # divides by 48
        luminance = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
        values.append(luminance * (2 * xy + c2) / (xx + yy + c2))
  return float(np.mean(values))


def test_psnr_of_a_constant_error_is_the_one_of_the_formula():
  a = np.full((1, 2, 8, 8, 3), 100, np.uint8)
  np.testing.assert_allclose(reconstruction.psnr(a, a + 10), 20 * np.log10(255 / 10))


def test_psnr_counts_the_error_both_ways():
  a, b = videos(0), videos(1)  # differences beyond what uint8 holds
  error = np.square(a.astype(float) - b.astype(float)).mean(axis=(2, 3, 4))
  expected = (10 * np.log10(255**2 / error)).mean(axis=1)
  np.testing.assert_allclose(reconstruction.psnr(a, b), expected)
  np.testing.assert_allclose(reconstruction.psnr(b, a), expected)


def test_equal_clips_have_the_highest_values_that_there_are():
  a = videos(2)
  np.testing.assert_array_equal(reconstruction.psnr(a, a), [100.0, 100.0])
  np.testing.assert_allclose(reconstruction.ssim(a, a), [1.0, 1.0])


def test_a_clip_is_the_mean_of_its_frames():
  a, b = videos(3), videos(4)
  for measure in (reconstruction.psnr, reconstruction.ssim):
    frames = [measure(a[:, t : t + 1], b[:, t : t + 1]) for t in range(3)]
    np.testing.assert_allclose(measure(a, b), np.mean(frames, axis=0))


def test_ssim_equals_its_definition():
  clean = np.tile(np.arange(0, 240, 12, dtype=np.uint8)[None, :, None], (16, 1, 3))[None, None]
  noisy = np.clip(clean + np.random.default_rng(5).normal(0, 12, clean.shape), 0, 255)
  for a, b in [(clean, noisy.astype(np.uint8)), (videos(6)[:1, :1], videos(7)[:1, :1])]:
    np.testing.assert_allclose(reconstruction.ssim(a, b), [slow_ssim(a[0, 0], b[0, 0])], rtol=1e-9)


def test_ssim_of_two_flat_frames_is_their_luminance_term():
  a, b = (np.full((1, 1, 9, 9, 3), value, np.uint8) for value in (100, 150))
  c1 = 2.55**2
  expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
  np.testing.assert_allclose(reconstruction.ssim(a, b), expected)


@pytest.mark.parametrize("measure", [reconstruction.psnr, reconstruction.ssim])
def test_other_shapes_and_dtypes_are_refused(measure):
  a = videos(8)
  with pytest.raises(ValueError, match="of one shape"):
    measure(a, a[:, :2])
  with pytest.raises(ValueError, match="uint8"):
    measure(a, a.astype(np.float32))


def test_a_frame_smaller_than_the_window_has_no_ssim():
  a = videos(9, (1, 1, 6, 8, 3))
  with pytest.raises(ValueError, match="smaller than 7x7"):
    reconstruction.ssim(a, a)
