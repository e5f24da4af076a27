"""Where the objects of a scene are at each frame, and when they bounce.

Objects that keep a course (the compass, "stays still") are placed so that they stay in the room for
the whole clip and never meet each other. "falls" and "bounces" move freely: they reflect off the
walls, off each other and off those that keep their course. Between two bounces every path is an
exact parabola, so bounce times are exact too and do not depend on the frame rate.

Units: the short side of the frame is 1, x to the right, y down, times in seconds. Every object
counts as a circle of its radius (a little more between objects, for the corners of a square).
"""

import dataclasses
import functools
import math

import numpy as np

from mgen_jax.data.marbles.world import COMPASS, Object, Scene, radius

MIN_TRAVEL = 0.3  # of the short side, over a clip, for an object that moves
_SPEED = (0.2, 0.26)  # short sides a second, on a course
_BOUNCE_SPEED = (0.55, 0.8)
_MIN_BOUNCE_TRAVEL = 1.2
_CORNERS = 1.12  # how far objects keep apart, in sums of their radii
_PAN = 0.2  # how far a camera pans over a clip, in short sides
_ZOOM = (0.86, 1.16)
_FLOOR_RESTITUTION = 0.6
_REST_SPEED = 0.12  # a slower rebound ends a fall
_ATTEMPTS = 3000
_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class Bounce:
  """Object `object` meets `other` ("floor", "left wall", ..., or "object 2") at `time`."""

  time: float
  object: int
  other: str


