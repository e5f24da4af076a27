"""The reconstruct stage: held-out clips through autoencoders and back, side by side in one table.

  python -m mgen_jax.reconstruct --workdir=runs/tae_toy      # repeats it on what is trained
  python -m mgen_jax.reconstruct --workdir=runs/tae_toy --video=film.mp4 --out=rebuilt.mp4 --fit=pad

  WORKDIR/STAGE/reconstruction.json    every figure, by autoencoder and by bucket
  WORKDIR/STAGE/reconstruction.png     originals above what each autoencoder made of them

With --video a film of any length goes through one autoencoder in pieces (`coding.py`), in constant
memory, and is written to --out.

PSNR and SSIM are scikit-image's, by frame (`evaluation/reconstruction.py`); LPIPS where its weights
are named; rFID and rFVD on fixed random features unless others are plugged in; "spot" is the
largest normalised latent norm (`tasks/autoencoder_losses.py`).
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from absl import flags, logging
from flax import traverse_util

from mgen_jax import cli, coding
from mgen_jax import config as config_lib
from mgen_jax.data import files, ingest, media
from mgen_jax.data import sources as sources_lib
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.errors import UserError, suggest
from mgen_jax.evaluation import frechet, reconstruction
from mgen_jax.models import autoencoder_flops, perceptual
from mgen_jax.models.tiling import TilingConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks import AutoencoderTask, autoencoder_losses
from mgen_jax.tasks.autoencoder import MODEL, to_float
from mgen_jax.training import runner
from mgen_jax.weights import files as weight_files
from mgen_jax.weights import lpips
from mgen_jax.workdir import Workdir

REPORT_JSON, REPORT_PNG = "reconstruction.json", "reconstruction.png"
_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 6

# What is compared, under its name in the table; the arrow says which way is better.
COLUMNS = {
  "psnr": "PSNR dB ↑",
  "ssim": "SSIM ↑",
  "lpips": "LPIPS ↓",
  "rfid": "rFID* ↓",
  "rfvd": "rFVD* ↓",
  "spot": "spot ↓",
}

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def run(work: Workdir, name: str) -> None:
  """Runs stage `name`; process 0 does, with its own devices.

  Raises:
    UserError: no held-out clip fits a bucket, or what an earlier stage left cannot be used.
  """
  began = time.perf_counter()
  stage, data = work.experiment.stages[name], config_lib.data_of(work.experiment, name)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices()[:1])
  with mesh_lib.use(mesh):
    loaded = {coder: runner.load_trained(work, coder, mesh)[:2] for coder in stage.autoencoders}
  if jax.process_index() != 0:
    return
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment, name)))
  buckets = [parse_bucket(text) for text in stage.buckets]
  sources, _ = sources_lib.media_sources(
    index,
    buckets,
    split="held_out",
    images_from_videos=True,
    fps=data.rate,
    max_crop=data.max_crop,
  )
  perceive = None if not stage.lpips_weights else _lpips(stage.lpips_weights)
  figures: dict[str, Any] = {coder: {"buckets": {}} for coder in stage.autoencoders}
  rows: list[np.ndarray] = []
  for bucket in buckets:
    source = sources[bucket]
    if len(source) < 2:
      logging.warning("bucket %s has %d held-out clips: left out", bucket.name, len(source))
      continue
    count = min(len(source), stage.clips)
    clips = np.stack([source.example(row, None)["video"] for row in range(count)])
    made_by = {}
    for coder, (task, params) in loaded.items():
      with mesh_lib.use(mesh):
        made, spot = _rebuild(task, params, clips, stage.batch)
      made_by[coder] = made
      figures[coder]["buckets"][bucket.name] = {
        **compare(clips, made, perceive),
        "spot": spot,
        "gflops": sum(_flops(task, bucket).values()) / 1e9,
        "clips": count,
      }
    if not rows:
      rows = _picture(clips, list(made_by.values()))
  if not any(made["buckets"] for made in figures.values()):
    raise UserError(
      f"no two held-out clips fit a bucket of stage {name} ({', '.join(stage.buckets)}): name "
      "lengths and shapes that the videos have, or raise config.data.held_out."
    )
  for coder, (_, params) in loaded.items():
    model = {part: params[part] for part in MODEL}
    figures[coder]["parameters"] = sum(x.size for x in jax.tree.leaves(model))
  folder = work.folder(name)
  text = json.dumps({"autoencoders": figures, "features": "fixed random convolutions"}, indent=2)
  files.write_text_atomic(folder / REPORT_JSON, text + "\n")
  media.write_image(folder / REPORT_PNG, _sheet(rows, ["original", *stage.autoencoders]))
  work.finish(name, time.perf_counter() - began, autoencoders=list(stage.autoencoders))
  show(figures)
  logging.info("to look at: %s", folder / REPORT_PNG)


def _sheet(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
  """The rows of `_picture` on one sheet, the first of each with its label."""
  titles = [
    label if i % _SHOWN_FRAMES == 0 else ""
    for i, label in enumerate(
      label
      for _ in range(len(rows) // len(labels) // _SHOWN_FRAMES or 1)
      for label in labels
      for _ in range(_SHOWN_FRAMES)
    )
  ]
  return media.contact_sheet(
    rows,
    columns=_SHOWN_FRAMES,
    labels=titles[: len(rows)],
    scale=2 if rows[0].shape[0] < 128 else 1,
  )


def compare(
  original: np.ndarray,
  made: np.ndarray,
  perceive: Distance | None = None,
  frame_features: frechet.Features = frechet.random_frame_features,
  clip_features: frechet.Features = frechet.random_clip_features,
) -> dict[str, float | None]:
  """All measures of one set of clips against another, both uint8 [N, T, H, W, 3].

  Args:
    original: N >= 2 clips.
    made: their reconstructions.
    perceive: LPIPS of clips [N, T, H, W, 3], one value for each; None leaves it out.
    frame_features, clip_features: what rFID and rFVD compare (Inception's and I3D's make them FID
      and FVD); videos of one frame have no rFVD.
  """
  is_video = original.shape[1] > 1
  return {
    "psnr": float(reconstruction.psnr(original, made).mean()),
    "ssim": float(reconstruction.ssim(original, made).mean()),
    "lpips": None if perceive is None else float(perceive(original, made).mean()),
    "rfid": frechet.distance(frame_features(original), frame_features(made)),
    "rfvd": frechet.distance(clip_features(original), clip_features(made)) if is_video else None,
  }


def show(figures: dict[str, Any]) -> None:
  """Prints the table."""
  table = rich.table.Table(title="reconstruction of held-out clips")
  for title in ("autoencoder", "parameters", "bucket", *COLUMNS.values(), "GFLOP a clip"):
    table.add_column(title)
  for coder, made in figures.items():
    for bucket, values in made["buckets"].items():
      cells = ["-" if values[key] is None else f"{values[key]:.4g}" for key in COLUMNS]
      count = f"{made['parameters']:,}"
      table.add_row(coder, count, bucket, *cells, f"{values['gflops']:.3g}")
  console = rich.console.Console(width=140)
  console.print(table)
  console.print("* on fixed random features: comparable within this table only")


def _rebuild(
  task: AutoencoderTask, params: Any, clips: np.ndarray, batch: int
) -> tuple[np.ndarray, float]:
  """Reconstructions from the mean of the latents, and the spot statistic of these."""

  @jax.jit
  def program(params, video):
    mean, _ = task.encode(params, video)
    made = task.decode(params, mean, video.shape[1])
    return made, jax.vmap(autoencoder_losses.spot_norm)(mean)

  batch = min(batch, len(clips))
  made, spots = [], []
  for start in range(0, len(clips), batch):
    rows = np.minimum(np.arange(start, start + batch), len(clips) - 1)  # one program for all
    video, spot = jax.device_get(program(params, clips[rows]))
    made.append(video[: len(clips) - start])
    spots.append(spot)
  return np.concatenate(made), float(np.max(np.concatenate(spots)))


def _flops(task: AutoencoderTask, bucket: Bucket) -> dict[str, int]:
  shape = (bucket.frames, bucket.height, bucket.width)
  return autoencoder_flops.flops(task.config.model, shape)


def _lpips(paths: Sequence[str]) -> Distance:
  tensors: dict[str, np.ndarray] = {}
  for path in paths:
    tensors |= weight_files.read_tensors(path)
  flat = lpips.import_lpips(tensors, " with ".join(paths))
  params = {"params": traverse_util.unflatten_dict(flat, sep="/")}
  apply = jax.jit(lambda p, a, b: perceptual.Lpips().apply(p, to_float(a), to_float(b)))

  def distance(original, made):
    values = [apply(params, a, b) for a, b in zip(original, made, strict=True)]
    return np.asarray(values).mean(1)

  return distance


def _picture(original: np.ndarray, made: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Frames of a few clips: a row of originals, then a row for each autoencoder."""
  times = np.linspace(0, original.shape[1] - 1, _SHOWN_FRAMES).round().astype(int)
  shown = range(min(_SHOWN_CLIPS, len(original)))
  return [x[clip, t] for clip in shown for x in (original, *made) for t in times]


