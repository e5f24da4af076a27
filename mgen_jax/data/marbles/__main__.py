"""Renders Marbles clips to look at or to train on: `python -m mgen_jax.data.marbles --out DIR`.

Only the command line; the work is in `write.py`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mgen_jax.data.marbles import world as w
from mgen_jax.data.marbles.defects import DEFECTS
from mgen_jax.data.marbles.write import read_truth, write_dataset
from mgen_jax.data.media import contact_sheet, read_video, write_image
from mgen_jax.errors import UserError

_SHEET_CLIPS = 40
_SHEET_FRAMES = 4

_EPILOG = f"""\
words:
  colours      {", ".join(w.COLOURS)}
  shapes       {", ".join(w.SHAPES)}
  object_sizes {", ".join(w.SIZES)}
  textures     {", ".join(w.TEXTURES)}
  motions      {", ".join(w.MOTIONS)}
  backgrounds  {", ".join(w.BACKGROUNDS)}
  cameras      {", ".join(w.CAMERAS)}
  defects      {", ".join(DEFECTS)}

examples:
  python -m mgen_jax.data.marbles --out /tmp/marbles --clips 24 --sheet
  python -m mgen_jax.data.marbles --out /tmp/bad --clips 40 --defects all --sheet
  python -m mgen_jax.data.marbles --out /tmp/pairs --clips 24 --edits --doubles
  python -m mgen_jax.data.marbles --out /tmp/simple --clips 500 --size 64x64,48x80 \\
    --frames 16,24 --max_objects 1 --textures plain --backgrounds "dark grey" --cameras static
"""


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  options = _parser().parse_args(arguments)
  try:
    config = w.WorldConfig(
      colours=options.colours,
      shapes=options.shapes,
      sizes=options.object_sizes,
      motions=options.motions,
      textures=options.textures,
      backgrounds=options.backgrounds,
      cameras=options.cameras,
      min_objects=options.min_objects,
      max_objects=options.max_objects,
      split=options.split,
    )
    folder = write_dataset(
      options.out,
      options.clips,
      config,
      sizes=options.size,
      frames=options.frames,
      fps=options.fps,
      seed=options.seed,
      workers=options.workers,
      defects=DEFECTS if options.defects == ("all",) else options.defects,
      sound=not options.no_sound,
      edits=options.edits,
      doubles=options.doubles,
      progress=True,
    )
    print(f"{options.clips} clips: {folder}")
    print(f"look: {Path(folder).resolve() / 'index.html'}")
    if options.sheet:
      print(f"sheet: {_write_sheet(Path(folder))}")
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mgen_jax.data.marbles",
    description="Renders videos of a small world with sound, exact captions and the whole truth.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--out", required=True, metavar="DIR", help="the folder to make")
  add("--clips", type=int, default=24, metavar="N", help="how many (24)")
  add(
    "--size", type=_sizes, default=((64, 64),), metavar="HxW",
    help="height x width in pixels, even; several, with commas, take turns (64x64)",
  )  # fmt: skip
  add(
    "--frames", type=_numbers, default=(16,), metavar="T",
    help="length in frames; several, with commas, take turns (16)",
  )  # fmt: skip
  add("--fps", type=float, default=8.0, help="frames per second (8)")
  add("--seed", type=int, default=0, help="of everything (0)")
  add("--workers", type=int, default=0, metavar="N", help="processes; 0 is one a core (0)")
  add(
    "--defects", type=_words, default=(), metavar="WORDS",
    help='plant these in every second clip, in turn; "all" for all of them (none)',
  )  # fmt: skip
  add("--edits", action="store_true", help="also write an edited twin of each clip")
  add("--doubles", action="store_true", help="also write each clip at twice the size")
  add("--no_sound", action="store_true", help="write no sound track")
  add("--sheet", action="store_true", help="also write DIR_sheet.png, one row of frames a clip")
  add("--min_objects", type=int, default=1, metavar="N", help="fewest objects (1)")
  add("--max_objects", type=int, default=3, metavar="N", help="most objects, up to 3 (3)")
  add(
    "--split", choices=("all", "train", "held_out"), default="all",
    help="which combinations of colour, shape and motion occur (all)",
  )  # fmt: skip
  for name, words in (
    ("colours", tuple(w.COLOURS)),
    ("shapes", w.SHAPES),
    ("object_sizes", tuple(w.SIZES)),
    ("textures", w.TEXTURES),
    ("motions", w.MOTIONS),
    ("backgrounds", w.BACKGROUNDS),
    ("cameras", w.CAMERAS),
  ):
    add(f"--{name}", type=_words, default=words, metavar="WORDS", help="with commas (all)")
  return parser


def _words(text: str) -> tuple[str, ...]:
  return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(word) for word in _words(text))
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 16,24") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
  try:
    return tuple((int(h), int(w)) for h, w in (word.lower().split("x") for word in _words(text)))
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 64x64,48x80") from None


def _write_sheet(folder: Path) -> Path:
  """A few frames of each of the first clips, beside the folder (inside it, it would be data)."""
  rows, labels = [], []
  for record in read_truth(folder)[:_SHEET_CLIPS]:
    label = record["caption"]
    if "edit" in record:
      label = f"[{record['edit']['instruction']}] {label}"
    if record["defects"]:
      label = f"[{', '.join(record['defects'])}] {label}"
    labels.append(label)
    if "corrupt" in record["defects"]:
      black = np.zeros((record["height"], record["width"], 3), np.uint8)  # it cannot be read
      rows.append(contact_sheet([black] * _SHEET_FRAMES, _SHEET_FRAMES))
      continue
    files = [record["file"]] + ([record["edit"]["file"]] if "edit" in record else [])
    frames = [f for file in files for f in read_video(folder / file, frames=_SHEET_FRAMES)]
    rows.append(contact_sheet(frames, _SHEET_FRAMES))
  path = folder.parent / f"{folder.name}_sheet.png"
  write_image(path, contact_sheet(rows, columns=4, labels=labels))
  return path


if __name__ == "__main__":
  sys.exit(main())
