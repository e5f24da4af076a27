"""The encode stage: media -> cached latents, bucketed records that the generator learns from.

  python -m mgen_jax.encode --autoencoder=runs/tae --videos=DIR --out=DIR \\
      --buckets=1x256x256,128x256x256

As a command it encodes another folder (files, tars, records of media, tables: docs/loading.md) with
the autoencoder of a run, on any number of hosts; an encode stage that names the result in `folder`
takes it as it is. The same command again makes what is missing, and nothing where all is there.
Where the `text` of a stage (or --text_encoders) names frozen encoders, the features of each caption
stand beside the latents.

Every clip of the index, held out or not, becomes one record in each of its buckets (a window of a
video; one of its frames for an image bucket). The clips of a bucket are cut into shards of fixed
size, and process p of P makes every P-th shard: the result is the same for any number of processes,
and a shard that is already there is not made again.

  STAGE/train/16x64x64/00000-of-00004.arrayrecord ... manifest.json
  STAGE/held_out/...
  STAGE/statistics.json      mean and std of each latent channel, hash of the autoencoder
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from rich import console, progress

from mgen_jax import cli, distributed, schema
from mgen_jax import config as config_lib
from mgen_jax.data import files, ingest, pipeline, records
from mgen_jax.data import sources as sources_lib
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.encoders import Prompt, StackConfig, TextStack, sizes
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import cpu, rules
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.autoencoder import MODEL
from mgen_jax.training import runner
from mgen_jax.training.inputs import STATISTICS_NAME, check_autoencoder
from mgen_jax.workdir import Workdir, last_trained, read_json

# Enough examples for mean and std of a channel to three digits.
_STATISTICS_EXAMPLES = 2048
# How long the processes wait for each other at the start, and for a sign of life after it.
_START_SECONDS, _HEARTBEAT_SECONDS = 300, 100

Encoder = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Embedder = Callable[[Sequence[Prompt]], list[dict[str, np.ndarray]]]


def run(work: Workdir, name: str, coder: Workdir | None = None) -> None:
  """Writes the records of stage `name`, those that are missing.

  Args:
    work: of the run.
    name: of the stage.
    coder: the run that has trained the autoencoder; None: this one.

  Raises:
    UserError: the media, the autoencoder or the disk cannot be used.
  """
  began = time.perf_counter()
  stage, data = work.experiment.stages[name], config_lib.data_of(work.experiment, name)
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment, name)))
  encode, digest = _make_encoder(coder or work, stage)
  if stage.folder is not None:
    _adopt(work, name, digest)
    return
  embed, text_digest = _make_embedder(stage)
  settings = {"autoencoder": digest, "index": index.sha256, "seed": work.experiment.seed}
  settings |= {"text": text_digest} if text_digest else {}
  buckets = [parse_bucket(text) for text in stage.buckets]
  jobs = []
  for split in ("train", "held_out"):
    sources, groups = sources_lib.media_sources(
      index, buckets, split=split, images_from_videos=True, fps=data.rate, max_crop=data.max_crop
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
          _write_shard(path, part, stage, encode, embed, work.experiment.seed)
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
  compiled = jax.jit(task.encode, compiler_options=cpu.compiler_options(mesh, convolutions=True))
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


def _adopt(work: Workdir, name: str, digest: str) -> None:
  """Checks latents that lie elsewhere and marks the stage as done."""
  stage, folder = work.experiment.stages[name], work.latents(name)
  text_digest = TextStack(stage.text).digest() if stage.text.names else {}
  statistics = read_json(folder / STATISTICS_NAME)
  check_autoencoder(statistics, {"autoencoder": digest}, str(folder))
  examples = 0
  for split in ("train", "held_out"):
    for text in stage.buckets:
      source = records.open_records(folder / split / parse_bucket(text).name)
      check_autoencoder(source.settings, statistics, str(source.folder))
      if text_digest and source.settings.get("text", {}) != text_digest:
        raise UserError(
          f"{source.folder} lacks the text features of stage {name}, or has those of other "
          f"encoders: encode with the same config.stages.{name}.text, or leave folder out."
        )
      examples += len(source)
  work.finish(name, 0.0, examples=examples, autoencoder=digest)


def _count(source: sources_lib.MediaSource, size: int) -> int:
  return math.ceil(len(source) / size)


def _shards(source: sources_lib.MediaSource, size: int) -> list[sources_lib.MediaSource]:
  """The clips of a source in parts of `size`, each a source."""
  return [
    sources_lib.MediaSource(
      source.folder, source.clips[start : start + size], source.bucket, fps=source.fps
    )
    for start in range(0, len(source), size)
  ]


def _write_shard(
  path: Path,
  source: sources_lib.MediaSource,
  stage: config_lib.EncodeStage,
  encode: Encoder,
  embed: Embedder,
  seed: int,
) -> None:
  """Encodes the clips of one shard, unless it is there (a shard gets its name when it is whole)."""
  if path.exists():
    return
  bucket = source.bucket
  sizes = {bucket: stage.batch}
  stream = pipeline.make_ordered_stream({bucket: source}, batch_sizes=sizes, seed=seed)
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
            arrays={**_arrays(means[row], logvars[row], clip, seed, stage.keep), **texts[row]},
            info=_known(clip),
          )
        )


def _known(clip: ingest.Clip) -> dict[str, str]:
  """What leads from latents back to the media: the clip's path in its folder, which for curated
  clips is their id in the table of where they came from; and its camera."""
  return {"file": clip.path} | ({"camera": clip.camera} if clip.camera else {})


def _arrays(
  mean: np.ndarray, logvar: np.ndarray, clip: ingest.Clip, seed: int, keep: str
) -> dict[str, np.ndarray]:
  """What a record keeps of the latents of a clip."""
  if keep == "moments":
    return {"mean": _to_half(mean, clip.path), "logvar": _to_half(logvar, clip.path)}
  rng = np.random.Generator(np.random.Philox([seed, int(clip.id, 16)]))
  draw = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
  return {"latents": _to_half(draw, clip.path)}


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
      arrays = source[number].arrays
      latents = arrays["mean" if "mean" in arrays else "latents"].astype(np.float64)
      sums += latents.sum(axis=(0, 1, 2))
      squares += np.square(latents).sum(axis=(0, 1, 2))
      count += math.prod(latents.shape[:3])
  mean = sums / count
  std = np.sqrt(np.maximum(squares / count - np.square(mean), 1e-12))
  return {"mean": mean.tolist(), "std": std.tolist()}


def _hash(params: Any) -> str:
  """SHA-256 of all parameters, by name: what "the same autoencoder" means."""
  digest = hashlib.sha256()
  model = {name: params[name] for name in MODEL if name in params}  # no discriminator
  leaves, _ = jax.tree_util.tree_flatten_with_path(model)
  for path, leaf in leaves:
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# The command.

STAGE, IDENTITY_NAME, UNPACKED = "latents", "encode.json", "videos"


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command (not at import: other commands have flags of the same names)."""
  to = {"flag_values": values}
  flags.DEFINE_string("autoencoder", None, "Folder of the run that trained it.", **to)
  flags.DEFINE_string("stage", None, "Its train stage; the last finished one by default.", **to)
  flags.DEFINE_string("videos", None, "Folder of media or of records of media.", **to)
  flags.DEFINE_string("out", None, "Folder to write to.", **to)
  flags.DEFINE_list("buckets", None, "Shapes: frames x height x width, like 16x64x64.", **to)
  flags.DEFINE_integer("batch", 16, "Examples encoded at once on each host.", 1, **to)
  flags.DEFINE_integer("shard_examples", 512, "Records of one file.", 1, **to)
  flags.DEFINE_enum("keep", "moments", ["moments", "sample"], "What to keep of a latent.", **to)
  flags.DEFINE_float("latent_scale", None, "Factor of latents; default: std of each to 1.", **to)
  flags.DEFINE_list("text_encoders", None, "Frozen, of captions, like ul2,byt5-small.", **to)
  flags.DEFINE_list("text_weights", None, "Folder of each; default: weights/ENCODER.", **to)
  flags.DEFINE_list("text_names", None, "Of their features; default: ul2, metaclip, ...", **to)
  flags.DEFINE_list("text_reads", None, "prompt or quoted; default: ByT5 reads quoted text.", **to)
  flags.DEFINE_list("text_lengths", None, "Tokens; default: 300, 256, 100 as in a recipe.", **to)
  flags.DEFINE_enum("text_dtype", "bfloat16", ["bfloat16", "float32"], "Of all of them.", **to)
  flags.DEFINE_bool("text_fps_prefix", True, 'Put "FPS-16" before a caption.', **to)
  flags.DEFINE_float("fps", None, "Sample clips at this rate; default: their own.", 0.0, **to)
  flags.DEFINE_list("fps_range", None, "Or LOW,HIGH: whole clips, at a rate between.", **to)
  flags.DEFINE_string("caption_key", None, "Key or column of captions in JSON and tables.", **to)
  flags.DEFINE_float("max_crop", 0.2, "Share of the picture that fitting may lose.", 0.0, **to)
  flags.DEFINE_float("held_out", 0.05, "Share of the clips that is kept apart.", 0.0, **to)
  flags.DEFINE_integer("seed", 0, "Of the split, of windows and draws.", **to)
  flags.DEFINE_enum("cluster", "auto", distributed.CLUSTERS, "Where other processes are.", **to)
  flags.DEFINE_string("coordinator", None, "host:port of process 0.", **to)
  flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.", **to)
  flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.", **to)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Encodes a folder of media with a trained autoencoder."""
  del argv
  for name in ("autoencoder", "videos", "out", "buckets"):
    if not values[name].value:
      raise UserError(f"--{name} is missing: {values[name].help[0].lower()}{values[name].help[1:]}")
  cluster = distributed.choose(
    os.environ,
    cluster=values.cluster,
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
  )
  distributed.start(cluster, timeout=_START_SECONDS, heartbeat=_HEARTBEAT_SECONDS)
  origin = Workdir.open(values.autoencoder)
  coder = values.stage or last_trained(origin, "autoencoder")
  trained = origin.experiment.stages.get(coder)
  models = (config_lib.TrainStage, config_lib.AverageStage)
  if not isinstance(trained, models) or trained.task.name != "autoencoder":
    stages = origin.experiment.stages
    known = [n for n in stages if isinstance(stages[n], models)]
    known = [n for n in known if stages[n].task.name == "autoencoder"]
    raise UserError(
      f"--stage={coder} is not a stage of {origin.root} that trains an autoencoder: "
      f"{suggest(coder, known)}"
    )
  stage = config_lib.EncodeStage(
    autoencoder=coder,
    buckets=tuple(values.buckets),
    batch=values.batch,
    shard_examples=values.shard_examples,
    keep=values.keep,
    latent_scale=values.latent_scale,
    text=_text_of(values),
  )
  for text in stage.buckets:
    trained.task.check_bucket(parse_bucket(text))
  experiment = dataclasses.replace(
    origin.experiment,
    seed=values.seed,
    data=config_lib.DataConfig(
      videos=values.videos,
      fps=values.fps,
      fps_range=_fps_range(values.fps_range),
      caption_key=values.caption_key,
      max_crop=values.max_crop,
      held_out=values.held_out,
    ),
    recipe=("ingest", STAGE),
    stages={"ingest": config_lib.IngestStage(), STAGE: stage},
  )
  work = Workdir(Path(values.out), experiment)
  if jax.process_index() == 0:
    index = ingest.scan(
      values.videos,
      seed=values.seed,
      held_out=values.held_out,
      caption_key=values.caption_key,
      unpack_to=work.root / UNPACKED,
    )
    _check_identity(work, origin, index)
    index.save(work.folder("ingest"))
  multihost_utils.sync_global_devices("index")
  run(work, STAGE, origin)
  if jax.process_index() == 0:
    print(work.folder(STAGE))


