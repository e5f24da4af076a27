"""The ingest stage: videos on disk -> an index of the good ones, with captions.

Where no folder is given, Marbles are rendered into WORKDIR/videos first, as real files, and then
take the same path; clips that tables hold as bytes are unpacked there. Not here: how files are
probed (`data/ingest.py`), curation (`data_pipelines`).
"""

import os
import time

import jax
from absl import logging
from rich import console, progress

from mgen_jax.config import DataConfig
from mgen_jax.data import ingest, marbles
from mgen_jax.workdir import Workdir


def run(work: Workdir, name: str) -> None:
  """Makes the index in the stage's folder; process 0 does, the others wait at the stage's end.

  Raises:
    UserError: no usable clip.
  """
  if jax.process_index() != 0:
    return
  began = time.perf_counter()
  data = work.experiment.data
  folder = data.videos
  if folder is None:
    folder = str(work.root / "videos")
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
      unpack_to=work.root / "videos",
      progress=lambda done, total: bar.update(task, completed=done, total=total),
    )
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
