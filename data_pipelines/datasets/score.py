"""Frechet video distance and inception score of samples, by the protocol of Latte's paper.

  python -m data_pipelines.datasets.score --name=faceforensics --source=FFS --samples=DIR
  python -m data_pipelines.datasets.score --name=ucf101 --source=UCF-101 --samples=DIR \\
      --features=my_i3d:features --classifier=my_c3d:probabilities --out=scores.json

Of up to 2,048 real clips, drawn without replacement, one window of 16 frames at a random place:
every third frame, of Taichi-HD every sixth. Of up to 2,048 videos that were generated the first 16
frames in a row. All frames are cut to their middle square, resized to 256 (Lanczos) and kept as
JPEG of quality 75, as the released evaluation keeps them (which is StyleGAN-V's). Name the split
that was trained on. Scores change with each of these, so compare only what was made alike.

No network comes along. --features=MODULE:FUNCTION names yours, uint8 [N, 16, 256, 256, 3] to
[N, D]: with I3D (Kinetics-400, before the softmax) the distance is FVD. Without it the features are
fixed random convolutions, whose distances compare with each other only. --classifier, likewise to
probabilities [N, classes], adds the inception score in 10 parts: the paper's has C3D, trained on
UCF101.
"""

import importlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from PIL import Image

from data_pipelines.datasets import layouts, windows
from data_pipelines.datasets.layouts import SourceClip
from mgen_jax import cli
from mgen_jax.data.files import write_text_atomic
from mgen_jax.errors import UserError
from mgen_jax.evaluation import frechet

CLIPS, FRAMES, SIZE, QUALITY, PARTS = 2048, 16, 256, 75, 10
INTERVALS = {"taichi_hd": 6}  # between frames of real clips, where it is not 3
_BATCH = 16

Function = Callable[[np.ndarray], np.ndarray]


def interval_of(name: str) -> int:
  """Between the frames of a data set's real clips."""
  return INTERVALS.get(name, windows.INTERVAL)


def real_windows(
  clips: Sequence[SourceClip], *, interval: int, count: int = CLIPS, seed: int = 0
) -> Iterator[np.ndarray]:
  """One window of each of up to `count` clips that are long enough: uint8 [16, H, W, 3]."""
  span, drawn = (FRAMES - 1) * interval + 1, 0
  for number in np.random.default_rng(seed).permutation(len(clips)):
    clip = clips[number]
    total = windows.count_frames(clip)
    if total < span:
      continue
    start = int(windows.generator(seed, clip.id, 0).integers(0, total - span + 1))
    yield windows.read(clip, np.arange(start, start + span, interval))
    drawn += 1
    if drawn == count:
      return


def made_windows(folder: Path, count: int = CLIPS) -> Iterator[np.ndarray]:
  """The first frames of up to `count` videos in a folder: uint8 [16, H, W, 3].

  Raises:
    UserError: one of them is shorter.
  """
  paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in layouts.VIDEOS)
  for path in paths[:count]:
    clip = SourceClip(path.stem, path)
    total = windows.count_frames(clip)
    if total < FRAMES:
      raise UserError(f"{path} has {total} frames: {FRAMES} are compared.")
    yield windows.read(clip, np.arange(FRAMES))


def as_kept(video: np.ndarray, size: int = SIZE) -> np.ndarray:
  """uint8 [T, H, W, 3] -> uint8 [T, size, size, 3], as files of the released evaluation hold it."""
  height, width = video.shape[1:3]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  frames = []
  for frame in video[:, top : top + side, left : left + side]:
    kept = io.BytesIO()
    resized = Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS)
    resized.save(kept, format="JPEG", quality=QUALITY)
    frames.append(np.asarray(Image.open(kept).convert("RGB")))
  return np.stack(frames)


def measured(videos: Iterator[np.ndarray], functions: Sequence[Function]) -> list[np.ndarray]:
  """What each function says of all videos, a few of them in memory at a time: [N, ...] each."""
  found: list[list[np.ndarray]] = [[] for _ in functions]
  batch: list[np.ndarray] = []

  def take() -> None:
    if batch:
      rows = np.stack(batch)
      for function, kept in zip(functions, found, strict=True):
        kept.append(np.asarray(function(rows)))
      batch.clear()

  for number, video in enumerate(videos, 1):
    batch.append(as_kept(video))
    if len(batch) == _BATCH:
      take()
    if number % 256 == 0:
      logging.info("%d clips", number)
  take()
  return [np.concatenate(kept) if kept else np.zeros((0, 1)) for kept in found]


