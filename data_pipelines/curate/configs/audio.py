"""Videos for sound (12.7), as far as picture and text decide: they have a sound track, no overlay
text and no slideshow; how the picture looks matters less.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/audio.py \\
    --input=videos --output=curated/audio

Silence, the class of a sound and whether it belongs to the picture need models of sound.
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="audio",
    probe={"needs_audio": True},
    resolution={"min_side": 360},
    motion={"min_at_30": 0.5},
    vectors={"low": 0.1, "high": 20.0},
    aesthetics={"min_score": 0.0},
    concepts={"keep": 1.0},
  )
