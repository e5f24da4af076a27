"""Prepares one of Latte's data sets from the folder that you have downloaded.

  python -m data_pipelines.datasets --name=ucf101 --source=UCF-101 --out=data/ucf101
  python -m data_pipelines.datasets --name=sky_timelapse --source=sky_train --out=data/sky \\
      --windows_per_clip=16
"""

from collections.abc import Sequence

from absl import flags

from data_pipelines.datasets import folder, layouts
from mgen_jax import cli
from mgen_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
  """Reads the flags, prepares, and says what was made."""
  del argv
  values = flags.FLAGS
  for name in ("name", "source", "out"):
    if values[name].value is None:
      raise UserError(f"--{name} is missing (see --help).")
  if min(values.windows_per_clip, values.size, values.interval) < 1:
    raise UserError("--windows_per_clip, --size and --interval must be 1 or more.")
  counts = folder.write(
    values.name,
    values.source,
    values.out,
    size=values.size,
    windows_per_clip=values.windows_per_clip,
    seed=values.seed,
    interval=values.interval,
  )
  print(
    f"{counts['windows']} windows of {counts['clips']} clips ({counts['too_short']} too short), "
    f"{counts['classes']} classes: {values.out}"
  )


if __name__ == "__main__":
  flags.DEFINE_string("name", None, f"One of {', '.join(layouts.LAYOUTS)}.")
  flags.DEFINE_string("source", None, "Folder that you have downloaded.")
  flags.DEFINE_string("out", None, "Folder to write to; an experiment's data.videos.")
  flags.DEFINE_integer("size", 256, "Height and width in pixels.")
  flags.DEFINE_integer("windows_per_clip", 8, "Random windows of 16 frames of each clip.")
  flags.DEFINE_integer("interval", 3, "Between frames; an ablation of the paper changes it.")
  flags.DEFINE_integer("seed", 0, "Of the windows.")
  cli.run(main)
