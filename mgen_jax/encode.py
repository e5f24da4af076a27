"""The encode stage: media -> cached latents, bucketed records that the generator learns from.

Where its `text` names frozen encoders, the features of each caption stand beside the latents.

Every clip of the index, held out or not, becomes one record in each of its buckets (a window of a
video; one of its frames for an image bucket). The clips of a bucket are cut into shards of fixed
size, and process p of P makes every P-th shard: the result is the same for any number of processes,
and a shard that is already there is not made again.

  STAGE/train/16x64x64/00000-of-00004.arrayrecord ... manifest.json
  STAGE/held_out/...
  STAGE/statistics.json      mean and std of each latent channel, hash of the autoencoder
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from rich import console, progress

from mgen_jax import config as config_lib
from mgen_jax.data import files, ingest, pipeline, records
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.encoders import Prompt, TextStack
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.training import runner
from mgen_jax.training.inputs import STATISTICS_NAME
from mgen_jax.workdir import Workdir

# Enough examples for mean and std of a channel to three digits.
_STATISTICS_EXAMPLES = 2048

Encoder = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Embedder = Callable[[Sequence[Prompt]], list[dict[str, np.ndarray]]]


def run(work: Workdir, name: str) -> None:
  """Writes the records of stage `name`, those that are missing.

  Raises:
    UserError: the media, the autoencoder or the disk cannot be used.
  """
  began = time.perf_counter()
  stage, data = work.experiment.stages[name], work.experiment.data
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment)))
  embed, text_digest = _make_embedder(stage)
  encode, digest = _make_encoder(work, stage)
  settings = {"autoencoder": digest, "index": index.sha256, "seed": work.experiment.seed}
  settings |= {"text": text_digest} if text_digest else {}
  buckets = [parse_bucket(text) for text in stage.buckets]
  jobs = []
  for split in ("train", "held_out"):
    sources, groups = pipeline.media_sources(
      index, buckets, split=split, images_from_videos=True, fps=data.fps, max_crop=data.max_crop
    )
    if split == "train":
      logging.info("clips by bucket:\n%s", groups.table())
    jobs += [(split, bucket, sources[bucket]) for bucket in buckets]
  if not any(len(source) for _, _, source in jobs):
    raise UserError(
      f"no clip fits a bucket of stage {name} ({', '.join(stage.buckets)}): name lengths and "
      "shapes that the videos have, or raise config.data.max_crop."
    )

  total = sum(len(source) for _, _, source in jobs)
  with progress.Progress(console=console.Console(stderr=True), transient=True) as bar:
    task = bar.add_task("encoding", total=total)
    for split, bucket, source in jobs:
      folder = work.folder(name) / split / bucket.name
      for number, part in enumerate(_shards(source, stage.shard_examples)):
        if number % jax.process_count() == jax.process_index():
          path = folder / records.shard_name(number, _count(source, stage.shard_examples))
          _write_shard(path, part, stage.batch, encode, embed, work.experiment.seed)
        bar.advance(task, len(part))
  multihost_utils.sync_global_devices(f"{name} shards")

  if jax.process_index() == 0:
    for split, bucket, source in jobs:
      folder = work.folder(name) / split / bucket.name
      count = _count(source, stage.shard_examples)
      shards = [
        records.inspect_shard(folder / records.shard_name(number, count)) for number in range(count)
      ]
      folder.mkdir(parents=True, exist_ok=True)
      records.write_manifest(folder, shards, bucket=bucket, settings=settings)
    statistics = _statistics(work.folder(name) / "train", buckets)
    if stage.latent_scale is not None:
      channels = len(statistics["mean"])
      statistics = {"mean": [0.0] * channels, "std": [1.0 / stage.latent_scale] * channels}
    files.write_text_atomic(
      work.folder(name) / STATISTICS_NAME, json.dumps({**statistics, **settings}, indent=2) + "\n"
    )
  work.finish(name, time.perf_counter() - began, examples=total, autoencoder=digest)


def _make_encoder(work: Workdir, stage: config_lib.EncodeStage) -> tuple[Encoder, str]:
  """A function uint8 [B, T, H, W, 3] -> (mean, logvar) on this host's devices, and the hash of
  the autoencoder."""
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices())
  with mesh_lib.use(mesh):
    task, params, _ = runner.load_trained(work, stage.autoencoder, mesh)
  compiled = jax.jit(task.encode)
  devices = mesh_lib.batch_shards(mesh)

  def encode(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = video.shape[0]
    video = np.pad(video, [(0, -rows % devices)] + [(0, 0)] * 4, mode="edge")
    with mesh_lib.use(mesh):
      batch = jax.device_put(video, rules.sharding(mesh, ("batch", None, None, None, None)))
      mean, logvar = jax.device_get(compiled(params, batch))
    return mean[:rows], logvar[:rows]

  return encode, _hash(params)


def _make_embedder(stage: config_lib.EncodeStage) -> tuple[Embedder, dict[str, str]]:
  """A function prompts -> arrays "text_NAME" [S, width] of each, on this host's devices, and the
  hashes of the encoders; {} for each without encoders."""
  if not stage.text.names:
    return lambda prompts: [{} for _ in prompts], {}
  stack = TextStack(stage.text)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices())
  return stack.embedder(mesh), stack.digest()


def _count(source: pipeline.MediaSource, size: int) -> int:
  return math.ceil(len(source) / size)


def _shards(source: pipeline.MediaSource, size: int) -> list[pipeline.MediaSource]:
  """The clips of a source in parts of `size`, each a source."""
  return [
    pipeline.MediaSource(
      source.folder, source.clips[start : start + size], source.bucket, fps=source.fps
    )
    for start in range(0, len(source), size)
  ]


def _write_shard(
  path: Path,
  source: pipeline.MediaSource,
  batch: int,
  encode: Encoder,
  embed: Embedder,
  seed: int,
) -> None:
  """Encodes the clips of one shard, unless it is there (a shard gets its name when it is whole)."""
  if path.exists():
    return
  bucket = source.bucket
  stream = pipeline.make_ordered_stream({bucket: source}, batch_sizes={bucket: batch}, seed=seed)
  with records.RecordWriter(path) as writer, stream:
    for _, rows in stream:
      means, logvars = encode(rows["video"])
      clips = [source.clips[int(index)] for index in rows["index"]]
      texts = embed(
        [Prompt(c.caption, float(fps), c.camera) for c, fps in zip(clips, rows["fps"], strict=True)]
      )
      for row in np.flatnonzero(rows["valid"]):
        clip = clips[row]
        writer.write(
          records.Record(
            id=clip.id,
            bucket=bucket.name,
            caption=clip.caption,
            fps=float(rows["fps"][row]),
            start=float(rows["start"][row]),
            arrays={
              "mean": _to_half(means[row], clip.path),
              "logvar": _to_half(logvars[row], clip.path),
              **texts[row],
            },
            info={"camera": clip.camera} if clip.camera else {},
          )
        )


def _to_half(values: np.ndarray, source: str) -> np.ndarray:
  """float16, which keeps three digits of a latent at half the size.

  Raises:
    UserError: a value is not finite.
  """
  half = values.astype(np.float16)
  if not np.isfinite(half).all():
    raise UserError(
      f"the latents of {source} are not finite: train the autoencoder longer or with a smaller "
      "optimizer.lr."
    )
  return half


def _statistics(folder: Path, buckets: list[Bucket]) -> dict[str, Any]:
  """Mean and standard deviation of each channel, over evenly spaced examples of all buckets."""
  sums, squares, count = 0.0, 0.0, 0
  for bucket in buckets:
    source = records.open_records(folder / bucket.name)
    step = max(1, len(source) // _STATISTICS_EXAMPLES)
    for number in range(0, len(source), step):
      latents = source[number].arrays["mean"].astype(np.float64)
      sums += latents.sum(axis=(0, 1, 2))
      squares += np.square(latents).sum(axis=(0, 1, 2))
      count += math.prod(latents.shape[:3])
  mean = sums / count
  std = np.sqrt(np.maximum(squares / count - np.square(mean), 1e-12))
  return {"mean": mean.tolist(), "std": std.tolist()}


def _hash(params: Any) -> str:
  """SHA-256 of all parameters, by name: what "the same autoencoder" means."""
  digest = hashlib.sha256()
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, leaf in leaves:
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()[:16]
