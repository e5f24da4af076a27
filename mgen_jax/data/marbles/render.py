"""Pictures of a scene: anti-aliased, vectorised over frames, the same bytes on every machine.

Shapes are signed distances, evaluated only in a patch around each object, for all frames at once.
Only +, -, *, /, sqrt and comparisons touch pixels (they round alike everywhere). All is laid out in
units of the frame's short side, so a render at twice the size is the twin that an upsampler should
find: averaged over 2x2 pixels it is the render at the single size, to within anti-aliasing.
"""

import math

import numpy as np

from mgen_jax.data.marbles.physics import Track, simulate
from mgen_jax.data.marbles.world import COLOURS, IDENTITIES, Object, Scene

_PLAIN = {
  "dark grey": (40, 42, 46),
  "white": (240, 240, 240),
  "black": (8, 8, 8),
  "beige": (206, 196, 176),
}
_GRADIENT = ((34, 38, 48), (150, 152, 156))
_NOISE = (104.0, 34.0)  # mean and amplitude of the "noisy" background's grey
_NOISE_CELL = 0.05  # of its finest grains, in short sides
_OUTSIDE = 0.72  # brightness beyond the walls of the room, seen when the camera moves
_DARK = 0.5  # of the second tone of a texture
_STAR_INNER = 0.5  # radius of the star's inner corners
_COS36, _SIN36 = math.cos(math.radians(36)), math.sin(math.radians(36))


def render(scene: Scene, frames: int, height: int, width: int, fps: float) -> np.ndarray:
  """Renders a scene to uint8 [T, H, W, 3]."""
  track = simulate(scene, frames, height, width, fps)
  video = _background(scene, track, height, width)
  centres, radii = track.in_pixels(height, width)
  for i, thing in enumerate(scene.objects):
    if not thing.hidden:
      _draw(video, thing, centres[i], radii[i])
  return video


def coverage(shape: str, x: np.ndarray, y: np.ndarray, pixels: np.ndarray | float) -> np.ndarray:
  """How much of each pixel a shape covers, 0 to 1.

  Args:
    shape: one of SHAPES.
    x, y: pixel centres relative to the shape's centre, in units of its radius.
    pixels: its radius in pixels; broadcasts with x and y.
  """
  return np.clip(0.5 - _DISTANCES[shape](x, y) * pixels, 0, 1)


def mask(scene: Scene, index: int, frames: int, height: int, width: int, fps: float) -> np.ndarray:
  """Where one object is: its share of each pixel, float32 [T, H, W]; others do not hide it."""
  track = simulate(scene, frames, height, width, fps)
  centres, radii = track.in_pixels(height, width)
  out = np.zeros((frames, height, width), np.float32)
  x, y, left, top = _patch(centres[index], radii[index])
  share = coverage(scene.objects[index].shape, x, y, radii[index][:, None, None])
  for t in range(frames):
    into, of = _overlap(top[t], left[t], share.shape[1], height, width)
    out[t][into] = share[t][of]
  return out


# Objects


def _draw(video, thing: Object, centres, radii):
  """Paints an object over [T, H, W, 3]; centres [T, 2] and radii [T] in pixels."""
  x, y, left, top = _patch(centres, radii)
  pixels = radii[:, None, None]
  share = coverage(thing.shape, x, y, pixels)[..., None]
  bright = np.array(COLOURS[thing.colour], np.float64)
  dark = _texture(thing, x, y, pixels)
  paint = bright if dark is None else bright * (1 - (1 - _DARK) * dark[..., None])
  height, width = video.shape[1:3]
  for t in range(len(video)):
    into, of = _overlap(top[t], left[t], share.shape[1], height, width)
    colour = paint if dark is None else paint[t][of]
    under = video[t][into]
    video[t][into] = under + (colour - under) * share[t][of] + 0.5


def _patch(centres, radii):
  """Square windows around an object.

  Returns x, y [T, P, P], pixel centres in units of the radius, and the windows' left and top [T].
  """
  side = 2 * math.ceil(radii.max() * 1.1 + 1.5) + 1
  corner = np.floor(centres).astype(int) - side // 2
  offset = np.arange(side) + 0.5
  x = (corner[:, :1] + offset - centres[:, :1]) / radii[:, None]
  y = (corner[:, 1:] + offset - centres[:, 1:]) / radii[:, None]
  shape = (len(centres), side, side)
  return (
    np.broadcast_to(x[:, None, :], shape),
    np.broadcast_to(y[:, :, None], shape),
    corner[:, 0],
    corner[:, 1],
  )


def _overlap(top, left, side, height, width):
  """The part of a window that lies in the frame: slices of the frame and of the window."""
  y0, y1 = max(top, 0), min(top + side, height)
  x0, x1 = max(left, 0), min(left + side, width)
  into = (slice(y0, max(y1, y0)), slice(x0, max(x1, x0)))
  of = (slice(y0 - top, max(y1, y0) - top), slice(x0 - left, max(x1, x0) - left))
  return into, of


def _circle(x, y):
  return np.sqrt(x * x + y * y) - 1


def _square(x, y):
  return np.maximum(abs(x), abs(y)) - 0.9