def _fps_range(texts: Sequence[str] | None) -> tuple[float, float] | None:
  if texts is None:
    return None
  try:
    low, high = map(float, texts)
  except ValueError as error:
    raise UserError(f"--fps_range={','.join(texts)}: give two numbers, like 16,32.") from error
  return low, high


_TEXT_KEYS = ("encoders", "names", "weights", "reads", "lengths")


def _text_of(values: flags.FlagValues) -> StackConfig:
  """The text encoders that the flags name; what they leave out is as in `config.text_stack`.

  Raises:
    UserError: flags that do not fit together, or weights or a vocabulary that are missing.
  """
  given = {key: tuple(values[f"text_{key}"].value or ()) for key in _TEXT_KEYS}
  chosen = given["encoders"]
  if not chosen:
    for key in _TEXT_KEYS:
      if given[key]:
        raise UserError(f"--text_{key} needs --text_encoders: name them, like ul2.")
    return StackConfig()
  paper = config_lib.text_stack()
  usual = {
    encoder: {key: paper[key][index] for key in _TEXT_KEYS}
    for index, encoder in enumerate(paper["encoders"])
  }
  for name in set(chosen) - set(usual):
    usual[name] = {
      "names": name.split("-")[0],
      "weights": f"weights/{name}",
      "reads": "quoted" if name.startswith("byt5") else "prompt",
      "lengths": sizes.SIZES[name].length if name in sizes.SIZES else 512,
    }
  made = {key: given[key] or tuple(usual[name][key] for name in chosen) for key in _TEXT_KEYS}
  try:
    made["lengths"] = tuple(int(length) for length in made["lengths"])
  except ValueError as error:
    raise UserError(f"--text_lengths={','.join(made['lengths'])}: name whole numbers.") from error
  more = {"dtype": values.text_dtype, "fps_prefix": values.text_fps_prefix}
  text = schema.build(StackConfig, {**made, "encoders": chosen, **more}, "--text_encoders")
  TextStack(text).check()
  return text


