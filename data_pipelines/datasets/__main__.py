"""Prepares one of Latte's data sets from the folder that you have downloaded, or exports clips.

  python -m data_pipelines.datasets --name=ucf101 --source=UCF-101 --out=data/ucf101
  python -m data_pipelines.datasets --name=sky_timelapse --source=sky_train --out=data/sky \\
      --windows_per_clip=16
  python -m data_pipelines.datasets --name=clips --source=DIR --out=data/tfds
  python -m data_pipelines.datasets --name=clips --source=data/tfds --out=DIR --back
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
  if values.name == "clips":
    _clips(values)
    return
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


def _clips(values: flags.FlagValues) -> None:
  try:
    from data_pipelines.datasets import clips
  except ImportError as error:
    raise UserError(f'{error.name} is missing: pip install "mgen_jax[data]".') from error
  if values.back:
    print(f"{clips.restore(values.source, values.out)} clips: {values.out}")
  else:
    print(clips.export(values.source, values.out, held_out=values.held_out, seed=values.seed))


if __name__ == "__main__":
  flags.DEFINE_string("name", None, f"One of {', '.join(layouts.LAYOUTS)}, or clips.")
  flags.DEFINE_string("source", None, "Folder that you have downloaded; clips: any with captions.")
  flags.DEFINE_string("out", None, "Folder to write to; an experiment's data.videos.")
  flags.DEFINE_integer("size", 256, "Height and width in pixels.")
  flags.DEFINE_integer("windows_per_clip", 8, "Random windows of 16 frames of each clip.")
  flags.DEFINE_integer("interval", 3, "Between frames; an ablation of the paper changes it.")
  flags.DEFINE_integer("seed", 0, "Of the windows, or of the split.")
  flags.DEFINE_float("held_out", 0.05, "Of clips: the share for validation.", 0.0)
  flags.DEFINE_bool("back", False, "Of clips: from a TFDS data set to a folder of media.")
  cli.run(main)