@dataclasses.dataclass(frozen=True)
class Track:
  """The motion of a scene with N objects over T frames; frame k is at time k / fps.

  positions [N, T, 2] (x, y) of centres in the world; velocities [N, 2] at time 0; radii [N];
  camera_centres [T, 2]; zooms [T]; room (left, top, right, bottom).
  """

  positions: np.ndarray
  velocities: np.ndarray
  radii: np.ndarray
  camera_centres: np.ndarray
  zooms: np.ndarray
  room: tuple[float, float, float, float]
  bounces: tuple[Bounce, ...]
  duration: float

  def in_pixels(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [N, T, 2] (x, y) and radii [N, T] as seen by the camera.

    A pixel (row, column) covers [column, column + 1] x [row, row + 1].
    """
    scale = self.zooms * min(height, width)
    middle = np.array([width, height]) / 2
    centres = (self.positions - self.camera_centres) * scale[:, None] + middle
    return centres, self.radii[:, None] * scale


@functools.lru_cache(maxsize=16)
def simulate(scene: Scene, frames: int, height: int, width: int, fps: float) -> Track:
  """Places the objects of a scene and moves them for frames / fps seconds.

  Only the aspect of height and width counts. Hidden objects are simulated like the others, so that
  a scene and its edited twin move alike.
  """
  size = np.array([width, height]) / min(height, width)
  duration = frames / fps
  centres, zooms = _camera(scene.camera, size, np.arange(frames) / frames)
  room = _room(scene.camera, size)
  radii = np.array([radius(scene, i) for i in range(len(scene.objects))])
  times = np.arange(frames) / fps
  for attempt in range(_ATTEMPTS):
    rng = np.random.default_rng([scene.seed, 2, attempt])
    shrink = 1 - 0.8 * attempt / _ATTEMPTS  # ever shorter ways, if it is crowded
    bodies = [
      _place(rng, thing, r, room, duration, shrink)
      for thing, r in zip(scene.objects, radii, strict=True)
    ]
    velocities = np.array([body.v for body in bodies])
    bounces = _run(bodies, room, duration)
    if bounces is None or not _as_described(scene, bounces, duration):
      continue
    positions = np.stack([body.positions(times) for body in bodies])
    low = positions - radii[:, None, None] - room[:2]
    high = room[2:] - positions - radii[:, None, None]
    if min(low.min(), high.min()) > -1e-6:  # nothing was squeezed through a wall
      # fmt: off
      return Track(positions, velocities, radii, centres, zooms, room, tuple(bounces), duration)
      # fmt: on
  raise RuntimeError(f"{scene} cannot be placed in a frame of {height}x{width}.")


class _Body:
  """An object on its way: position p + v s + a s^2 / 2 for s seconds after `time`."""

  def __init__(self, p, v, a, r, free):
    self.p, self.v, self.a = np.array(p), np.array(v), np.array(a)
    self.r, self.free, self.gravity = r, free, np.array(a)
    self.time = 0.0
    self.mass = r * r if free else math.inf
    self._legs = []
    self.turn()

  def advance(self, time):
    s = time - self.time
    self.p = self.p + self.v * s + self.a * (s * s / 2)
    self.v = self.v + self.a * s
    self.time = time

  def turn(self):
    """Notes that a new leg starts here and now."""
    self._legs.append((self.time, self.p, self.v, self.a))

  def positions(self, times) -> np.ndarray:
    starts = np.array([leg[0] for leg in self._legs])
    place = np.searchsorted(starts, times, side="right") - 1
    p, v, a = (np.array([leg[i] for leg in self._legs])[place] for i in (1, 2, 3))
    s = (times - starts[place])[:, None]
    return p + v * s + a * (s * s / 2)


def _camera(camera, size, phases) -> tuple[np.ndarray, np.ndarray]:
  """Centres [T, 2] and zooms [T] at phases 0 <= phase < 1 of the clip."""
  verb, _, way = camera.partition(" ")
  step = np.array(COMPASS[f"moves {way}"] if verb == "pans" else (0, 0))
  centres = size / 2 + _PAN * (phases - 0.5)[:, None] * step
  first, last = {"in": _ZOOM, "out": _ZOOM[::-1]}[way] if verb == "zooms" else (1.0, 1.0)
  return centres, first + (last - first) * phases


def _room(camera, size) -> tuple[float, float, float, float]:
  """What is in view for the whole clip: the walls."""
  inset = np.zeros(2)
  if camera.startswith("pans"):
    inset[0 if camera.endswith(("left", "right")) else 1] = _PAN / 2
  elif camera.startswith("zooms"):
    inset = size / 2 * (1 - 1 / _ZOOM[1])
  return (*(float(x) for x in inset), *(float(x) for x in size - inset))


def _place(rng, thing: Object, r, room, duration, shrink) -> _Body:
  low, high = np.array(room[:2]) + r, np.array(room[2:]) - r
  span = high - low
  spot = rng.uniform(size=2)  # drawn first: edits must not move the others
  pace, angle = rng.uniform(size=2)
  still = np.zeros(2)
  if thing.motion in COMPASS:
    way = np.array(COMPASS[thing.motion]) / math.hypot(*COMPASS[thing.motion])
    longest = min(0.98 * s / abs(w) for s, w in zip(span, way, strict=True) if w)
    travel = max(duration * (_SPEED[0] + pace * (_SPEED[1] - _SPEED[0])), MIN_TRAVEL)
    step = way * min(travel, longest) * shrink
    start = low + np.maximum(0, -step) + spot * (span - abs(step))
    return _Body(start, step / duration, still, r, free=False)
  if thing.motion == "falls":
    start = low + spot * span * (1, 0.15)
    fall = min(0.4 * duration, 1.1)
    return _Body(start, still, (0.0, 2 * (high[1] - start[1]) / fall**2), r, free=True)
  if thing.motion == "bounces":
    speed = _BOUNCE_SPEED[0] + pace * (_BOUNCE_SPEED[1] - _BOUNCE_SPEED[0])
    speed = max(speed, _MIN_BOUNCE_TRAVEL / duration)
    # Never nearly along an axis.
    quarter, part = divmod(4 * angle, 1)
    radians = math.radians(90 * quarter + 20 + 50 * part)
    way = np.array([math.cos(radians), math.sin(radians)])
    return _Body(low + spot * span, way * speed, still, r, free=True)
  return _Body(low + spot * span, still, still, r, free=False)


def _run(bodies, room, duration) -> list[Bounce] | None:
  """Moves the bodies to the end; None if that cannot be (a meeting of courses, a jam)."""
  pairs = [(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1 :]]
  if any(_distance(a, b) < _CORNERS * (a.r + b.r) for a, b in pairs):
    return None
  bounces = []
  now = 0.0
  for _ in range(40 + int(12 * duration)):
    hits = [hit for body in bodies if body.free for hit in _wall_hits(body, room)]
    hits += [(_meeting(a, b), a, b) for a, b in pairs]
    wait, body, other = min(hits, key=lambda hit: hit[0], default=(math.inf, None, None))
    now += wait
    if now >= duration:
      return bounces
    for each in bodies:
      each.advance(now)
    if isinstance(other, _Body):
      if not (body.free or other.free):
        return None
      _collide(body, other)
      bounces.append(Bounce(now, bodies.index(body), f"object {bodies.index(other)}"))
      bounces.append(Bounce(now, bodies.index(other), f"object {bodies.index(body)}"))
    else:
      _reflect(body, other)
      bounces.append(Bounce(now, bodies.index(body), _WALLS[other]))
  return None


_WALLS = {(0, -1): "left wall", (0, 1): "right wall", (1, -1): "ceiling", (1, 1): "floor"}


def _wall_hits(body, room):
  for axis, side in _WALLS:
    wall = room[axis] + body.r if side < 0 else room[axis + 2] - body.r
    p, v, a = body.p[axis] - wall, body.v[axis], body.a[axis]
    if side * p > -_TINY and side * v > _TINY:  # at the wall and on its way out
      yield 0.0, body, (axis, side)
      continue
    for s in _roots(a / 2, v, p):
      if s > 0 and side * (v + a * s) > _TINY:
        yield s, body, (axis, side)


def _reflect(body, wall):
  axis, side = wall
  falling = wall == (1, 1) and body.gravity[1] > 0
  v = body.v.copy()
  v[axis] = -side * abs(v[axis]) * (_FLOOR_RESTITUTION if falling else 1.0)
  if falling and abs(v[1]) < _REST_SPEED:
    v[1], body.a = 0.0, np.zeros(2)
  body.v = v
  body.turn()


def _meeting(a, b) -> float:
  """Seconds until two bodies touch, infinity for never."""
  p, v, g = b.p - a.p, b.v - a.v, (b.a - a.a) / 2
  reach = _CORNERS * (a.r + b.r)
  constant, linear = p @ p - reach * reach, 2 * (p @ v)
  if constant < _TINY and linear < -_TINY:  # they touch and come nearer
    return 0.0
  if g.any():
    powers = [g @ g, 2 * (v @ g), v @ v + 2 * (p @ g), linear, constant]
    found = [float(s.real) for s in np.roots(powers) if abs(s.imag) < 1e-7]
  else:
    found = _roots(v @ v, linear, constant)
  nearing = (s for s in found if s > 0 and (p + v * s + g * s * s) @ (v + 2 * g * s) < -_TINY)
  return min(nearing, default=math.inf)


def _collide(a, b):
  """An elastic collision; a body that keeps its course does not feel it."""
  normal = (b.p - a.p) / _distance(a, b)
  push = 2 * ((b.v - a.v) @ normal) / (1 / a.mass + 1 / b.mass)
  for body, sign in ((a, 1), (b, -1)):
    if body.free:
      body.v = body.v + sign * push / body.mass * normal
      body.a = body.gravity
      body.turn()


def _distance(a, b) -> float:
  return math.hypot(*(b.p - a.p))


def _roots(a, b, c) -> list[float]:
  """Real roots of a x^2 + b x + c."""
  if abs(a) < 1e-12:
    return [-c / b] if abs(b) > 1e-12 else []
  under = b * b - 4 * a * c
  if under < 0:
    return []
  q = -(b + math.copysign(math.sqrt(under), b)) / 2
  return [q / a, c / q] if abs(q) > 1e-300 else [0.0]


def _as_described(scene, bounces, duration) -> bool:
  """Whether whatever should bounce does, early enough to be seen."""
  seen = {bounce.object for bounce in bounces if bounce.time < 0.85 * duration}
  return all(
    i in seen for i, thing in enumerate(scene.objects) if thing.motion in ("falls", "bounces")
  )
