"""What each encoder reads of a prompt (Movie Gen 3.1.4, 3.2 and 3.4).

The frame rate stands before the prompt as text ("FPS-16"), so that it can be asked for; then the
camera's motion, where a classifier was sure of it; then the caption. An encoder reads all of that,
or only what stands in quotation marks: the text to be drawn.
"""

import dataclasses
import re

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


def quoted(text: str) -> str:
  """What stands in pairs of quotation marks, joined by spaces; "" if nothing does.

  A mark without its partner counts for nothing.
  """
  found = (next(filter(None, match.groups()), "") for match in _QUOTED.finditer(text))
  return " ".join(part.strip() for part in found if part.strip())


def reads(what: str, prompt: Prompt, *, fps_prefix: bool) -> str:
  """The text for an encoder that reads "prompt" or "quoted"."""
  return quoted(prompt.text) if what == "quoted" else compose(prompt, fps_prefix=fps_prefix)
