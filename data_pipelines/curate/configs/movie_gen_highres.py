"""Movie Gen's third set, the strictest (Table 38): 768 px, clips of 12 to 16 s, 80 % landscape,
people in 60 % of the clips.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/movie_gen_highres.py \\
    --input=videos --output=curated/movie_gen_highres
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="movie_gen_highres",
    resolution={"min_side": 768},
    split={"min_seconds": 12.0, "max_seconds": 16.0, "clips_per_source": 1},
    aspect_mix={"landscape": 0.8},
    human_share={"share": 0.6},
  )
