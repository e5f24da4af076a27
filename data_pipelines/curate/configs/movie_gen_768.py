"""Movie Gen's second set: the part of the first that is at least 768 px, for training at 768 px.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/movie_gen_768.py \\
    --input=videos --output=curated/movie_gen_768
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="movie_gen_768",
    resolution={"min_side": 768},
    aspect_mix={"landscape": 0.6},
  )
