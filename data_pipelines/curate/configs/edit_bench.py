"""Candidates for a bench of edits (11.5): single scenes that move and look well, in every amount of
motion; the paper drops what is less than the median of aesthetics, then draws evenly over motion.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/edit_bench.py \\
    --input=videos --output=curated/edit_bench

The median is of your videos: read it off the report's histogram, and set `aesthetics.min_score`.
The even draw over motion is not a stage: the index has `vmaf_motion_30` of every clip.
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="edit_bench",
    resolution={"min_side": 480},
    motion={"min_at_30": 0.5},
    vectors={"low": 0.1},
    aesthetics={"min_score": 4.5},
    concepts={"keep": 1.0},
  )
