"""A corpus with planted defects and the exact truth, to measure curation on: small, real files.

    python -m data_pipelines.curate.planted --out /tmp/planted

It is Marbles (`mgen_jax.data.marbles`) in several codecs, containers, sizes, rates and lengths,
some with sound: clean clips, clips with one defect each, copies of clean clips, and files that are
no videos. `truth.jsonl` says of each file what it is; `captions.jsonl` holds the captions. Every
file is a function of (seed, its number). Not here: measuring (`scorecard`).
"""

import argparse
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent import futures
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from mgen_jax.data import marbles, media
from mgen_jax.data.files import write_text_atomic
from mgen_jax.data.ingest import CAPTIONS_NAME
from mgen_jax.data.marbles import defects, sound
from mgen_jax.errors import UserError

TRUTH_NAME = "truth.jsonl"

# How many of each. What is expected of a kind: `scorecard.EXPECTED`.
COUNTS = {
  "clean": 96,
  "static": 20,
  "slideshow": 16,
  "hard_cut": 16,
  "many_cuts": 12,
  "letterbox": 20,
  "text_overlay": 20,
  "jitter": 12,
  "dull": 12,
  "too_small": 12,
  "too_short": 12,
  "too_long": 2,
  "panorama": 10,
  "corrupt": 16,
}
# Copies of the first clean clips, in turn. The first group has to be found; the second is measured.
COPIES = {"exact": 3, "remuxed": 4, "encoded": 12, "resized": 12, "shifted": 12, "brighter": 8}
HARD_COPIES = {"cropped": 6, "mirrored": 6, "letterboxed": 6}

_SIZES = ((96, 168), (168, 96), (128, 128), (108, 144), (144, 108), (108, 192))  # height, width
_RATES = (12.0, 15.0, 10.0, 24.0)
_SECONDS = (5.0, 6.0, 5.5)
_FORMS = (
  ("libx264", ".mp4"), ("libx264", ".mp4"), ("mpeg4", ".mp4"), ("libx264", ".mov"),
  ("libx265", ".mp4"), ("libx264", ".mkv"), ("mpeg4", ".avi"), ("libvpx-vp9", ".webm"),
  ("libsvtav1", ".mkv"),
)  # fmt: skip
# Options of the encoders of HEVC and AV1: fast, on one thread, silent.
_MODERN = {
  "libx265": {"preset": "superfast", "crf": "22", "x265-params": "log-level=none:pools=1"},
  "libsvtav1": {"preset": "10", "crf": "28", "svtav1-params": "lp=1"},
}
_CAMERAS = {
  "static": "static shot", "pans left": "pan left", "pans right": "pan right",
  "pans up": "tilt up", "pans down": "tilt down", "zooms in": "zoom in", "zooms out": "zoom out",
}  # fmt: skip
_SHIFT = 0.75  # seconds that a shifted copy lacks at its start


@dataclasses.dataclass(frozen=True)
class Plan:
  """One file: its number, what is wrong with it, of which file it is a copy, how it is stored."""

  number: int
  kind: str
  of: int | None
  size: tuple[int, int]
  fps: float
  seconds: float
  codec: str
  suffix: str
  camera: str
  seed: int

  @property
  def file(self) -> str:
    """Its path in the corpus; every seventh lies in a folder of its own."""
    folder = "more/" if self.number % 7 == 3 else ""
    return f"{folder}{self.number:04d}{self.suffix}"


def plans(seed: int = 0, share: float = 1.0) -> list[Plan]:
  """The files of the corpus; `share` of 1 is all of it, less is a smaller one of the same mix."""

  def some(counts):
    return {kind: max(1, round(count * share)) for kind, count in counts.items()}

  made: list[Plan] = []
  for kind, count in some(COUNTS).items():
    for index in range(count):
      made.append(_plan(len(made), kind, index, seed))
  originals = some(COUNTS)["clean"]
  for kind, count in (some(COPIES) | some(HARD_COPIES)).items():
    for index in range(count):
      # Every kind of copy of other clips, as far as there are enough: two copies of one are common.
      of = made[(index * 5 + len(made)) % originals]
      plan = _plan(len(made), kind, index, seed)
      made.append(
        dataclasses.replace(
          plan, of=of.number, size=of.size, fps=of.fps, seconds=of.seconds, camera=of.camera,
          codec="libx264" if of.codec == "mpeg4" else "mpeg4", suffix=".mp4",
        )
      )  # fmt: skip
  return made