def _triangle(x, y):
  # Apex (0, -1), base from (-1, 0.85) to (1, 0.85).
  slope = 1 / math.hypot(1.85, 1.0)
  sides = (1.85 * abs(x) - (y + 1)) * slope
  return np.maximum(sides, y - 0.85)


def _cross(x, y):
  x, y = abs(x), abs(y)
  return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.36)


def _star(x, y):
  """Five points, the first upwards: the plane folded onto one half of one point."""
  x, y = abs(x), -y
  for side in (1, -1):
    nx, ny = side * _COS36, -_SIN36
    over = 2 * np.maximum(nx * x + ny * y, 0)
    x, y = x - over * nx, y - over * ny
  # Distance to the edge from the tip (0, 1) to the inner corner, and the side of it.
  x, y = abs(x), y - 1
  edge_x, edge_y = _STAR_INNER * _SIN36, _STAR_INNER * _COS36 - 1
  along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
  dx, dy = x - along * edge_x, y - along * edge_y
  outside = y * edge_x - x * edge_y > 0
  return np.where(outside, 1, -1) * np.sqrt(dx * dx + dy * dy)


_DISTANCES = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "star": _star,
  "cross": _cross,
}


def _texture(thing: Object, x, y, pixels):
  """The share of the dark tone, 0 to 1, or None for a plain object."""
  if thing.texture == "plain":
    return None
  angle = math.pi * thing.identity / IDENTITIES
  cos, sin = math.cos(angle), math.sin(angle)
  u, v = cos * x + sin * y, cos * y - sin * x
  if thing.texture == "striped":
    return _bars(u, 0.75, pixels)
  if thing.texture == "checked":
    first, second = _bars(u, 1.0, pixels), _bars(v, 1.0, pixels)
    return first + second - 2 * first * second
  period = 0.62
  du, dv = u / period, v / period
  du, dv = (du - np.floor(du) - 0.5) * period, (dv - np.floor(dv) - 0.5) * period
  return np.clip(0.5 - (np.sqrt(du * du + dv * dv) - 0.2) * pixels, 0, 1)


def _bars(u, period, pixels):
  """Soft-edged stripes along u, half of each period dark."""
  phase = u / period
  edge = (abs(phase - np.floor(phase) - 0.5) - 0.25) * period
  return np.clip(0.5 - edge * pixels, 0, 1)


# Backgrounds


def _background(scene: Scene, track: Track, height, width) -> np.ndarray:
  """uint8 [T, H, W, 3], writable."""
  frames = len(track.zooms)
  moving = scene.camera != "static"
  shown = slice(None) if moving else slice(1)
  scale = (track.zooms[shown] * min(height, width))[:, None]
  centre = track.camera_centres[shown]
  # World coordinates of pixel centres: x [T or 1, W], y [T or 1, H].
  x = (np.arange(width) + 0.5 - width / 2) / scale + centre[:, :1]
  y = (np.arange(height) + 0.5 - height / 2) / scale + centre[:, 1:]
  x, y = x[:, None, :], y[:, :, None]
  if scene.background == "gradient":
    picture = _gradient(scene.seed, x, y, track)
  elif scene.background == "noisy":
    picture = _noise(scene.seed, x, y)[..., None] * np.ones(3)
  else:
    picture = np.broadcast_to(
      np.array(_PLAIN[scene.background], np.float64), (len(scale), height, width, 3)
    )
  if moving:
    left, top, right, bottom = track.room
    beyond = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
    outside = np.clip(0.5 + beyond * scale[..., None], 0, 1)[..., None]
    picture = picture * (1 - (1 - _OUTSIDE) * outside)
  rounded = (picture + 0.5).astype(np.uint8)
  return np.array(np.broadcast_to(rounded, (frames, height, width, 3)), order="C")


def _gradient(seed, x, y, track):
  angle = 2 * math.pi * np.random.default_rng([seed, 3]).uniform()
  cos, sin = math.cos(angle), math.sin(angle)
  middle = (np.array(track.room[:2]) + track.room[2:]) / 2
  phase = (cos * (x - middle[0]) + sin * (y - middle[1])) / (2 * abs(middle).max()) + 0.5
  first, second = (np.array(tone, np.float64) for tone in _GRADIENT)
  return first + (second - first) * np.clip(phase, 0, 1)[..., None]


def _noise(seed, x, y):
  """Smooth grey noise of two scales, fixed to the world."""
  rng = np.random.default_rng([seed, 4])
  mean, amplitude = _NOISE
  total = np.full(np.broadcast_shapes(x.shape, y.shape), mean)
  for cell, share in ((_NOISE_CELL, 0.5), (3 * _NOISE_CELL, 0.5)):
    lattice = rng.uniform(-1, 1, (128, 128))
    i, fx = _cells(x / cell)
    j, fy = _cells(y / cell)
    upper = lattice[j, i] * (1 - fx) + lattice[j, i + 1] * fx
    lower = lattice[j + 1, i] * (1 - fx) + lattice[j + 1, i + 1] * fx
    total += amplitude * share * (upper * (1 - fy) + lower * fy)
  return total


def _cells(u):
  """Lattice index and smoothed fraction of each coordinate; the lattice repeats."""
  whole = np.floor(u)
  part = u - whole
  return whole.astype(int) % 127, part * part * (3 - 2 * part)
