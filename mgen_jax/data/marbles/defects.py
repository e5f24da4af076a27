"""Clips with something wrong that curation must find, and the exact label of what it is.

Each maker returns a `Clip`: the frames, the scene that they show, and `details`, which says where
and how much. `corrupt` is the one defect of the file rather than the picture.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgen_jax.data.marbles.render import render
from mgen_jax.data.marbles.world import Scene, caption
from mgen_jax.errors import UserError

_TEXTS = ("SAMPLE", "CHANNEL 5", "SUBSCRIBE", "PREVIEW", "(C) 2021", "LIVE 20:15")
_STILLS = 4  # of a slideshow
_BARS = 0.14  # of the side, for each bar of a letterbox
_BRIGHTER = 5  # levels, of a near duplicate
_SHAKE = 0.1  # of the short side, each way


@dataclasses.dataclass(frozen=True)
class Clip:
  """What is written to one file.

  `inner` is the (height, width) that the scene was rendered at and `shift` [T, 2] (x, y) what to
  add to its pixel positions to find them in `frames`. Where a clip has several shots, `scene` is
  the first.
  """

  frames: np.ndarray  # uint8 [T, H, W, 3]
  scene: Scene
  inner: tuple[int, int]
  shift: np.ndarray
  defects: tuple[str, ...] = ()
  details: dict[str, Any] = dataclasses.field(default_factory=dict)
  crf: int = 18


def clean(scene: Scene, frames: int, height: int, width: int, fps: float) -> Clip:
  """A clip without a planted defect; if nothing moves in it, it says that it is static."""
  video = render(scene, frames, height, width, fps)
  still = scene.camera == "static" and all(
    thing.hidden or thing.motion == "stays still" for thing in scene.objects
  )
  return Clip(video, scene, (height, width), np.zeros((frames, 2)), ("static",) if still else ())


def plant(
  defect: str, scene: Scene, frames: int, height: int, width: int, fps: float, seed: int
) -> Clip:
  """A clip of `scene` with one of DEFECTS but "near_duplicate", which needs the clip before it.

  Raises UserError for a defect that does not exist.
  """
  if defect not in _MAKERS:
    raise UserError(f'There is no defect "{defect}"; known: {", ".join(DEFECTS)}.')
  rng = np.random.default_rng([seed, 6])
  clip = _MAKERS[defect](scene, frames, height, width, fps, rng)
  return dataclasses.replace(clip, defects=(defect,))


def near_duplicate(clip: Clip) -> Clip:
  """The same clip again: a little brighter, and coded harder."""
  brighter = np.minimum(clip.frames.astype(np.int16) + _BRIGHTER, 255).astype(np.uint8)
  details = {**clip.details, "brighter_by": _BRIGHTER}
  return dataclasses.replace(
    clip, frames=brighter, defects=("near_duplicate",), details=details, crf=27
  )


def corrupt_bytes(data: bytes, seed: int) -> tuple[bytes, str]:
  """The bytes of a broken file, and how it is broken."""
  how = ("truncated", "no header", "text")[int(np.random.default_rng([seed, 7]).integers(3))]
  if how == "truncated":
    return data[: int(0.55 * len(data))], how
  if how == "no header":
    return bytes(min(4096, len(data) // 2)) + data[min(4096, len(data) // 2) :], how
  return b"404 Not Found: this clip was removed by its owner.\n" * 20, how


def _static(scene, frames, height, width, fps, rng):
  scene = _frozen(scene)
  first = render(scene, 1, height, width, fps)
  return _clip(np.repeat(first, frames, axis=0), scene, frames, height, width)


def _slideshow(scene, frames, height, width, fps, rng):
  scenes = [_frozen(scene)]
  while len(scenes) < min(_STILLS, frames):
    scenes.append(_other(scenes[-1], rng))
  edges = [round(i * frames / len(scenes)) for i in range(len(scenes) + 1)]
  video = [
    np.repeat(render(each, 1, height, width, fps), edges[i + 1] - edges[i], axis=0)
    for i, each in enumerate(scenes)
  ]
  return _clip(np.concatenate(video), scenes[0], frames, height, width, _shots(scenes, edges))


def _hard_cut(scene, frames, height, width, fps, rng):
  cut = int(rng.integers(frames // 3, 2 * frames // 3 + 1)) if frames > 2 else frames - 1
  scenes = [scene, _other(scene, rng)]
  video = [render(each, frames, height, width, fps) for each in scenes]
  video = np.concatenate([video[0][:cut], video[1][cut:]])
  return _clip(video, scene, frames, height, width, _shots(scenes, [0, cut]))


def _letterbox(scene, frames, height, width, fps, rng):
  beside = bool(rng.integers(2))
  bar = max(2, round(_BARS * (width if beside else height)))
  top, left = (0, bar) if beside else (bar, 0)
  inner = (height - 2 * top, width - 2 * left)
  video = np.zeros((frames, height, width, 3), np.uint8)
  video[:, top : height - top, left : width - left] = render(scene, frames, *inner, fps)
  details = {"bars": {"top": top, "bottom": top, "left": left, "right": left}}
  shift = np.broadcast_to(np.array([left, top], float), (frames, 2))
  return Clip(video, scene, inner, shift, details=details)


def _text_overlay(scene, frames, height, width, fps, rng):
  text = _TEXTS[int(rng.integers(len(_TEXTS)))]
  video = render(scene, frames, height, width, fps)
  # As large as fits across, but at most a fifth of the height.
  size = next(
    size
    for size in range(max(8, height // 5), 0, -1)
    if size == 1 or ImageFont.load_default(size=size).getlength(text) <= 0.94 * width
  )
  font = ImageFont.load_default(size=size)
  length = font.getlength(text)
  x = (width - length) / 2
  y = (0.04 if rng.integers(2) else 0.76) * height
  layer = Image.new("LA", (width, height))
  draw = ImageDraw.Draw(layer)
  stroke = max(1, size // 12)
  draw.text((x, y), text, (255, 255), font, stroke_width=stroke, stroke_fill=(0, 255))
  grey, alpha = np.moveaxis(np.asarray(layer, np.float64), -1, 0)
  rows, columns = alpha.any(axis=1).nonzero()[0], alpha.any(axis=0).nonzero()[0]
  share = (alpha / 255)[..., None]
  video = (video * (1 - share) + grey[..., None] * share + 0.5).astype(np.uint8)
  box = [int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
  return _clip(video, scene, frames, height, width, {"text": text, "box": box})


def _jitter(scene, frames, height, width, fps, rng):
  # On a plain background nobody would see the camera shake.
  if scene.background != "noisy":
    scene = dataclasses.replace(scene, background="noisy", name_background=True)
  reach = max(2, round(_SHAKE * min(height, width)))
  inner = (height + 2 * reach, width + 2 * reach)
  video = render(scene, frames, *inner, fps)
  offsets = rng.integers(0, 2 * reach + 1, (frames, 2))  # x, y
  offsets[1::2] = 2 * reach - offsets[::2][: frames // 2]  # every second frame jumps across
  cropped = np.stack(
    [v[y : y + height, x : x + width] for v, (x, y) in zip(video, offsets, strict=True)]
  )
  details = {"offsets": (offsets - reach).tolist()}
  return Clip(cropped, scene, inner, -offsets.astype(float), details=details)


def _too_small(scene, frames, height, width, fps, rng):
  scale = 24 / min(height, width)
  height, width = (max(16, 2 * round(side * min(scale, 0.5) / 2)) for side in (height, width))
  return clean(scene, frames, height, width, fps)


def _too_short(scene, frames, height, width, fps, rng):
  return clean(scene, max(1, frames // 6), height, width, fps)


def _corrupt(scene, frames, height, width, fps, rng):
  return clean(scene, frames, height, width, fps)


_MAKERS = {
  "static": _static,
  "slideshow": _slideshow,
  "hard_cut": _hard_cut,
  "letterbox": _letterbox,
  "text_overlay": _text_overlay,
  "jitter": _jitter,
  "too_small": _too_small,
  "too_short": _too_short,
  "corrupt": _corrupt,
}
DEFECTS = (*_MAKERS, "near_duplicate")


def _clip(video, scene, frames, height, width, details=None):
  return Clip(video, scene, (height, width), np.zeros((frames, 2)), details=details or {})


def _frozen(scene: Scene) -> Scene:
  """The scene with all motion taken out, and so in its caption."""
  objects = tuple(dataclasses.replace(thing, motion="stays still") for thing in scene.objects)
  return dataclasses.replace(scene, objects=objects, camera="static")


def _other(scene: Scene, rng) -> Scene:
  """Another shot: the objects elsewhere, on a background that cannot be taken for this one."""
  background = "black" if scene.background in ("white", "beige") else "white"
  seed = int(rng.integers(2**52))
  return dataclasses.replace(scene, seed=seed, background=background, name_background=True)


def _shots(scenes, edges):
  return {
    "shots": [
      {"first_frame": first, "caption": caption(scene)}
      for scene, first in zip(scenes, edges, strict=False)
    ]
  }
