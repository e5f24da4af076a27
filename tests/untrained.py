"""A run that looks finished, with random weights in place of trained ones: in seconds."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from mgen_jax import config as config_lib
from mgen_jax import ingest, schema, tasks
from mgen_jax.training import optimizer as optimizer_lib
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.workdir import Workdir
from tests import tiny

LATENTS = {"mean": [0.1, 0.0, -0.1, 0.2], "std": [1.0, 0.5, 2.0, 1.5], "autoencoder": "0" * 16}
STAGES = ("autoencoder", "t2i", "t2v")


def make(
  root: Path, *, videos: str | None = None, clips: int = 16, task: dict[str, Any] | None = None
) -> Workdir:
  """The run of tests/tiny.py, its stages up to t2v "done".

  Args:
    root: becomes the workdir.
    videos: a folder of the user's own; Marbles by default.
    clips: of Marbles.
    task: of the generators; that of tests/tiny.py by default.
  """
  values = tiny.get_config()
  values.data.marbles.clips = clips
  values.data.videos = videos
  values.stages.ingest.workers = 1
  for name in STAGES[1:] if task else ():
    values.stages[name].task = config_dict.ConfigDict(task)
  work = Workdir.create(root, config_lib.resolve(values))
  for name in work.experiment.recipe[:-1]:
    work.start(name)
    if name == "ingest":
      ingest.run(work, name)
    elif name in STAGES:
      save(work, name, seed=STAGES.index(name))
      work.finish(name, 10.0, steps=work.experiment.stages[name].steps)
    else:
      work.finish(name, 5.0)
  return work


def save(work: Workdir, name: str, seed: int) -> None:
  """Saves a checkpoint of a stage with random averaged parameters (nothing is compiled)."""
  stage = work.experiment.stages[name]
  task = tasks.make(stage.task)
  shapes = state_lib.shapes(task, optimizer_lib.make_optimizer(stage.optimizer, stage.steps))
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  rng = np.random.default_rng(seed)

  def random(path, leaf):
    fan_in = max(1, leaf.size // leaf.shape[-1])
    noise = rng.standard_normal(leaf.shape) / np.sqrt(fan_in)
    return (noise + ("scale" in jax.tree_util.keystr(path))).astype(leaf.dtype)

  state = state.replace(ema=jax.tree_util.tree_map_with_path(random, state.ema))
  meta = {
    "experiment": work.experiment.name,
    "stage": name,
    "task": schema.to_plain(stage.task),
    "latents": None if stage.latents is None else LATENTS,
    "buckets": [bucket.name for bucket in stage.batches()],
    "seconds": 10.0,
  }
  with Checkpoints(str(work.folder(name) / "checkpoints")) as checkpoints:
    checkpoints.save(stage.steps, state, {"step": stage.steps, "fingerprint": ""}, meta)
