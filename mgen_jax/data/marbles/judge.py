"""Says from pixels alone what a clip shows: the main object's colour, shape, size and direction.

It knows the world (its palette, its shapes through the real renderer) but not the scene, so it can
judge generated videos. It forgives blur, faded colours and codec noise: colour is a hue, shape the
best of the templates over size and blur, direction a robust line through all frames. It follows one
object, the largest; a moving camera is not told from a moving object.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from mgen_jax.data.marbles.render import coverage
from mgen_jax.data.marbles.world import COLOURS, COMPASS, SIZES, WorldConfig

_NOISE_FLOOR = 4.0  # levels: smaller differences are never an object
_MIN_CONTRAST = 2.5  # of an object, in spreads of the background
_MIN_MASS, _MAX_MASS = 0.002, 0.5  # of the frame
_MIN_CHROMA = 10.0  # levels: below it a colour is grey
_STILL = 0.1  # short sides: a shorter way over the clip is none
_BLURS = (0.5, 0.8, 1.2, 1.7, 2.3)  # pixels
_SCALES = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.06)  # of the radius of a shape of the area seen


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the judge saw; every word is None if it saw no object.

  direction is one of the compass motions or "stays still", None for fewer than two frames.
  confidence (0 to 1) is how well the object fits its template. displacement (x, y) over the whole
  clip and radius are in short sides of the frame.
  """

  colour: str | None = None
  shape: str | None = None
  size: str | None = None
  direction: str | None = None
  confidence: float = 0.0
  displacement: tuple[float, float] | None = None
  radius: float | None = None


def judge(frames: np.ndarray, config: WorldConfig | None = None) -> Verdict:
  """Judges a clip or an image.

  Args:
    frames: uint8 [T, H, W, 3].
    config: the world whose words to choose from; None is all words. Sizes are told apart for
      scenes of one object.
  """
  if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
    raise ValueError(f"frames are [T, H, W, 3], not {frames.shape}")
  config = config or WorldConfig()
  pixels = frames.astype(np.float64)
  share = _foreground(pixels)
  found = _follow(pixels, share) if share is not None else None
  if found is None:
    return Verdict()
  times, windows = found
  short = min(frames.shape[1:3])
  centres = np.array([_centroid(window) for window in windows])
  displacement = _displacement(times, centres, len(frames))
  shape, fit, radius = _shape(windows, centres, config.shapes)
  radius /= short
  return Verdict(
    colour=_colour(pixels[times], windows, config.colours),
    shape=shape,
    size=min(config.sizes, key=lambda size: abs(math.log(radius / SIZES[size]))),
    direction=None if displacement is None else _direction(displacement / short),
    confidence=fit,
    displacement=None if displacement is None else tuple(float(d) / short for d in displacement),
    radius=radius,
  )


def chance(config: WorldConfig) -> dict[str, float]:
  """How often a guess is right for prompts that use all words of a world alike."""
  return {
    "colour": 1 / len(config.colours),
    "shape": 1 / len(config.shapes),
    "size": 1 / len(config.sizes),
    "direction": 1 / len(config.motions),
  }


# Finding the object