def _plan(number: int, kind: str, index: int, seed: int) -> Plan:
  codec, suffix = _FORMS[number % len(_FORMS)]
  cameras = list(_CAMERAS)
  moves = kind == "clean"
  if codec == "libx265" and kind == "too_small":
    codec = "libx264"  # the other one destroys its memory below 64 pixels
  return Plan(
    number=number,
    kind=kind,
    of=None,
    size=_SIZES[number % len(_SIZES)],
    fps=_RATES[number % len(_RATES)],
    seconds=_SECONDS[number % len(_SECONDS)],
    codec=codec,
    suffix=".mp4" if kind == "corrupt" else suffix,
    camera=cameras[index % len(cameras)] if moves else "static",
    seed=seed * 100_000 + number,
  )


def write(folder: str | os.PathLike, seed: int = 0, share: float = 1.0, workers: int = 1) -> Path:
  """Writes the corpus unless `folder` holds it already.

  Args:
    folder: made whole, or not at all.
    seed, share: see `plans`.
    workers: processes; the files are the same for any number.

  Raises UserError if the folder holds something else.
  """
  folder = Path(folder)
  header = {"planted": 1, "seed": seed, "share": share}
  if folder.exists():
    if _header(folder) != header:
      raise UserError(f"{folder} exists and is not this corpus; give another folder.")
    return folder
  staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
  try:
    (staging / "more").mkdir(parents=True)
    todo = plans(seed, share)
    jobs = [(str(staging), plan, _origin(plan, todo)) for plan in todo]
    records = list(_run(jobs, workers))
    captions = [{"file": each["file"], "caption": each["caption"]} for each in records]
    write_text_atomic(staging / CAPTIONS_NAME, _lines(captions))
    write_text_atomic(staging / TRUTH_NAME, _lines([header, *records]))
    os.replace(staging, folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)
  return folder


def read_truth(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """What each file is: file, kind, of, width, height, fps, seconds, camera, cuts and more."""
  lines = (Path(folder) / TRUTH_NAME).read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines[1:]]


def _header(folder: Path) -> Any:
  try:
    with (folder / TRUTH_NAME).open(encoding="utf-8") as file:
      return json.loads(file.readline())
  except (OSError, ValueError):
    return None


def _lines(rows) -> str:
  return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def _origin(plan: Plan, all_plans: list[Plan]) -> Plan | None:
  return None if plan.of is None else all_plans[plan.of]


def _run(jobs, workers: int) -> Iterator[dict[str, Any]]:
  if workers == 1:
    yield from map(_job, jobs)
    return
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    yield from pool.map(_job, jobs, chunksize=8)


def _job(job) -> dict[str, Any]:
  return _write_one(Path(job[0]), *job[1:])


def _write_one(folder: Path, plan: Plan, origin: Plan | None) -> dict[str, Any]:
  """Writes the file of a plan; returns its truth."""
  path = folder / plan.file
  source = origin or plan
  scene = scene_of(source)
  truth = {
    "file": plan.file,
    "kind": plan.kind,
    "of": origin.file if origin else None,
    "camera": _CAMERAS[scene.camera],
    "caption": marbles.caption(scene),
    "cuts": [],
  }
  if plan.kind == "exact" or plan.kind == "remuxed":
    data = _encoded(origin, frames_of(origin)[0])
    path = path.with_suffix(origin.suffix if plan.kind == "exact" else ".mkv")
    truth["file"] = path.relative_to(folder).as_posix()
    path.write_bytes(data if plan.kind == "exact" else remux(data, "matroska"))
  elif plan.kind == "corrupt":
    data, truth["how"] = _broken(_encoded(plan, frames_of(plan)[0]), plan)
    path.write_bytes(data)
  else:
    video, details = frames_of(source) if origin is None else _altered(plan, *frames_of(origin))
    truth |= details
    path.write_bytes(_encoded(plan, video))
    truth |= {"height": video.shape[1], "width": video.shape[2]}
    truth |= {"fps": _rate(plan), "seconds": len(video) / _rate(plan)}
  return truth


