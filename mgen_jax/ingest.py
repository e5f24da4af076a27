"""The ingest stage: videos on disk -> an index of the good ones, with captions.

Where no folder is given, Marbles are rendered into WORKDIR/videos first, as real files, and then
take the same path; clips that tables hold as bytes are unpacked there. Not here: how files are
probed (`data/ingest.py`), curation (`data_pipelines`).
"""

import dataclasses
import math
import os
import time

import jax
from absl import logging
from rich import console, progress

from mgen_jax import config as config_lib
from mgen_jax.config import DataConfig
from mgen_jax.data import ingest, marbles
from mgen_jax.errors import UserError
from mgen_jax.workdir import Workdir


def run(work: Workdir, name: str) -> None:
  """Makes the index in the stage's folder; process 0 does, the others wait at the stage's end.

  Raises:
    UserError: no usable clip.
  """
  if jax.process_index() != 0:
    return
  began = time.perf_counter()
  data = config_lib.data_of(work.experiment, name)
  folder = data.videos
  dataset = work.experiment.stages[name].dataset
  made = work.root / ("videos" if dataset is None else f"videos_{dataset}")
  if folder is None:
    folder = str(made)
    _render(data, folder, work.experiment.seed, work.experiment.stages[name].workers)
  with progress.Progress(
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    console=console.Console(stderr=True),
    transient=True,
  ) as bar:
    task = bar.add_task("reading media", total=None)
    index = ingest.scan(
      folder,
      seed=work.experiment.seed,
      held_out=data.held_out,
      caption_key=data.caption_key,
      unpack_to=made,
      progress=lambda done, total: bar.update(task, completed=done, total=total),
    )
  index = _of_length(index, data)
  index.save(work.folder(name))
  summary = index.summary
  logging.info("%d clips to train on, %d held out", summary["train"], summary["held_out"])
  for entry in summary["bad_files"]:
    logging.warning("skipped %s: %s", entry["file"], entry["reason"])
  left_out = summary["unreadable"] + summary["without_caption"]
  if left_out:
    logging.warning(
      "%d of %d files left out: %d unreadable, %d without a caption (%s has the list)",
      left_out,
      summary["files"],
      summary["unreadable"],
      summary["without_caption"],
      work.folder(name) / ingest.SUMMARY_NAME,
    )
  work.finish(name, time.perf_counter() - began, clips=len(index.clips), index=index.sha256)


def _of_length(index: ingest.Index, data: DataConfig) -> ingest.Index:
  """The index without the videos that are too short or too long."""
  shortest, longest = data.min_seconds or 0.0, data.max_seconds or math.inf
  # Frames times their rate: 16 s that a container gives as 15.999 are 16 s.
  kept = tuple(
    clip
    for clip in index.clips
    if clip.kind == "image"
    or shortest - 0.5 / clip.fps <= clip.frames / clip.fps < longest - 0.5 / clip.fps
  )
  left_out = len(index.clips) - len(kept)
  if not left_out:
    return index
  if not kept:
    raise UserError(
      f"none of the {left_out} clips of {index.folder} lasts from {shortest:g} to {longest:g} s: "
      "change min_seconds or max_seconds of its data."
    )
  logging.info("%d clips are left out for their length", left_out)
  index = dataclasses.replace(index, clips=kept)
  sides = {split: len(index.of_split(split)) for split in ("train", "held_out")}
  summary = {**index.summary, "of_other_length": left_out, "clips": len(kept), **sides}
  return dataclasses.replace(index, summary={**summary, "sha256": index.sha256})


def _render(data: DataConfig, folder: str, seed: int, workers: int) -> None:
  config = data.marbles
  logging.info("rendering %d Marbles clips into %s", config.clips, folder)
  marbles.write_dataset(
    folder,
    config.clips,
    config.world,
    sizes=config.sizes,
    frames=config.frames,
    fps=config.fps,
    seed=seed,
    workers=workers or os.cpu_count() or 1,
    sound=config.sound,
  )