def _foreground(pixels: np.ndarray) -> np.ndarray | None:
  """How much each pixel is object, 0 to 1, [T, H, W]; None if nothing stands out."""
  difference = pixels - _background(pixels[:: max(1, len(pixels) // 6)])
  difference -= np.median(difference, axis=(1, 2), keepdims=True)  # a picture that flickers
  inside = _calm(difference)
  spread = np.cov(difference[inside].T) + _NOISE_FLOOR**2 * np.eye(3)
  # Distances in spreads of the background: what it varies in (the grey of a noisy background)
  # counts less than what it does not (hue).
  white = difference @ np.linalg.cholesky(np.linalg.inv(spread))
  distance = np.sqrt((white * white).sum(axis=-1))
  smooth = ndimage.gaussian_filter(distance, (0, 0.7, 0.7))
  floor = np.median(distance)
  plateau = _plateau(smooth - floor, np.quantile(smooth, 1 - _MIN_MASS) - floor)
  if plateau < _MIN_CONTRAST:
    return None
  return np.clip((distance - floor) / plateau, 0, 1)


def _plateau(values: np.ndarray, peak: float) -> float:
  """The level of the inside of an object, which noise or a narrow tip lift above or below."""
  core = values[values > 0.6 * peak]
  return float(np.quantile(core, 0.6)) if core.size else 0.0


def _background(pixels: np.ndarray) -> np.ndarray:
  """A plane through the background that all frames share, [H, W, 3]."""
  _, height, width, _ = pixels.shape
  y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
  basis = np.stack([np.ones_like(x), x, y], axis=-1)  # [H, W, 3]
  edge = np.ones((height, width), bool)
  edge[2:-2, 2:-2] = False
  plane = np.median(pixels[:, edge].reshape(-1, 3), axis=0) * np.ones((height, width, 1))
  for _ in range(4):  # least squares over what is near the last plane
    inside = _calm(pixels - plane)
    weighted = basis * inside.sum(axis=0)[..., None]
    left = np.einsum("hwi,hwj->ij", weighted, basis)
    right = np.einsum("hwi,hwc->ic", basis, (pixels * inside[..., None]).sum(axis=0))
    plane = basis @ np.linalg.lstsq(left, right, rcond=None)[0]
  return plane


def _calm(difference: np.ndarray) -> np.ndarray:
  """Pixels [T, H, W] that are as near to the background as most are."""
  r, g, b = np.moveaxis(np.abs(difference), -1, 0)
  size = np.maximum(np.maximum(r, g), b)
  return size <= max(3.0 * float(np.median(size)), _NOISE_FLOOR)


def _follow(pixels, share) -> tuple[np.ndarray, np.ndarray] | None:
  """The main object in each frame.

  Returns the frames where it is seen [N] and its share of each pixel there [N, H, W].
  """
  pieces = [_pieces(frame) for frame in share]
  masses = [[(share[t] * piece).sum() for piece in found] for t, found in enumerate(pieces)]
  best = max(
    ((mass, t, i) for t, found in enumerate(masses) for i, mass in enumerate(found)), default=None
  )
  limit = share[0].size
  if best is None or not _MIN_MASS <= best[0] / limit <= _MAX_MASS:
    return None
  wanted = _tone(pixels[best[1]], share[best[1]] * pieces[best[1]][best[2]])
  times, windows = [], []
  for t, found in enumerate(pieces):
    alike = [
      mass / (1 + (_apart(_tone(pixels[t], share[t] * piece), wanted) / 30) ** 2)
      for piece, mass in zip(found, masses[t], strict=True)
    ]
    if alike and max(alike) > 0.2 * best[0]:
      times.append(t)
      windows.append(share[t] * pieces[t][int(np.argmax(alike))])
  return np.array(times), np.stack(windows)


def _pieces(share: np.ndarray) -> list[np.ndarray]:
  """Connected parts of a frame [H, W], each with the soft rim around it."""
  labels, _ = ndimage.label(share > 0.4, np.ones((3, 3)))
  sizes = np.bincount(labels.ravel())[1:]
  order = [i + 1 for i in np.argsort(-sizes)[:4] if sizes[i] > 4]
  return [ndimage.binary_dilation(labels == i, iterations=2) for i in order]


def _tone(pixels, weights) -> np.ndarray:
  return (pixels * weights[..., None]).sum((0, 1)) / weights.sum()


def _apart(a, b) -> float:
  return float(np.linalg.norm(a - b))


def _centroid(window) -> tuple[float, float]:
  """(x, y), pixel centres at whole numbers."""
  total = window.sum()
  y, x = np.indices(window.shape)
  return float((window * x).sum() / total), float((window * y).sum() / total)


# Naming what was found


def _colour(pixels, windows, words) -> str | None:
  """The nearest hue; pixels [N, H, W, 3] and windows [N, H, W]."""
  core = pixels[windows > 0.75]
  if not len(core):
    return None
  # The brighter half: the other may be the dark tone of a texture.
  vivid = core.max(axis=-1) - core.min(axis=-1)
  tone = core[vivid >= np.median(vivid)].mean(axis=0)
  chroma = tone - tone.mean()
  if np.linalg.norm(chroma) < _MIN_CHROMA:
    return None

  def likeness(word):
    reference = np.array(COLOURS[word], np.float64)
    reference -= reference.mean()
    return chroma @ reference / np.linalg.norm(reference)

  return max(words, key=likeness)


def _displacement(times, centres, frames) -> np.ndarray | None:
  """(x, y) pixels from the first frame to the last, along the median of all slopes."""
  if frames < 2 or len(times) < 2:
    return None
  step = max(1, len(times) // 40)
  times, centres = times[::step], centres[::step]
  first, second = np.triu_indices(len(times), k=max(1, len(times) // 3))
  spans = (times[second] - times[first])[:, None]
  return np.median((centres[second] - centres[first]) / spans, axis=0) * (frames - 1)


def _direction(displacement) -> str:
  if math.hypot(*displacement) < _STILL:
    return "stays still"
  return max(
    COMPASS, key=lambda word: displacement @ np.array(COMPASS[word]) / math.hypot(*COMPASS[word])
  )


def _shape(windows, centres, words) -> tuple[str, float, float]:
  """The best template: its word, its overlap with the object (0 to 1) and its radius in pixels."""
  area = float(np.median(windows.sum((1, 2))))
  reach = math.ceil(1.5 * math.sqrt(area / 2) + 3)
  grid = np.arange(-reach, reach + 1.0)
  seen = np.mean(
    [
      ndimage.map_coordinates(
        window, np.meshgrid(y + grid, x + grid, indexing="ij"), order=1, mode="constant"
      )
      for window, (x, y) in zip(windows, centres, strict=True)
    ],
    axis=0,
  )
  best = ("", -1.0, 0.0)
  for word in words:
    _, ground = _moments(word)
    for scale in _SCALES:
      radius = scale * math.sqrt(area / ground)
      for template in _templates(word, round(radius, 2), reach):
        fit = float(np.minimum(seen, template).sum() / np.maximum(seen, template).sum())
        best = max(best, (word, fit, radius), key=lambda found: found[1])
  return best


@functools.lru_cache(maxsize=4096)
def _templates(word: str, radius: float, reach: int) -> np.ndarray:
  """A shape around its centroid with each blur, [blurs, 2 reach + 1, 2 reach + 1]."""
  offset, _ = _moments(word)
  grid = np.arange(-reach, reach + 1) / radius
  sharp = coverage(word, grid[None, :], grid[:, None] + offset, radius)
  blurred = [ndimage.gaussian_filter(sharp, blur) for blur in _BLURS]
  return np.stack([np.clip(each / _plateau(each, each.max()), 0, 1) for each in blurred])


@functools.cache
def _moments(word: str) -> tuple[float, float]:
  """How far below its centre a shape has its centroid, and its area, for radius 1."""
  grid = np.linspace(-1.2, 1.2, 481)
  share = coverage(word, grid[None, :], grid[:, None], 200.0)
  return float((share * grid[:, None]).sum() / share.sum()), float(share.sum() * 0.005**2)
