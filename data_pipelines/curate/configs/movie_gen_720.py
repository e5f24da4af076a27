"""Movie Gen's first set: at least 720 px, 60 % landscape, for training at 256 px.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/movie_gen_720.py \\
    --input=videos --output=curated/movie_gen_720

What the paper says of it: Table 38 for the thresholds, section 3.2.1 for the mix. Everything else
is ours, see `docs/data.md`.
"""

from data_pipelines.curate import config
from data_pipelines.curate.stages.buckets import SIZES_256


def get_config():
  return config.complete(
    name="movie_gen_720",
    resolution={"min_side": 720},
    aspect_mix={"landscape": 0.6},
    buckets={"sizes": SIZES_256},
  )