def inception_score(probabilities: np.ndarray, parts: int = PARTS) -> tuple[float, float]:
  """exp of the mean divergence of each row from the mean row, in `parts`: its mean and deviation.

  Args:
    probabilities: [N, classes], rows that sum up to 1.
    parts: equal shares of the rows, in their order.

  Raises:
    UserError: rows that are no probabilities, or fewer than parts.
  """
  rows = probabilities.astype(np.float64)
  if len(rows) < parts:
    raise UserError(f"{len(rows)} videos are too few for an inception score in {parts} parts.")
  if not np.allclose(rows.sum(1), 1, atol=1e-3) or rows.min() < 0:
    raise UserError("the classifier's rows do not sum up to 1: give probabilities, not logits.")
  scores = []
  for part in np.array_split(rows, parts):
    with np.errstate(divide="ignore", invalid="ignore"):
      terms = np.where(part > 0, part * (np.log(part) - np.log(part.mean(0))), 0.0)
    scores.append(np.exp(terms.sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def score(
  name: str,
  source: Path,
  samples: Path,
  *,
  features: Function = frechet.random_clip_features,
  classifier: Function | None = None,
  count: int = CLIPS,
  seed: int = 0,
) -> dict[str, Any]:
  """The scores of a folder of samples; see the head of this file.

  Raises:
    UserError: a folder of another layout, or too few clips.
  """
  interval = interval_of(name)
  clips = layouts.scan(name, source)
  if not samples.is_dir():
    raise UserError(f"--samples={samples} is no folder: name that of videos that were generated.")
  asked = [features] if classifier is None else [features, classifier]
  made = measured(made_windows(samples, count), asked)
  if len(made[0]) < 2:
    raise UserError(f"--samples={samples} has {len(made[0])} videos: 2 or more are compared.")
  (real,) = measured(real_windows(clips, interval=interval, count=count, seed=seed), [features])
  if len(real) < 2:
    raise UserError(
      f"--source={source} has {len(real)} clips of {(FRAMES - 1) * interval + 1} frames or more: "
      "2 or more are compared."
    )
  result = {
    "frechet": round(frechet.distance(real, made[0]), 4),
    "real_clips": len(real),
    "videos": len(made[0]),
    "interval": interval,
  }
  if classifier is not None:
    mean, deviation = inception_score(made[1])
    result |= {"inception_score": round(mean, 4), "deviation": round(deviation, 4)}
  return result


def function_of(flag: str, text: str) -> Function:
  """What "module:function" names.

  Raises:
    UserError: there is none.
  """
  module, _, name = text.partition(":")
  try:
    found = getattr(importlib.import_module(module), name, None) if module and name else None
  except ImportError as error:
    raise UserError(f"--{flag}={text} cannot be imported ({error}): check the name.") from error
  if not callable(found):
    raise UserError(f"--{flag}={text} is no function: write it like my_i3d:features.")
  return found


def main(argv: Sequence[str]) -> None:
  """Reads the flags, measures, prints."""
  del argv
  values = flags.FLAGS
  for name in ("name", "source", "samples"):
    if values[name].value is None:
      raise UserError(f"--{name} is missing (see --help).")
  named = {
    key: function_of(key, values[key].value)
    for key in ("features", "classifier")
    if values[key].value is not None
  }
  if "features" not in named:
    logging.warning("features are fixed random convolutions: the distance is no FVD (see --help)")
  found = score(
    *(values.name, Path(values.source), Path(values.samples)),
    **named,
    count=values.clips,
    seed=values.seed,
  )
  found["features"] = values.features or "random"
  text = json.dumps(found, indent=2)
  if values.out:
    write_text_atomic(Path(values.out), text + "\n")
  print(text)


if __name__ == "__main__":
  flags.DEFINE_string("name", None, f"One of {', '.join(layouts.LAYOUTS)}.")
  flags.DEFINE_string("source", None, "Folder of the data set, as you have downloaded it.")
  flags.DEFINE_string("samples", None, "Folder of generated videos, like runs/latte_ffs/samples.")
  flags.DEFINE_string("features", None, "module:function; default: fixed random convolutions.")
  flags.DEFINE_string("classifier", None, "module:function, for the inception score.")
  flags.DEFINE_integer("clips", CLIPS, "The most of each kind.", 2)
  flags.DEFINE_integer("seed", 0, "Of which clips and windows are drawn.")
  flags.DEFINE_string("out", None, "JSON to write as well.")
  cli.run(main)
