"""The sound of a scene: every bounce strikes a tone whose pitch belongs to the shape.

A tone starts on the very sample of its bounce, so that the alignment of picture and sound can be
measured exactly.
"""

import numpy as np

from mgen_jax.data.marbles.physics import Track
from mgen_jax.data.marbles.world import Scene

RATE = 48000
# Hz; no two are octaves of each other.
PITCHES = {"circle": 523.25, "square": 392.0, "triangle": 659.26, "star": 987.77, "cross": 293.66}
_SECONDS = 0.35
_DECAY = 0.07  # seconds to fall to 1/e
_LOUDNESS = 0.5


def soundtrack(scene: Scene, track: Track, rate: int = RATE) -> np.ndarray:
  """float32 [round(duration * rate)] in [-1, 1]; silent for a scene without bounces."""
  samples = np.zeros(round(track.duration * rate))
  for bounce in track.bounces:
    thing = scene.objects[bounce.object]
    if thing.hidden:
      continue
    start = onset(bounce.time, rate)
    ring = tone(thing.shape, rate)[: max(0, len(samples) - start)]
    samples[start : start + len(ring)] += ring
  loudest = np.abs(samples).max(initial=0.0)
  return (samples / max(1.0, loudest)).astype(np.float32)


def onset(time: float, rate: int = RATE) -> int:
  """The first sample of a bounce at `time` seconds."""
  return round(time * rate)


def tone(shape: str, rate: int = RATE) -> np.ndarray:
  """One struck tone, float64 [n]: a few partials that die away, the higher the sooner."""
  t = np.arange(round(_SECONDS * rate)) / rate
  partials = sum(
    weight * np.sin(2 * np.pi * number * PITCHES[shape] * t) * np.exp(-number * t / _DECAY)
    for number, weight in ((1, 1.0), (2, 0.4), (3, 0.2))
  )
  fade = np.minimum(1.0, (len(t) - np.arange(len(t))) / (0.01 * rate))
  return _LOUDNESS * partials * fade
