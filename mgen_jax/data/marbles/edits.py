"""Edited twins: an instruction, and two scenes that share all but what it names.

Both scenes have the same objects in the same places; what is removed, or not yet added, is hidden
but still simulated. So the twins differ in no pixel outside the object that the instruction names.
"""

import dataclasses

import numpy as np

from mgen_jax.data.marbles.physics import Track
from mgen_jax.data.marbles.world import Object, Scene, WorldConfig, describe, is_held_out
from mgen_jax.errors import UserError

EDIT_KINDS = ("recolour", "reshape", "retexture", "remove", "add", "background")


@dataclasses.dataclass(frozen=True)
class Edit:
  """`instruction` turns `source` into `target`; `object` is the one it changes, or None."""

  kind: str
  instruction: str
  source: Scene
  target: Scene
  object: int | None


def possible_edits(scene: Scene, config: WorldConfig, track: Track) -> list[Edit]:
  """All edits of a scene that stay within the words and the split of a world.

  `track` is the scene's motion: an object that another one bounces off is neither removed nor
  added, for the other would have to move otherwise.
  """
  found = []
  for index, thing in enumerate(scene.objects):
    if thing.hidden:
      continue
    name = f"the {thing.colour} {thing.shape}"
    for colour in config.colours:
      if colour != thing.colour:
        found += _change(scene, config, index, "recolour", f"make {name} {colour}", colour=colour)
    for shape in config.shapes:
      if shape != thing.shape:
        text = f"turn {name} into a {shape}"
        found += _change(scene, config, index, "reshape", text, shape=shape)
    for texture in config.textures:
      if texture != thing.texture:
        text = f"make {name} {texture}"
        found += _change(scene, config, index, "retexture", text, texture=texture)
    if len(scene.objects) > 1 and not _is_met(track, index):
      without = _with(scene, index, hidden=True)
      shapes = [other.shape for other in scene.objects if not other.hidden]
      name = f"the {thing.shape}" if shapes.count(thing.shape) == 1 else name
      found.append(Edit("remove", f"remove {name}", scene, without, index))
      verb = f"add a {describe(thing)} that {thing.motion}"
      found.append(Edit("add", verb, without, scene, index))
  for background in config.backgrounds:
    if background != scene.background:
      source = dataclasses.replace(scene, name_background=True)
      target = dataclasses.replace(source, background=background)
      text = f"make the background {background}"
      found.append(Edit("background", text, source, target, None))
  return found


def sample_edit(scene: Scene, config: WorldConfig, track: Track, seed: int) -> Edit:
  """Draws an edit: first its kind, among those that the scene allows, then the edit itself.

  Raises UserError if the world has one word of everything, so that nothing can be edited.
  """
  found = possible_edits(scene, config, track)
  kinds = [kind for kind in EDIT_KINDS if any(edit.kind == kind for edit in found)]
  if not kinds:
    raise UserError("This world leaves nothing to edit: allow more colours, shapes or textures.")
  rng = np.random.default_rng([seed, 5])
  kind = kinds[rng.integers(len(kinds))]
  found = [edit for edit in found if edit.kind == kind]
  return found[rng.integers(len(found))]


def _change(scene, config, index, kind, instruction, **changes) -> list[Edit]:
  """The edit, unless it makes a twin of another object or leaves the split."""
  target = _with(scene, index, **changes)
  new = target.objects[index]
  others = [thing for i, thing in enumerate(scene.objects) if i != index]
  if any((new.colour, new.shape) == (thing.colour, thing.shape) for thing in others):
    return []
  held_out = is_held_out(new.colour, new.shape, new.motion)
  if config.split != "all" and held_out != (config.split == "held_out"):
    return []
  return [Edit(kind, instruction, scene, target, index)]


def _with(scene: Scene, index: int, **changes) -> Scene:
  objects: list[Object] = list(scene.objects)
  objects[index] = dataclasses.replace(objects[index], **changes)
  return dataclasses.replace(scene, objects=tuple(objects))


def _is_met(track: Track, index: int) -> bool:
  return any(
    bounce.other.startswith("object") and index in (bounce.object, int(bounce.other.split()[1]))
    for bounce in track.bounces
  )
