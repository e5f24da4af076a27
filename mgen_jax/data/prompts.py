"""What each encoder reads of a prompt (Movie Gen 3.1.4, 3.2 and 3.4).

The frame rate stands before the prompt as text ("FPS-16"), so that it can be asked for; then the
camera's motion, where a classifier was sure of it; then the caption. An encoder reads all of that,
or only what stands in quotation marks: the text to be drawn.
"""

import dataclasses
import re

from mgen_jax.errors import UserError, nearest, suggest

# The classes of the camera's motion that the paper's classifier tells apart (section 2.1).
CAMERA_MOTIONS = (
  *("zoom in", "zoom out", "push in", "pull out", "pan right", "pan left", "truck right"),
  *("truck left", "tilt up", "tilt down", "pedestal up", "pedestal down", "arc shot"),
  *("tracking shot", "static shot", "handheld shot"),
)

# Pairs of quotation marks. The single ones are left out: an apostrophe looks the same.
_QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»|「([^「」]*)」')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A caption and what is put before it.

  Attributes:
    text: the caption; an empty one stays empty, whatever else is known: that is no condition.
    fps: frames per second of the video, 0 for an image (which gets no prefix).
    camera: its motion, like "zoom in"; "" if nothing is known of it.
  """

  text: str
  fps: float = 0.0
  camera: str = ""


def compose(prompt: Prompt, *, fps_prefix: bool) -> str:
  """The whole prompt: "FPS-16 zoom in. A red circle moves left"."""
  if not prompt.text.strip():
    return ""
  parts = [f"FPS-{round(prompt.fps)}"] if fps_prefix and prompt.fps > 0 else []
  if prompt.camera:
    parts.append(f"{prompt.camera}.")
  return " ".join([*parts, prompt.text])


def camera_motion(text: str, where: str) -> str:
  """One of `CAMERA_MOTIONS`, whatever its case and spaces.

  Args:
    text: of the user.
    where: it came from, for the message.

  Raises:
    UserError: it is none of them; the nearest are named.
  """
  words = " ".join(text.lower().split())
  if words in CAMERA_MOTIONS:
    return words
  near = nearest(words, CAMERA_MOTIONS, 3)
  meant = f"did you mean {' or '.join(near)}?" if near else suggest(words, CAMERA_MOTIONS)
  raise UserError(
    f"{where}={text} is no motion of a camera that the paper's captions name: {meant}"
  )


def quoted(text: str) -> str:
  """What stands in pairs of quotation marks, joined by spaces; "" if nothing does.

  A mark without its partner counts for nothing.
  """
  found = (next(filter(None, match.groups()), "") for match in _QUOTED.finditer(text))
  return " ".join(part.strip() for part in found if part.strip())


def reads(what: str, prompt: Prompt, *, fps_prefix: bool) -> str:
  """The text for an encoder that reads "prompt" or "quoted"."""
  return quoted(prompt.text) if what == "quoted" else compose(prompt, fps_prefix=fps_prefix)
