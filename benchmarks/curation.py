"""How much slower than decoding is curation, does it scale with processes, what does Ray cost?

  python -m benchmarks.curation --out=curation.json
  python -m benchmarks.curation --input=videos --processes=1,2,4 --engines=local,ray

Raw decode is PyAV's decoder on one thread in each of as many processes, over the same files; the
pipeline is the whole weight-free one (probe to buckets, every frame seen by all of its stages).
They take turns. "of decode" compares processor time, start of processes and all: frames a CPU
second of the pipeline over those of raw decode; "steady" leaves out starts and Parquet, which a
long run does not notice (Ray's processes are not our children, so it has the steady figure only).
Without --input it writes films of moving, grainy textures at the bit rate that uploads have: what
YouTube recommends for H.264 at 24 to 30 frames a second, for example 5 Mbit/s for 720p and 8 for
1080p (https://support.google.com/youtube/answer/1722171). The rate matters: a film of a sixth of
it decodes in half the time, which makes whatever else is done look dear. --bitrate=0 leaves it to
the encoder (crf 23: 0.8 Mbit/s for 720p).
"""

import itertools
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from data_pipelines.curate import config, engines, sources
from data_pipelines.curate import run as running
from mgen_jax.data import media

_FPS = 30
_RECOMMENDED = {360: 1.0, 480: 2.5, 720: 5.0, 1080: 8.0, 1440: 16.0, 2160: 40.0}  # Mbit/s


def recommended(height: int) -> float:
  """Mbit/s that YouTube recommends for uploads of this height, or of the next one below."""
  return _RECOMMENDED[max((h for h in _RECOMMENDED if h <= height), default=360)]


def write_films(
  folder: Path, count: int, height: int, width: int, seconds: float, bitrate: float
) -> None:
  """Films of one scene each, a process for each core."""
  folder.mkdir(parents=True, exist_ok=True)
  jobs = [(folder / f"film{number:02d}.mp4", number, height, width, seconds, bitrate)
          for number in range(count)]  # fmt: skip
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(min(count, os.cpu_count() or 1), mp_context=context) as pool:
    list(pool.map(write_film, *zip(*jobs, strict=True)))


def write_film(
  path: Path, seed: int, height: int, width: int, seconds: float, bitrate: float = 0.0
) -> None:
  """A window that moves over smooth noise, with grain, at `bitrate` Mbit/s (0: crf 23)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  large = rng.normal(0, 1, (height // 8, width // 8, 3)).astype(np.float32)
  large += cv2.resize(rng.normal(0, 2, (9, 16, 3)).astype(np.float32), large.shape[1::-1])
  texture = np.clip(cv2.resize(large, (2 * width, 2 * height)) * 30 + 110, 0, 255)
  grain = rng.normal(0, 3, (4, height, width, 3)).astype(np.float32)
  speed = rng.uniform(40, 120, 2)

  def frames():
    for frame in range(round(seconds * _FPS)):
      x, y = -speed * frame / _FPS
      window = np.float32([[1, 0, x], [0, 1, y]])
      border = cv2.BORDER_REFLECT
      moved = cv2.warpAffine(texture, window, (width, height), borderMode=border)
      yield np.clip(moved + grain[frame % 4], 0, 255).astype(np.uint8)[None]

  if bitrate:
    _encode(path, frames(), height, width, bitrate)
  else:
    media.write_video_stream(path, frames(), _FPS, crf=23)


def _encode(path: Path, frames: Iterable[np.ndarray], height, width, bitrate: float) -> None:
  """H.264 as an upload has it: x264's own preset, a key frame every two seconds."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=_FPS)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.bit_rate = round(bitrate * 1e6)
    stream.options = {"preset": "medium", "g": str(2 * _FPS)}
    stream.codec_context.thread_count = 1
    for frame in itertools.chain.from_iterable(frames):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))


def repeat(folder: Path, films: Path, times: int) -> None:
  """Copies the films into `folder`; copies differ in an empty box at the end of the file: to
  the pipeline they are other files, and what is loaded once weighs as little as in a long run."""
  for path in sorted(films.glob("*.mp4")):
    for number in range(times):
      target = folder / f"{path.stem}-{number}.mp4"
      shutil.copyfile(path, target)
      with target.open("ab") as file:
        file.write((8 + number).to_bytes(4, "big") + b"free" + bytes(number))


def decode(path: str) -> int:
  """All frames of a file; how many."""
  with av.open(path) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    return sum(1 for _ in container.decode(stream))


