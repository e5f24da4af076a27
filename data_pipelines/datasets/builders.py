"""TensorFlow Datasets builders of the four data sets; they need the extra "data", not TensorFlow.

  builder = builders.Ucf101(source="DIR", data_dir="data/tfds", file_format="array_record")
  builder.download_and_prepare()
  clips = builder.as_data_source(split="train")      # random access, for Grain

An example is one window: {"id", "label" (-1 without classes), "video" uint8 [16, size, size, 3]}.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.datasets import layouts, windows


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the four have in common."""

  VERSION = tfds.core.Version("1.0.0")
  LAYOUT: str

  def __init__(
    self,
    *,
    source: Path | str,
    size: int = 256,
    windows_per_clip: int = 1,
    seed: int = 0,
    **kwargs: Any,
  ):
    """Prepares from `source`, a folder that the user has downloaded.

    Args:
      source: see `layouts`.
      size: of the pictures, in pixels.
      windows_per_clip: random windows of each clip.
      seed: of the windows.
      **kwargs: of the TFDS builder: data_dir, file_format.

    Raises:
      UserError: the folder is not laid out as this data set.
    """
    self._layout = layouts.layout(self.LAYOUT)
    self._clips = layouts.scan(self.LAYOUT, source)
    self.class_names = layouts.classes(self._clips)
    self._size, self._count, self._seed = size, windows_per_clip, seed
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    shape = (windows.FRAMES, self._size, self._size, 3)
    zlib = tfds.features.Encoding.ZLIB
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self._layout.title}: windows of {windows.FRAMES} frames.",
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "label": tfds.features.Scalar(np.int32),
          "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=zlib),
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    numbers = {name: number for number, name in enumerate(self.class_names)}
    for clip in self._clips:
      made = windows.windows(
        clip, self._layout, count=self._count, size=self._size, seed=self._seed
      )
      for number, video in enumerate(made):
        name = f"{clip.id}#{number}"
        yield name, {"id": name, "label": numbers.get(clip.class_name, -1), "video": video}


class FaceForensics(_Builder, skip_registration=True):
  """FaceForensics (Roessler et al., 2018)."""

  LAYOUT = "faceforensics"


class SkyTimelapse(_Builder, skip_registration=True):
  """SkyTimelapse (Xiong et al., 2018)."""

  LAYOUT = "sky_timelapse"


class Ucf101(_Builder, skip_registration=True):
  """UCF101 (Soomro et al., 2012)."""

  LAYOUT = "ucf101"


class TaichiHd(_Builder, skip_registration=True):
  """Taichi-HD (Siarohin et al., 2019)."""

  LAYOUT = "taichi_hd"


BUILDERS = {builder.LAYOUT: builder for builder in (FaceForensics, SkyTimelapse, Ucf101, TaichiHd)}