def scene_of(plan: Plan) -> marbles.Scene:
  """A scene in which all objects move, and the camera as planned."""
  world = marbles.WorldConfig(
    sizes=("large",),
    motions=(*marbles.COMPASS, "bounces"),
    # A camera's move is seen on a background with structure only.
    backgrounds=("noisy",) if plan.camera != "static" or plan.kind == "jitter" else (
      "dark grey", "white", "beige", "gradient", "noisy",
    ),
    cameras=(plan.camera,),
    min_objects=2,
    max_objects=3,
  )  # fmt: skip
  return marbles.sample_scene(plan.seed, world)


def frames_of(plan: Plan) -> tuple[np.ndarray, dict[str, Any]]:
  """uint8 [T, H, W, 3] of a plan that is no copy, and what is to be known of it."""
  scene, fps = scene_of(plan), _rate(plan)
  count, (height, width) = _count(plan), plan.size
  if plan.kind in ("static", "slideshow", "letterbox", "text_overlay", "jitter"):
    clip = defects.plant(plan.kind, scene, count, height, width, fps, plan.seed)
    known = {name: clip.details[name] for name in ("text", "bars") if name in clip.details}
    shots = [shot["first_frame"] / fps for shot in clip.details.get("shots", [])[1:]]
    return clip.frames, known | {"cuts": shots}
  if plan.kind in ("hard_cut", "many_cuts"):
    return _shots(plan, scene, count)
  if plan.kind == "too_small":
    height, width = (2 * round(side / 4) for side in plan.size)
  if plan.kind == "panorama":
    height, width = ((64, 320), (320, 64))[plan.number % 2]
  # A long clip is a short one over and over: two minutes of objects that never meet cannot be.
  shown = min(count, round(12 * fps))
  video = marbles.render(scene, shown, height, width, fps)
  video = np.resize(video, (count, *video.shape[1:]))
  if plan.kind == "dull":
    video = np.stack([_dull(frame) for frame in video])
  return video, {}


def _rate(plan: Plan) -> float:
  return 2.0 if plan.kind == "too_long" else plan.fps


def _count(plan: Plan) -> int:
  seconds = {"too_long": 124.0, "too_short": 1.5, "hard_cut": 9.0}.get(plan.kind, plan.seconds)
  return round(seconds * _rate(plan))


def _shots(plan: Plan, scene, count) -> tuple[np.ndarray, dict[str, Any]]:
  """Scenes one after the other, each on another background than the one before it."""
  fps, rng = plan.fps, np.random.default_rng([plan.seed, 1])
  if plan.kind == "hard_cut":
    # One side of the cut is long enough for a clip.
    firsts = [round(float(rng.uniform(2.0, 3.5)) * fps)]
  else:
    shot = fps * 0.8
    firsts = [
      round(shot * i) for i in range(1, int(count / shot) + 1) if shot * i < count - fps / 4
    ]
  edges = [0, *firsts, count]
  parts = []
  for index, (first, last) in enumerate(itertools.pairwise(edges)):
    if index:
      dark = scene.background in ("dark grey", "noisy", "gradient", "black")
      background = "white" if dark else "dark grey"
      scene = dataclasses.replace(scene, seed=plan.seed + 7919 * index, background=background)
    parts.append(marbles.render(scene, last - first, *plan.size, fps))
  return np.concatenate(parts), {"cuts": [first / fps for first in firsts]}


def _dull(frame: np.ndarray) -> np.ndarray:
  """Out of focus, grey and without contrast."""
  blurred = cv2.GaussianBlur(frame, (0, 0), 0.06 * min(frame.shape[:2])).astype(np.float32)
  grey = blurred.mean(axis=-1, keepdims=True)
  flat = 96 + 0.25 * (0.8 * grey + 0.2 * blurred - 96)
  return np.clip(flat + 0.5, 0, 255).astype(np.uint8)


