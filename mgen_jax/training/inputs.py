"""The data of a train stage: from what earlier stages left on disk to a `loop.Stream`."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mgen_jax import config as config_lib
from mgen_jax import tasks
from mgen_jax.config import TrainStage
from mgen_jax.data import ingest, mixture, pipeline, records, shares
from mgen_jax.data import sources as sources_lib
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.tasks.base import JointTask, Task
from mgen_jax.training import loop
from mgen_jax.workdir import Workdir, read_json

STATISTICS_NAME = "statistics.json"  # of the encode stage: mean and std of each latent channel


_NO_EXAMPLES = mixture.EvenMixture(())


@dataclasses.dataclass(frozen=True)
class Prepare:
  """The transform of the pipeline: what the task makes of an example, latents normalised.

  A class and not a closure, so that worker processes can have it.
  """

  task: Task
  latents: Mapping[str, Any] | None = None  # {"mean": [C], "std": [C], ...}
  sample: bool = False  # draw latents from their distribution, where something is drawn at all

  def __call__(self, example: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    if self.latents is not None:
      example = self._normalised(example, rng)
    return self.task.prepare(example)

  def _normalised(self, example: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    mean, std = (np.asarray(self.latents[key], np.float32) for key in ("mean", "std"))
    drawn = "latents" in example  # by the encode stage, and there is nothing else to have
    latents = example["latents" if drawn else "mean"].astype(np.float32)
    if self.sample and rng is not None and not drawn:
      spread = np.exp(0.5 * example["logvar"].astype(np.float32))
      latents = latents + spread * rng.standard_normal(latents.shape, np.float32)
    made = {**example, "latents": (latents - mean) / std}
    if "images" in example:  # of a JointSource
      made["images"] = [self._normalised(image, rng) for image in example["images"]]
    return made


def make_stream(
  work: Workdir, name: str, task: Task, before: Mapping[str, Any] | None = None
) -> tuple[loop.Stream, dict[str, Any] | None]:
  """The stream of train stage `name`, and the statistics of its latents (None for media).

  Args:
    work: of the run.
    name: of the stage.
    task: that it trains.
    before: the statistics of the latents that the model it starts from has learned, which it keeps:
      what those are normalised with is part of what it knows. None: it starts from none.

  Raises:
    UserError: no bucket has an example, nothing is held out to validate on, or what an earlier
      stage left cannot be read.
  """
  stage = work.experiment.stages[name]
  parts, latents = stage.parts(), None
  if tasks.TASKS[stage.task.name].source == "latents":
    latents = _statistics(work, parts, before)
  sources = {
    part: _latent_sources(work, stage, part, task, latents)
    if latents is not None
    else _media_sources(work, stage, part)
    for part in parts or config_lib.ingests_of(work.experiment, name)
  }
  phases = [_phase(name, stage, task, step, sources) for step in stage.phases()]
  for phase in phases:
    pipeline.check_shared_memory(_batch_bytes(task, phase.batch_sizes), stage.workers)
  common = {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
    "threads": stage.threads,
    "transform": Prepare(task, latents, stage.posterior == "sample"),
  }
  make = functools.partial(
    pipeline.make_stream,
    **{**common, "workers": stage.workers},
    seed=stage.seeded(work.experiment.seed),
    repeat=stage.small_buckets == "repeat",
  )

  def start(step: int) -> mixture.Scheduled:
    opened = mixture.Scheduled(phases, make, step)
    _check_hosts(name, opened.fingerprint)
    return opened

  # For validation all sets of data of the stage, in batches of its first phase: the same at every
  # step.
  sizes = {**phases[-1].batch_sizes, **phases[0].batch_sizes}
  held_out = {b: mixture.EvenMixture([both[1][b] for both in sources.values()]) for b in sizes}
  held_out = {bucket: source for bucket, source in held_out.items() if len(source)}
  if stage.validate_every and not held_out:
    raise UserError(
      f"config.stages.{name}.validate_every is {stage.validate_every}, but no held-out clip fits a "
      "bucket of the stage: raise config.data.held_out, or set validate_every to 0."
    )

  def validation() -> Iterator[tuple[Bucket, dict[str, np.ndarray]]]:
    seen = dict.fromkeys(held_out, 0)
    with pipeline.make_ordered_stream(held_out, batch_sizes=sizes, **common) as stream:
      for bucket, batch in stream:
        del batch["valid"]  # a last batch repeats an example: still the same every time
        seen[bucket] += 1
        if seen[bucket] <= stage.validate_batches:
          yield bucket, batch

  first, *changed = [phase.batch_sizes for phase in phases]
  validated = {bucket: sizes[bucket] for bucket in held_out}  # those of later phases too
  return loop.Stream(first, start, validation, tuple(changed), validated), latents


def _statistics(
  work: Workdir, parts: Mapping[str, Any], before: Mapping[str, Any] | None
) -> dict[str, Any]:
  """The mean and spread of latents to normalise with: of what the model has learned, else of the
  first set of data."""
  of_parts = {part: read_json(work.latents(part) / STATISTICS_NAME) for part in parts}
  (first, latents), *others = of_parts.items()
  for part, found in others:
    check_autoencoder(found, latents, f"the latents of stage {part}")
  if before is None:
    return latents
  kept = {key: before[key] for key in ("mean", "std")}
  if any(kept[key] != latents[key] for key in kept):
    logging.info("latents of %s are normalised as the model has learned them", first)
  return {**latents, **kept}


def _phase(
  name: str,
  stage: TrainStage,
  task: Task,
  step: int,
  sources: Mapping[str, tuple[dict, dict]],
) -> mixture.Phase:
  """What the stage draws from `step` on."""
  entries = {part: entry for part, entry in stage.parts().items() if entry.at(step)}
  drawn = list(entries) or list(sources)
  weights = [entries[part].weight for part in entries]
  mixed = {
    bucket: sources[drawn[0]][0][bucket]
    if len(drawn) == 1
    else mixture.MixtureSource(
      [sources[part][0][bucket] for part in drawn], weights if any(weights) else None
    )
    for bucket in stage.batches()
  }
  if len(drawn) > 1:
    for bucket, source in mixed.items():
      logging.info("bucket %s draws %s of %s", bucket.name, source.counts, drawn)
  kept = _with_examples(name, stage, task, stage.batches(step), mixed)
  share = shares.of_steps(kept, by=stage.mix, images_to_videos=stage.images_to_videos)
  logging.info(
    "stage %s draws from step %d on:\n%s", name, step, shares.table(kept, share, stage.steps)
  )
  return mixture.Phase(
    step,
    {bucket: mixed[bucket] for bucket in kept},
    {bucket: part.batch for bucket, part in kept.items()},
    share,
  )


def check_autoencoder(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
  """Refuses latents that another autoencoder made: to a model they would be another language.

  Args:
    found: of a manifest, with the hash under "autoencoder".
    wanted: of the statistics, likewise.
    where: what `found` describes.
  """
  if found["autoencoder"] != wanted["autoencoder"]:
    raise UserError(
      f"{where} is of autoencoder {found['autoencoder']}, but the latents are of "
      f"{wanted['autoencoder']}: use those of one autoencoder, or encode again."
    )


def _media_sources(work: Workdir, stage: TrainStage, part: str) -> tuple[dict, dict]:
  """Sources of the training and of the held-out clips of an ingest stage, by bucket."""
  data = config_lib.data_of(work.experiment, part)
  index = ingest.load(work.folder(part))
  both = []
  for split in ("train", "held_out"):
    sources, groups = sources_lib.media_sources(
      index,
      list(stage.batches()),
      split=split,
      images_from_videos=stage.images_from_videos,
      fps=data.rate,
      max_crop=data.max_crop,
    )
    both.append(sources)
    if split == "train":
      logging.info("clips by bucket:\n%s", groups.table())
  return both[0], both[1]


def _latent_sources(
  work: Workdir, stage: TrainStage, part: str, task: Task, statistics: Mapping[str, Any]
) -> tuple[dict, dict]:
  """The same from the records of the encode stage, with images where the task wants them."""
  both = []
  for split in ("train", "held_out"):

    def read(bucket: Bucket, split: str = split) -> sources_lib.Source:
      if bucket.name not in work.experiment.stages[part].buckets:
        return _NO_EXAMPLES  # another set of data fills this bucket
      source = records.open_records(work.latents(part) / split / bucket.name)
      check_autoencoder(source.settings, statistics, str(source.folder))
      return sources_lib.LatentSource(source)

    sources = {}
    for bucket in stage.batches():
      sources[bucket] = read(bucket)
      images = task.images(bucket) if isinstance(task, JointTask) else 0
      if images and len(sources[bucket]):
        still = read(dataclasses.replace(bucket, frames=1))
        sources[bucket] = sources_lib.JointSource(sources[bucket], still, images)
    both.append(sources)
  return both[0], both[1]


def _with_examples(
  name: str,
  stage: TrainStage,
  task: Task,
  buckets: Mapping[Bucket, config_lib.BucketConfig],
  sources: Mapping[Bucket, sources_lib.Source],
) -> dict[Bucket, shares.Part]:
  """The buckets that are trained on; those with less than a batch as `small_buckets` says."""
  kept, small = {}, []
  for bucket, entry in buckets.items():
    examples = len(sources[bucket])
    part = shares.Part(examples, entry.batch, entry.weight, task.tokens(bucket))
    if examples >= entry.batch or (examples and stage.small_buckets == "repeat"):
      kept[bucket] = part
      continue
    small.append(f"{bucket.name} has {examples} examples for a batch of {entry.batch}")
    if stage.small_buckets == "error":
      smaller = f"set config.stages.{name}.buckets.b{bucket.name}.batch to {examples} or less, "
      raise UserError(
        f"stage {name}: bucket {small[0]}: {smaller if examples else ''}add clips of its length "
        f"and shape, remove the bucket, or set config.stages.{name}.small_buckets to "
        f"{'repeat or leave_out' if examples else 'leave_out'}."
      )
    logging.warning("stage %s: bucket %s and is left out", name, small[-1])
  if not kept:
    raise UserError(
      f"no bucket of stage {name} has enough clips ({'; '.join(small)}): set "
      f"config.stages.{name}.buckets to lengths and shapes that the videos have, lower their "
      "batch, or raise config.data.max_crop."
    )
  return kept


def _batch_bytes(task: Task, sizes: Mapping[Bucket, int]) -> int:
  """Of the largest batch, the share of one host."""
  return max(
    sum(
      math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
      for spec in task.batch_spec(bucket, examples // jax.process_count()).values()
    )
    for bucket, examples in sizes.items()
  )


def _check_hosts(name: str, fingerprint: str) -> None:
  """Refuses to start where hosts see different data: they would train on different batches."""
  if jax.process_count() == 1:
    return
  mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
  all_hosts = multihost_utils.process_allgather(mine)
  others = [host for host, found in enumerate(all_hosts) if not np.array_equal(found, all_hosts[0])]
  if others:
    raise UserError(
      f"stage {name}: host {others[0]} has other data than host 0 (another hash of its index and "
      "settings): give all hosts the same --workdir, videos and config."
    )