def _check_identity(work: Workdir, origin: Workdir, index: ingest.Index) -> None:
  """Refuses to mix, in one folder, latents that were made in different ways."""
  stage = work.experiment.stages[STAGE]
  done = origin.done_record(stage.autoencoder)
  now = {
    "stage": {k: v for k, v in schema.to_plain(stage).items() if k != "batch"},
    "autoencoder": {"run": origin.experiment.name, "done": done},
    "data": {k: v for k, v in schema.to_plain(work.experiment.data).items() if k != "videos"},
    "index": index.sha256,
    "seed": work.experiment.seed,
    "text_encoders": TextStack(stage.text).digest(),
  }
  now, path = json.loads(json.dumps(now)), work.root / IDENTITY_NAME
  if path.exists():
    changed = config_lib.differences(read_json(path), now)
    if changed:
      listed = "; ".join(f"{key}: {a!r} then, {b!r} now" for key, (a, b) in changed.items())
      raise UserError(
        f"--out={work.root} holds latents that were made in another way ({listed}): name another "
        "folder, or delete that one."
      )
    return
  if work.root.is_dir() and any(path.name != UNPACKED for path in work.root.iterdir()):
    raise UserError(f"--out={work.root} holds other files: name an empty folder.")
  files.make_folder(work.root, f"--out={work.root}")
  files.write_text_atomic(path, json.dumps(now, indent=2) + "\n")


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