def _altered(plan: Plan, video: np.ndarray, known) -> tuple[np.ndarray, dict[str, Any]]:
  """A copy of a clean clip."""
  height, width = video.shape[1:3]
  if plan.kind == "brighter":
    video = np.minimum(video.astype(np.int16) + 12, 255).astype(np.uint8)
  elif plan.kind == "resized":
    video = _scaled(video, 2 * round(0.41 * height) if height > 110 else 80, None)
  elif plan.kind == "shifted":
    video = video[round(_SHIFT * plan.fps) :]
  elif plan.kind == "cropped":
    top, left = round(0.05 * height), round(0.05 * width)
    video = _scaled(video[:, top : height - top, left : width - left], height, width)
  elif plan.kind == "mirrored":
    video = video[:, :, ::-1]
  elif plan.kind == "letterboxed":
    bar = 2 * round(0.07 * height)
    inner = _scaled(video, height - 2 * bar, width)
    video = np.pad(inner, ((0, 0), (bar, bar), (0, 0), (0, 0)))
  return video, known


def _scaled(video: np.ndarray, height: int, width: int | None) -> np.ndarray:
  width = width or 2 * round(video.shape[2] * height / video.shape[1] / 2)
  area = cv2.INTER_AREA if height < video.shape[1] else cv2.INTER_CUBIC
  return np.stack([cv2.resize(frame, (width, height), interpolation=area) for frame in video])


def _encoded(plan: Plan, video: np.ndarray) -> bytes:
  """The file's bytes; every third has sound, copies are coded harder."""
  audio = None
  if plan.number % 3 == 0 and plan.kind != "too_long":
    scene = scene_of(plan)
    height, width = plan.size
    track = marbles.simulate(scene, len(video), height, width, _rate(plan))
    audio = marbles.soundtrack(scene, track)
  if plan.codec in _MODERN:
    return _modern(plan, video)
  return media.encode_video(
    video, _rate(plan), container=plan.suffix, codec=plan.codec, audio=audio,
    audio_rate=sound.RATE, crf=27 if plan.of is not None else 20, preset="superfast",
  )  # fmt: skip


def _modern(plan: Plan, video: np.ndarray) -> bytes:
  """HEVC or AV1, which nothing else here writes; without sound."""
  os.environ.setdefault("SVT_LOG", "1")  # errors only: that encoder has no option for it
  file = io.BytesIO()
  name = {".mkv": "matroska"}.get(plan.suffix, plan.suffix[1:])
  with av.open(file, "w", format=name, options={"fflags": "+bitexact"}) as container:
    rate = Fraction(_rate(plan)).limit_denominator(1000)
    stream = container.add_stream(plan.codec, rate=rate, options=_MODERN[plan.codec])
    stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
    for picture in video:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))
  return file.getvalue()


def remux(data: bytes, container: str) -> bytes:
  """The same video packets in another container, without the sound."""
  out = io.BytesIO()
  with av.open(io.BytesIO(data)) as source, av.open(out, "w", format=container) as target:
    stream = source.streams.video[0]
    copy = target.add_stream_from_template(stream)
    for packet in source.demux(stream):
      if packet.dts is not None:
        packet.stream = copy
        target.mux(packet)
  return out.getvalue()


def _broken(data: bytes, plan: Plan) -> tuple[bytes, str]:
  """The bytes of a file that cannot be used, and why."""
  turn = plan.number % 4
  if turn == 0:
    return b"", "empty"
  if turn == 1:
    png = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    return png, "wrong extension"
  return defects.corrupt_bytes(data, plan.seed)


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.curate.planted", description=__doc__.split("\n\n")[0]
  )
  parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
  parser.add_argument("--seed", type=int, default=0, help="of everything (0)")
  parser.add_argument("--share", type=float, default=1.0, help="of its size (1: all files)")
  parser.add_argument("--workers", type=int, default=1, help="processes (1)")
  options = parser.parse_args(arguments)
  try:
    folder = write(options.out, options.seed, options.share, options.workers)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{len(read_truth(folder))} files: {folder}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