def mean_rate(paths: Sequence[str]) -> float:
  """Mbit/s over all files."""
  seconds = 0.0
  for path in paths:
    with av.open(path) as container:
      seconds += container.duration / av.time_base
  return sum(os.path.getsize(path) for path in paths) * 8e-6 / seconds


def measured(function) -> tuple[float, float, object]:
  """(wall seconds, CPU seconds with all child processes, result)."""

  def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)

  wall, spent = time.perf_counter(), cpu()
  result = function()
  return time.perf_counter() - wall, cpu() - spent, result


def raw(paths: list[str], processes: int) -> int:
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
    return sum(pool.map(decode, paths))


def curate(folder: str, settings: config.CurateConfig, engine: str, processes: int) -> dict:
  """One run into a folder that is thrown away; frames, CPU seconds of stages and of decoding."""
  output = tempfile.mkdtemp(prefix="mgen_jax-curation-")
  began = time.perf_counter()
  made = engines.make(engine, processes)
  try:
    ready = time.perf_counter()
    run, paths = running.create(settings.name, settings.recipe(), folder, output)
    running.score(run, paths, made, limits=settings.limits)
    running.save_selection(run, running.decide(run))
    costs = running.costs(run)
    costs |= {"start_s": ready - began, "run_s": time.perf_counter() - ready}
  finally:
    made.close()
    shutil.rmtree(output, ignore_errors=True)
  return costs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  from benchmarks import common  # late: it brings jax, which a process that decodes need not load

  parser = common.parser(__doc__, rounds=1)
  parser.add_argument("--input", help="Folder of videos; without: films made here.")
  parser.add_argument("--films", type=int, default=8, help="How many (default: 8).")
  parser.add_argument("--size", default="720,1280", help="Of made films: height,width.")
  parser.add_argument(
    "--seconds", type=float, default=28.0, help="Of a film; the paper's mean: 28."
  )
  parser.add_argument("--bitrate", type=float, help="Mbit/s of made films; 0: crf 23; see above.")
  parser.add_argument("--times", type=int, default=1, help="Of each film under other hashes.")
  parser.add_argument("--processes", default="1,2,4", help='How many at once (default: "1,2,4").')
  parser.add_argument("--engines", default="local", help='"local", or "local,ray".')
  parser.add_argument("--keep", help="Keep the made films here, and use them if they are there.")
  options = parser.parse_args(arguments)
  work = Path(tempfile.mkdtemp(prefix="mgen_jax-films-"))
  folder = Path(options.input or options.keep or work / "films")
  if not options.input and not any(folder.glob("*.mp4")):
    size = common.numbers(options.size)
    bitrate = recommended(size[0]) if options.bitrate is None else options.bitrate
    write_films(folder, options.films, *size, options.seconds, bitrate)
  if options.times > 1:
    (work / "more").mkdir()
    repeat(work / "more", folder, options.times)
    folder = work / "more"
  root, names = sources.find(str(folder))
  paths = [str(root / name) for name in names]
  settings = config.resolve(config.complete(resolution={"min_side": 64}, partitions=len(paths)))

  print(f"{len(paths)} files, {mean_rate(paths):.2f} Mbit/s")
  rows, by_stage = [], {}
  for processes in common.numbers(options.processes):
    for round_ in range(options.rounds):
      decode_wall, decode_cpu, frames = measured(lambda n=processes: raw(paths, n))
      for engine in options.engines.split(","):
        _, cpu, costs = measured(lambda e=engine, n=processes: curate(str(folder), settings, e, n))
        stages = {name: stage["cpu_s"] for name, stage in costs["stages"].items()}
        steady = sum(stages.values()) + costs["decode_cpu_s"]
        by_stage = {"decode": costs["decode_cpu_s"], **stages}
        if engine == "ray":
          cpu = steady
        row = {
          "engine": engine,
          "processes": processes,
          "round": round_ + 1,
          "mbit_s": mean_rate(paths),
          "frames": frames,
          "decode_wall_s": decode_wall,
          "decode_cpu_s": decode_cpu,
          "start_s": costs["start_s"],
          "wall_s": costs["run_s"],
          "cpu_s": cpu,
          "of_decode": decode_cpu / cpu,
          "steady": decode_cpu / steady,
          "frames_per_cpu_s": frames / cpu,
        }
        rows.append(row)
  shutil.rmtree(work)
  spent = {name: seconds for name, seconds in by_stage.items() if seconds > 0}
  print("CPU seconds of the last run:", {k: round(v, 2) for k, v in spent.items()})
  return common.report("curation", rows, options.out, cpu_by_stage=spent)


if __name__ == "__main__":
  main()
