"""Marbles and other small rendered worlds: the same stages, with bounds for tiny pictures.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/marbles.py \\
    --input=videos --output=curated/marbles

Nothing is cut off the start (a rendered clip has no title), and the buckets are of 32 frames.
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="marbles",
    partitions=16,
    resolution={"min_side": 72},
    aspect={"min_aspect": 0.5, "max_aspect": 2.0},
    split={"head": 0.0, "clips_per_source": 1},
    buckets={
      "sizes": ((128, 128), (96, 168), (168, 96), (108, 144), (144, 108)),
      "lengths": ((4.0, 16.0, 32, 0.0),),
      "min_fps": 2.0,
    },
    concepts={"keep": 1.0},
    aspect_mix={"landscape": 0.0},
  )
