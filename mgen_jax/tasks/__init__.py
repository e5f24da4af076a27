"""What is learned: one file for each capability, all with the methods of `base.Task`.

To add one, write the file with a config dataclass (first field `name`) and a class, and list both
here.
"""

from typing import Any

from mgen_jax.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from mgen_jax.tasks.base import Task
from mgen_jax.tasks.latte import Latte, LatteTaskConfig
from mgen_jax.tasks.text_to_video import TextToVideo, TextToVideoConfig

TASKS = {"autoencoder": AutoencoderTask, "latte": Latte, "text_to_video": TextToVideo}
CONFIGS = {
  "autoencoder": AutoencoderTaskConfig,
  "latte": LatteTaskConfig,
  "text_to_video": TextToVideoConfig,
}
GENERATORS = ("latte", "text_to_video")  # whose samples are latents, to be decoded


def make(config: Any) -> Task:
  """The task that a config describes."""
  return TASKS[config.name](config)
