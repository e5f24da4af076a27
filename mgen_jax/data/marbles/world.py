"""What a Marbles scene can hold, how scenes are drawn by seed, and the captions they get.

A scene is words, not pixels: colours, shapes, motions, a background, a camera. Where the objects
are at each frame follows from it in `physics.py`, the pictures in `render.py`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mgen_jax.errors import ConfigError, suggest

# sRGB. All are saturated and all backgrounds are not, so that a hue tells object and colour.
COLOURS: dict[str, tuple[int, int, int]] = {
  "red": (222, 38, 44),
  "green": (38, 176, 60),
  "blue": (46, 78, 232),
  "yellow": (242, 222, 46),
  "purple": (168, 52, 208),
  "orange": (246, 132, 24),
  "cyan": (40, 204, 222),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Half the width of an object, in units of the frame's short side; see `radius`.
SIZES: dict[str, float] = {"small": 0.12, "large": 0.2}
TEXTURES = ("plain", "striped", "dotted", "checked")
# The compass: name -> unit step (x to the right, y down), before it is scaled to length 1.
COMPASS: dict[str, tuple[int, int]] = {
  "moves left": (-1, 0),
  "moves right": (1, 0),
  "moves up": (0, -1),
  "moves down": (0, 1),
  "moves up and left": (-1, -1),
  "moves up and right": (1, -1),
  "moves down and left": (-1, 1),
  "moves down and right": (1, 1),
}
MOTIONS = (*COMPASS, "stays still", "falls", "bounces")
BACKGROUNDS = ("dark grey", "white", "black", "beige", "gradient", "noisy")
CAMERAS = (
  "static", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out",
)  # fmt: skip
IDENTITIES = 8  # how many phases and angles of a texture there are

# With more objects each is smaller, so that they always have room to move.
_CROWD_SCALE = {1: 1.0, 2: 0.75, 3: 0.6}


@dataclasses.dataclass(frozen=True)
class Object:
  """One marble. `identity` picks the phase and angle of its texture."""

  colour: str
  shape: str
  size: str
  texture: str = "plain"
  motion: str = "stays still"
  identity: int = 0
  hidden: bool = False  # it takes part in nothing that is seen or heard (see edits.py)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A few objects, a background and a camera; `seed` decides places, speeds and textures."""

  seed: int
  objects: tuple[Object, ...]
  background: str = "dark grey"
  camera: str = "static"
  name_background: bool = False  # whether the caption says which background


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """What scenes are drawn from; the defaults are the full world.

  Raises ConfigError for a word that the world does not know and for a world without a scene.
  """

  colours: tuple[str, ...] = tuple(COLOURS)
  shapes: tuple[str, ...] = SHAPES
  sizes: tuple[str, ...] = tuple(SIZES)
  motions: tuple[str, ...] = MOTIONS
  textures: tuple[str, ...] = TEXTURES
  backgrounds: tuple[str, ...] = BACKGROUNDS
  cameras: tuple[str, ...] = CAMERAS
  min_objects: int = 1
  max_objects: int = 3
  # "train" leaves out every (colour, shape, motion) for which is_held_out; "held_out" has only them
  split: Literal["all", "train", "held_out"] = "all"

  def __post_init__(self):
    known = {
      "colours": tuple(COLOURS),
      "shapes": SHAPES,
      "sizes": tuple(SIZES),
      "motions": MOTIONS,
      "textures": TEXTURES,
      "backgrounds": BACKGROUNDS,
      "cameras": CAMERAS,
    }
    for field, words in known.items():
      chosen = getattr(self, field)
      if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"{field} is {chosen}: give at least one word, each once.")
      for word in chosen:
        if word not in words:
          raise ConfigError(f'{field} has "{word}": {suggest(str(word), words)}')
    if self.split not in ("all", "train", "held_out"):
      raise ConfigError(f'split is "{self.split}": use "all", "train" or "held_out".')
    if not 1 <= self.min_objects <= self.max_objects <= max(_CROWD_SCALE):
      raise ConfigError(
        f"min_objects is {self.min_objects} and max_objects {self.max_objects}: use 1 <= min <= max"
        f" <= {max(_CROWD_SCALE)}."
      )
    kinds = {(colour, shape) for colour, shape, _ in _combinations(self)}
    if len(kinds) < self.max_objects:
      raise ConfigError(
        f"{self.max_objects} different objects cannot be made of colours {self.colours}, shapes"
        f' {self.shapes} and motions {self.motions} with split "{self.split}": allow more words.'
      )


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text to generate from, and what a judge should see."""

  text: str
  colour: str
  shape: str
  motion: str
  size: str


def is_held_out(colour: str, shape: str, motion: str) -> bool:
  """Whether the combination is kept out of training: a quarter of them are.

  Every pair of the three words still occurs in training, with any other third word of another
  residue; so a model that composes can draw what it has never seen.
  """
  total = tuple(COLOURS).index(colour) + SHAPES.index(shape) + MOTIONS.index(motion)
  return total % 4 == 0


def radius(scene: Scene, index: int) -> float:
  """Half the width of an object, in units of the frame's short side."""
  return SIZES[scene.objects[index].size] * _CROWD_SCALE[len(scene.objects)]


