"""A curated set of clips as a TensorFlow Datasets data set and back, without TensorFlow.

  python -m data_pipelines.datasets --name=clips --source=DIR --out=data/tfds
  python -m data_pipelines.datasets --name=clips --source=data/tfds --out=DIR --back

DIR is what an experiment's `data.videos` takes: a folder, tars or tables with captions, or a folder
with an index.jsonl. An example is one file, unchanged, with what the index knows of it; "train" and
"validation" are the index's split. `ClipSource` reads such a data set in place of a folder: its
examples are those of `mgen_jax.data.sources.MediaSource`. Needs the extra "data".
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mgen_jax.data import ingest, media
from mgen_jax.data.buckets import Bucket, Groups, Rate
from mgen_jax.data.files import write_text_atomic
from mgen_jax.data.sources import MediaSource, media_sources
from mgen_jax.errors import UserError

NAME, VERSION = "clips", "1.0.0"
SPLITS = {"train": "train", "held_out": "validation"}
_TEXTS = ("id", "path", "kind", "caption", "camera")
_NUMBERS = {"width": np.int32, "height": np.int32, "frames": np.int64, "fps": np.float64,
            "duration": np.float64}  # fmt: skip


class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Clips with captions, as files."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, *, index: ingest.Index, **kwargs: Any):
    """Prepares from an index.

    Args:
      index: of the clips.
      **kwargs: of the TFDS builder: data_dir, file_format.
    """
    self._index = index
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {name: tfds.features.Text() for name in (*_TEXTS, "media")}
    features |= {name: tfds.features.Scalar(dtype) for name, dtype in _NUMBERS.items()}
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"Clips with captions, index {self._index.sha256}.",
      features=tfds.features.FeaturesDict(features),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {name: self._generate_examples(self._index.of_split(split))
            for split, name in SPLITS.items() if self._index.of_split(split)}  # fmt: skip

  def _generate_examples(
    self, clips: Sequence[ingest.Clip]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for clip in clips:
      source = clip.open(self._index.folder)
      data = source.read_bytes() if isinstance(source, Path) else bytes(source)
      facts = {name: getattr(clip, name) for name in (*_TEXTS, *_NUMBERS)}
      yield clip.id, {**facts, "media": data}


class ClipSource(MediaSource):
  """A MediaSource whose files are examples of an exported data set.

  Args:
    folder: of the data set, as `export` returns it.
    split: "train" or "held_out".
    clips, bucket, fps: as in MediaSource; `sources` chooses them.
  """

  def __init__(
    self,
    folder: Path | str,
    split: ingest.Split,
    clips: Sequence[ingest.Clip],
    bucket: Bucket,
    *,
    fps: Rate = None,
  ):
    super().__init__(folder, clips, bucket, fps=fps)
    self._split = split
    self._data: Any = None  # opened when first read, so that workers can have a source

  def _open(self, clip: ingest.Clip) -> media.NamedBytes:
    if self._data is None:
      self._data = _data_source(self.folder, self._split)
    example = self._data[clip.offset]  # see `_read_all`
    return media.NamedBytes(example["media"], str(self.folder / clip.path))

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_data": None}


def sources(
  folder: Path | str,
  buckets: Sequence[Bucket],
  *,
  split: ingest.Split,
  images_from_videos: bool = False,
  fps: Rate = None,
  max_crop: float = 0.2,
) -> tuple[dict[Bucket, ClipSource], Groups]:
  """`mgen_jax.data.sources.media_sources` of an exported data set."""
  folder, index = _open(Path(folder))

  def make(clips: Sequence[ingest.Clip], bucket: Bucket) -> ClipSource:
    return ClipSource(folder, split, clips, bucket, fps=fps)

  how = {"images_from_videos": images_from_videos, "fps": fps, "max_crop": max_crop}
  return media_sources(index, buckets, split=split, make=make, **how)


def export(source: Path | str, out: Path | str, *, held_out: float = 0.05, seed: int = 0) -> Path:
  """Writes a data set below `out` and returns its folder.

  Args:
    source: a folder of media with captions (README), or one with an index.jsonl.
    out: made if needed.
    held_out, seed: the split, where `source` has no index.

  Raises:
    UserError: no usable clip, or a folder that holds another data set.
  """
  source, out = Path(source), Path(out)
  index = ingest.scan(source, seed=seed, held_out=held_out, unpack_to=out / "unpacked")
  folder = out / NAME / VERSION
  if (folder / ingest.INDEX_NAME).exists():
    if ingest.load(folder).summary["of"] != index.sha256:
      raise UserError(f"{folder} holds other clips: name another --out, or delete it.")
    return folder
  Clips(index=index, data_dir=str(out), file_format="array_record").download_and_prepare()
  # Reading the clips to list them is for once; this says which example each one is.
  listed = [clip for split in SPLITS for clip in _read_all(folder, split)]
  ingest.Index(folder, tuple(listed), {"of": index.sha256}).save(folder)
  return folder


def restore(folder: Path | str, out: Path | str) -> int:
  """Writes the media of a data set into `out`, with captions.jsonl; returns how many.

  Raises:
    UserError: `folder` is no such data set, or a path in it leads out of `out`.
  """
  (folder, index), out, lines = _open(Path(folder)), Path(out), []
  for split in SPLITS:
    clips = index.of_split(split)
    examples = _data_source(folder, split) if clips else ()
    for clip in clips:
      path = out / clip.path
      if not path.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{folder} names {clip.path!r}, which lies outside of {out}.")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(examples[clip.offset]["media"])
      camera = {"camera": clip.camera} if clip.camera else {}
      lines.append(json.dumps({"file": clip.path, "caption": clip.caption, **camera}))
  write_text_atomic(out / "captions.jsonl", "\n".join(sorted(lines)) + "\n")
  return len(lines)


def _open(folder: Path) -> tuple[Path, ingest.Index]:
  """The folder of a data set, which may be given as the one it was exported to, and its index."""
  if not (folder / ingest.INDEX_NAME).exists() and (folder / NAME / VERSION).is_dir():
    folder = folder / NAME / VERSION
  if not (folder / "dataset_info.json").exists():
    raise UserError(f"{folder} is no data set that was exported here: it has no dataset_info.json.")
  return folder, ingest.load(folder)


def _data_source(folder: Path, split: ingest.Split) -> Sequence[dict[str, Any]]:
  return tfds.builder_from_directory(str(folder)).as_data_source(split=SPLITS[split])


def _read_all(folder: Path, split: ingest.Split) -> list[ingest.Clip]:
  """The clips of a split, sorted by path; `offset` is the number of the example."""
  if SPLITS[split] not in tfds.builder_from_directory(str(folder)).info.splits:
    return []
  clips = []
  for number, example in enumerate(_data_source(folder, split)):
    facts = {name: example[name].decode() for name in _TEXTS}
    facts |= {name: dtype(example[name]).item() for name, dtype in _NUMBERS.items()}
    clips.append(ingest.Clip(**facts, split=split, offset=number))
  return sorted(clips, key=lambda clip: clip.path)
