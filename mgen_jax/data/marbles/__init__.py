"""Marbles: a small world whose videos come with the exact truth about them.

A scene is a few coloured shapes that move, fall and bounce before a background, seen by a camera;
each bounce is heard. Scenes are drawn by seed (`sample_scene`), rendered to pixels (`render`) and
sound (`soundtrack`), written to folders of mp4 (`write_dataset`), and judged again from pixels
alone (`judge`). To look at some: `python -m mgen_jax.data.marbles --out /tmp/marbles --clips 24`.
"""

from mgen_jax.data.marbles.defects import DEFECTS
from mgen_jax.data.marbles.edits import EDIT_KINDS, Edit, possible_edits, sample_edit
from mgen_jax.data.marbles.judge import Verdict, chance, judge
from mgen_jax.data.marbles.physics import Bounce, Track, simulate
from mgen_jax.data.marbles.render import mask, render
from mgen_jax.data.marbles.sound import PITCHES, soundtrack
from mgen_jax.data.marbles.world import (
  BACKGROUNDS,
  CAMERAS,
  COLOURS,
  COMPASS,
  MOTIONS,
  SHAPES,
  SIZES,
  TEXTURES,
  Object,
  Prompt,
  Scene,
  WorldConfig,
  caption,
  evaluation_prompts,
  is_held_out,
  sample_scene,
)
from mgen_jax.data.marbles.write import MARKER, read_truth, write_dataset

__all__ = [
  "BACKGROUNDS",
  "CAMERAS",
  "COLOURS",
  "COMPASS",
  "DEFECTS",
  "EDIT_KINDS",
  "MARKER",
  "MOTIONS",
  "PITCHES",
  "SHAPES",
  "SIZES",
  "TEXTURES",
  "Bounce",
  "Edit",
  "Object",
  "Prompt",
  "Scene",
  "Track",
  "Verdict",
  "WorldConfig",
  "caption",
  "chance",
  "evaluation_prompts",
  "is_held_out",
  "judge",
  "mask",
  "possible_edits",
  "read_truth",
  "render",
  "sample_edit",
  "sample_scene",
  "simulate",
  "soundtrack",
  "write_dataset",
]