def sample_scene(seed: int, config: WorldConfig) -> Scene:
  """Draws a scene; the same seed and config give the same scene everywhere.

  No two objects of a scene share colour and shape, so that "the red circle" names one object.
  """
  rng = np.random.default_rng([seed, 0])
  count = int(rng.integers(config.min_objects, config.max_objects + 1))
  combinations = _combinations(config)
  chosen: list[tuple[str, str, str]] = []
  while len(chosen) < count:
    candidate = combinations[rng.integers(len(combinations))]
    if all(candidate[:2] != other[:2] for other in chosen):
      chosen.append(candidate)
  objects = tuple(
    Object(
      colour=colour,
      shape=shape,
      size=_draw(rng, config.sizes),
      texture=_draw(rng, config.textures),
      motion=motion,
      identity=int(rng.integers(IDENTITIES)),
    )
    for colour, shape, motion in chosen
  )
  return Scene(
    seed=seed,
    objects=objects,
    background=_draw(rng, config.backgrounds),
    camera=_draw(rng, config.cameras),
    name_background=len(config.backgrounds) > 1,
  )


def caption(scene: Scene) -> str:
  """The exact text of a scene: "a small red circle moves left" and so on.

  Plain textures, a static camera and the only background of a world go without saying.
  """
  parts = [f"a {describe(thing)} {thing.motion}" for thing in scene.objects if not thing.hidden]
  if not parts:
    text = "nothing"
  elif len(parts) < 3:
    text = ", and ".join(parts)
  else:
    text = ", ".join(parts[:-1]) + f", and {parts[-1]}"
  if scene.name_background or not parts:
    text += f" on a {scene.background} background"
  if scene.camera != "static":
    text += f", the camera {scene.camera}"
  return text


def describe(thing: Object) -> str:
  """ "small striped red circle"."""
  texture = "" if thing.texture == "plain" else f"{thing.texture} "
  return f"{thing.size} {texture}{thing.colour} {thing.shape}"


def evaluation_prompts(config: WorldConfig, n: int, seed: int) -> list[Prompt]:
  """n prompts to judge a model of this world by.

  Under split "train" their (colour, shape, motion) are those that no scene has; a world that
  leaves none out is asked for all that it has.

  All combinations come once before any comes twice, in an order given by the seed, and sizes take
  turns. Raises ConfigError if the world's words make no held-out combination.
  """
  split = "held_out" if config.split == "train" else config.split
  combinations = _combinations(dataclasses.replace(config, split=split, max_objects=1))
  order = np.random.default_rng([seed, 1]).permutation(len(combinations))
  prompts = []
  for i in range(n):
    turn, place = divmod(i, len(order))
    colour, shape, motion = combinations[order[place]]
    size = config.sizes[(place + turn) % len(config.sizes)]
    scene = Scene(
      seed=0,
      objects=(Object(colour, shape, size, config.textures[0], motion),),
      background=config.backgrounds[0],
      camera=config.cameras[0],
      name_background=len(config.backgrounds) > 1,
    )
    prompts.append(Prompt(caption(scene), colour, shape, motion, size))
  return prompts


@functools.lru_cache(maxsize=64)
def _combinations(config: WorldConfig) -> tuple[tuple[str, str, str], ...]:
  """The (colour, shape, motion) that the split allows."""
  keep = {"all": (False, True), "train": (False,), "held_out": (True,)}[config.split]
  product = itertools.product(config.colours, config.shapes, config.motions)
  return tuple(words for words in product if is_held_out(*words) in keep)


def _draw(rng: np.random.Generator, words: Sequence[str]) -> str:
  return words[rng.integers(len(words))]
