"""Writes the windows of a data set as mp4 files with captions.jsonl: what experiments train on."""

import json
from pathlib import Path

from absl import logging

from data_pipelines.datasets import layouts, windows
from mgen_jax.data import media
from mgen_jax.data.files import write_text_atomic
from mgen_jax.errors import UserError

FPS = 8.0  # at which the released code shows its samples


def write(
  name: str,
  source: Path | str,
  out: Path | str,
  *,
  size: int = 256,
  windows_per_clip: int = 8,
  seed: int = 0,
  interval: int = windows.INTERVAL,
) -> dict[str, int]:
  """Prepares a data set.

  Writes OUT/CLIP_N.mp4 (almost lossless), OUT/captions.jsonl with the class (or the title of the
  data set) of each, and OUT/classes.json with the classes in order. A file that is there already is
  kept, so that an interrupted run continues.

  Args:
    name: of `layouts.LAYOUTS`.
    source: the folder that the user has downloaded.
    out: a folder; made if needed.
    size: of the pictures.
    windows_per_clip: random windows of each clip. The released loaders draw a new one in every
      epoch; here they are drawn once.
    seed: of the windows.
    interval: between frames (the paper's ablation; its own is 3).

  Returns:
    {"clips", "windows", "too_short", "classes"}: counts.

  Raises:
    UserError: a folder of another layout, a file that cannot be read, or nothing long enough.
  """
  layout, clips, out = layouts.layout(name), layouts.scan(name, source), Path(out)
  if Path(source).resolve() in (out.resolve(), *out.resolve().parents):
    raise UserError(f"--out={out} lies in --source={source}: name a folder outside of it.")
  lines, short = [], 0
  for number, clip in enumerate(clips):
    made = 0
    for index, video in enumerate(
      windows.windows(clip, layout, count=windows_per_clip, size=size, seed=seed, interval=interval)
    ):
      made += 1
      path = out / f"{clip.id}_{index}.mp4"
      path.parent.mkdir(parents=True, exist_ok=True)
      if not path.exists():
        media.write_video(path, video, FPS, crf=4)
      caption = clip.class_name or layout.title
      lines.append(json.dumps({"file": path.relative_to(out).as_posix(), "caption": caption}))
    short += not made
    if number % 100 == 99:
      logging.info("%d of %d clips", number + 1, len(clips))
  if not lines:
    raise UserError(
      f"--source={source}: none of its {len(clips)} clips has the "
      f"{windows.FRAMES * interval + layout.spare} frames that a window needs."
    )
  names = layouts.classes(clips)
  write_text_atomic(out / "classes.json", json.dumps(names, indent=1) + "\n")
  write_text_atomic(out / "captions.jsonl", "\n".join(lines) + "\n")
  return {"clips": len(clips), "windows": len(lines), "too_short": short, "classes": len(names)}
