"""Marbles and other small rendered worlds: the same stages with bounds that fit tiny pictures.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/marbles.py \\
    --input=videos --output=curated/marbles
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="marbles",
    partitions=16,
  )
