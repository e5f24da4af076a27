"""How close a video is to another: PSNR and SSIM of uint8 arrays. Knows no model.

Both are computed frame by frame; the value of a clip is the mean over its frames, and that of a set
of clips the mean over clips. (PSNR of the error pooled over a clip is lower: a single bad frame
weighs more.) Not here: perceptual distances, which need trained networks.
"""

import numpy as np

PEAK = 255.0
# PSNR of two equal frames would be infinite, and so would every mean over them.
MAX_PSNR = 100.0

# SSIM as in its paper (Wang et al., 2004) with scikit-image's defaults: a uniform 7x7 window, the
# covariance of a sample, and the border that a window does not fill is left out.
_WINDOW = 7
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(reference: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio in dB (peak 255), at most 100.

  Args:
    reference: uint8 [N, T, H, W, 3].
    made: the same shape.

  Returns:
    float64 [N]: of each clip, the mean over its frames.

  Raises:
    ValueError: other dtypes, or shapes that differ.
  """
  _check(reference, made)
  error = np.empty(reference.shape[:2])
  for n, t in np.ndindex(error.shape):  # a frame at a time: squares of a whole set are large
    difference = reference[n, t].astype(np.float64) - made[n, t]
    error[n, t] = np.mean(np.square(difference))
  decibel = 10.0 * np.log10(PEAK**2 / np.maximum(error, 1e-12))
  return np.minimum(decibel, MAX_PSNR).mean(axis=1)


def ssim(reference: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Structural similarity, in [-1, 1], of each colour channel and then their mean.

  Equals scikit-image's `structural_similarity(a, b, data_range=255, channel_axis=-1)` per frame.

  Args:
    reference: uint8 [N, T, H, W, 3], at least 7 pixels high and wide.
    made: the same shape.

  Returns:
    float64 [N]: of each clip, the mean over its frames.

  Raises:
    ValueError: other dtypes, shapes that differ, or frames smaller than the window.
  """
  _check(reference, made)
  if min(reference.shape[2:4]) < _WINDOW:
    raise ValueError(f"frames of {reference.shape[2:4]} are smaller than {_WINDOW}x{_WINDOW}")
  values = np.empty(reference.shape[:2])
  for n, t in np.ndindex(values.shape):
    values[n, t] = _ssim_of_frame(reference[n, t].astype(np.float64), made[n, t].astype(np.float64))
  return values.mean(axis=1)


def _ssim_of_frame(a: np.ndarray, b: np.ndarray) -> float:
  """Mean SSIM of two frames [H, W, 3]."""
  mean_a, mean_b = _window_mean(a), _window_mean(b)
  pixels = _WINDOW**2
  sample = pixels / (pixels - 1)  # the covariance of a sample
  var_a = sample * (_window_mean(a * a) - mean_a * mean_a)
  var_b = sample * (_window_mean(b * b) - mean_b * mean_b)
  covariance = sample * (_window_mean(a * b) - mean_a * mean_b)
  above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
  below = (mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)
  return float(np.mean(above / below))


def _window_mean(x: np.ndarray) -> np.ndarray:
  """Mean over every 7x7 window inside the frame: [H, W, 3] -> [H - 6, W - 6, 3]."""
  for axis in (0, 1):
    sums = np.cumsum(x, axis=axis)
    sums = np.insert(sums, 0, 0.0, axis=axis)
    size = sums.shape[axis]
    upper = np.take(sums, range(_WINDOW, size), axis=axis)
    x = (upper - np.take(sums, range(size - _WINDOW), axis=axis)) / _WINDOW
  return x


def _check(reference: np.ndarray, made: np.ndarray) -> None:
  if reference.dtype != np.uint8 or made.dtype != np.uint8:
    raise ValueError(f"videos are uint8, not {reference.dtype} and {made.dtype}")
  if reference.shape != made.shape or reference.ndim != 5:
    raise ValueError(
      f"videos are [N, T, H, W, 3] of one shape, not {reference.shape}, {made.shape}"
    )