def film(
  task: AutoencoderTask,
  params: Any,
  mesh: jax.sharding.Mesh,
  source: str,
  out: str,
  pieces: TilingConfig,
  fit: str = "refuse",
) -> int:
  """A video file through an autoencoder and back, in pieces; its sound is left out.

  Args:
    task, params, mesh: the autoencoder.
    source, out: files.
    pieces: how it is cut.
    fit: what to do with sizes that the strides do not divide (see `coding.fit_size`).

  Returns:
    Frames written.

  Raises:
    UserError: the file, its size or the pieces cannot be used.
  """
  info = media.probe(source)
  coder = coding.Coder(task.config.model, params, pieces, mesh)
  strides, seen = task.config.model.space_strides, 0
  if fit == "refuse" and (info.height % strides[0] or info.width % strides[1]):
    rows, columns = strides
    raise UserError(
      f"{source} is {info.width}x{info.height} and the autoencoder's strides are {columns}x{rows}: "
      "--fit=pad gives it back in its own size, --fit=crop without its margin."
    )

  def frames():
    nonlocal seen
    for chunk in media.stream_video(source, pieces.frames):
      seen += len(chunk)
      yield coding.fit_size(chunk, strides, fit)

  def shown(videos):
    for video in videos:
      if fit == "pad":  # give back the size that it had
        video = video[:, : info.height, : info.width]
      # A last latent may hold frames that the film does not have.
      video = coding.to_uint8(video[: max(0, seen - shown.count)])
      shown.count += len(video)
      if len(video):
        yield video

  shown.count = 0
  latents = (mean for mean, _ in coder.encode(frames()))
  made = shown(coder.decode(latents, None))
  return media.write_video_stream(out, made, info.fps)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Repeats the reconstruct stage of a run."""
  del argv
  if values.workdir is None:
    raise UserError("--workdir is missing: name the folder of a run, like runs/tae_toy.")
  work = Workdir.open(values.workdir)
  stages = work.experiment.stages
  known = [name for name in work.experiment.recipe if stages[name].kind == "reconstruct"]
  name = values.stage if values.stage is not None else (known[-1] if known else "reconstruct")
  if name not in known:
    raise UserError(
      f"--stage={name} is not a reconstruct stage of {work.root}: {suggest(name, known)}"
    )
  if values.video is not None:
    _film(work, name, values)
    return
  work.start(name)
  run(work, name)


def _film(work: Workdir, name: str, values: flags.FlagValues) -> None:
  coder = values.autoencoder or work.experiment.stages[name].autoencoders[0]
  known = work.experiment.stages[name].autoencoders
  if coder not in known:
    raise UserError(f"--autoencoder={coder} is not compared in {name}: {suggest(coder, known)}")
  source = Path(values.video)
  if not source.is_file():
    raise UserError(f"--video={source} is missing: name a file.")
  if values.out is None:
    raise UserError("--out is missing: name the file to write, like rebuilt.mp4.")
  if Path(values.out).resolve() == source.resolve():
    raise UserError(f"--out={values.out} is the film itself: name another file.")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices())
  with mesh_lib.use(mesh):
    task, params, _ = runner.load_trained(work, coder, mesh)
  pieces = TilingConfig(mode=values.mode, batch=mesh_lib.batch_shards(mesh))
  count = film(task, params, mesh, values.video, values.out, pieces, values.fit)
  print(f"{values.out}: {count} frame{'s' * (count != 1)}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of the run, like runs/tae_toy.")
  flags.DEFINE_string("stage", None, "The reconstruct stage; default: the last one.")
  flags.DEFINE_string("video", None, "A film to send through, whatever its length.")
  flags.DEFINE_string("out", None, "With --video: the file to write.")
  flags.DEFINE_string("autoencoder", None, "With --video: which one; default: the first.")
  flags.DEFINE_enum("mode", "blend", ["blend", "exact"], "With --video: how pieces are joined.")
  flags.DEFINE_enum(
    "fit", "refuse", ["refuse", "pad", "crop"], "With --video: sizes that no stride divides."
  )
  cli.run(main)
