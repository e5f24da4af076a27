"""Marbles and other small rendered worlds: the same stages with bounds that fit tiny pictures.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/marbles.py \\
    --input=videos --output=curated/marbles

The planted corpus is measured with these bounds (`planted`, `scorecard`).
"""

from data_pipelines.curate import config

_SIZES = ((96, 96), (72, 128), (128, 72), (84, 112), (112, 84))  # height, width


def get_config():
  return config.complete(
    name="marbles",
    partitions=16,
    probe={"min_seconds": 3.0},
    resolution={"min_side": 72},
    # Whole files are clips: there are no titles at their start.
    split={"head": 0.0, "shortest": 3.0, "min_seconds": 3.0},
    # Few and small objects before plain grounds.
    motion={"min_at_30": 0.1},
    vectors={"low": 0.02, "high": 30.0},
    aesthetics={"min_score": 3.5},
    # Shapes that meet are read as signs: only what stays in its place is text.
    text={"frames": 2, "steady": 2, "side": 320},
    # Of plain areas PDQ's finer bits are noise; unrelated scenes differ in 0.40 of them and more.
    copies={"floor": 0.62, "grouped_at": 0.67, "max_similarity": 0.67},
    concepts={"keep": 1.0},
    aspect_mix={"landscape": 0.0},
    buckets={
      "sizes": _SIZES,
      "lengths": ((4.0, 16.0, 32, 0.0), (3.0, 4.0, 16, 0.0)),
      "min_fps": 2.0,
      "max_crop": 0.3,
    },
  )
