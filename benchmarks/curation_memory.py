"""Does the memory of curation grow with the number of files, or with the length of a film?

  python -m benchmarks.curation_memory
  python -m benchmarks.curation_memory --cases=planted --times=1,4 --out=memory.json

Runs the whole command, all stages, export and shards, and adds up the resident memory of all of its
processes (RSS, so what they share counts once for each) twenty times a second: "peak" is the most
that it was. Beside it the most that one process of each kind took, as the kernel knows (VmHWM).
"planted" is the corpus with planted defects (`data_pipelines.curate.planted`), as many of them,
each with another seed, as --times says; "film" is one film of so many times two minutes, with
sound, in scenes of 7 s. Linux only.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from data_pipelines.curate import planted

_CONFIG = "data_pipelines/curate/configs/marbles.py"
_EVERY = 0.05  # seconds between two looks
_KINDS = ("driver", "worker", "decoder")  # by how deep below the command a process is
_FPS, _SCENE, _MINUTES = 30, 7, 2
_RATE = 48_000  # Hz
_MIB = 1 << 20


def write_planted(folder: Path, times: int, share: float, workers: int) -> None:
  for seed in range(times):
    planted.write(folder / f"seed{seed}", seed, share, workers)


def write_film(path: Path, seconds: int, height: int, width: int) -> None:
  """H.264 and AAC; a window that moves over another picture in each scene, and noise."""
  path.parent.mkdir(parents=True)
  samples = _RATE // _FPS  # of a frame
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=_FPS)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"preset": "veryfast", "crf": "23"}
    sound = container.add_stream("aac", rate=_RATE, layout="stereo")
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (2, samples)).astype(np.float32)
    for number, picture in enumerate(itertools.islice(_pictures(height, width), seconds * _FPS)):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
      heard = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
      heard.rate, heard.pts = _RATE, number * samples
      container.mux(sound.encode(heard))
    container.mux(stream.encode(None))
    container.mux(sound.encode(None))


def _pictures(height: int, width: int) -> Iterator[np.ndarray]:
  rng = np.random.default_rng(0)
  for _ in itertools.count():
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = cv2.resize(small, (2 * width, height + 8))
    for frame in range(_SCENE * _FPS):
      x, y = 2 * frame % width, frame % 8
      yield texture[y : y + height, x : x + width]


def watched(command: Sequence[str]) -> dict[str, float]:
  """Runs it; MiB of all processes at once, and of the largest of each kind, and seconds."""
  began = time.monotonic()
  most = dict.fromkeys(("peak", *_KINDS), 0)
  known: set[int] = set()  # a process that has just been forked still shows its parent's memory
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
    while run.poll() is None:
      family = list(_family(run.pid))
      most["peak"] = max(most["peak"], sum(now for pid, _, now, _ in family if pid in known))
      for pid, depth, _, highest in family:
        kind = _KINDS[min(depth, len(_KINDS) - 1)]
        most[kind] = max(most[kind], highest if pid in known else 0)
      known = {pid for pid, *_ in family}
      time.sleep(_EVERY)
    _, errors = run.communicate()
  if run.returncode:
    raise SystemExit(errors.decode())
  return {f"{k}_mib": v / _MIB for k, v in most.items()} | {"wall_s": time.monotonic() - began}


def _family(pid: int, depth: int = 0) -> Iterator[tuple[int, int, int, int]]:
  """(pid, generations below the first, resident bytes now, and at most so far) of a process and all
  that come from it."""
  try:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    children = [child for t in threads for child in (t / "children").read_text().split()]
  except OSError:  # it has ended meanwhile
    return
  fields = dict(line.split(":", 1) for line in lines)
  if "VmHWM" in fields:  # not of one that is ending
    now, highest = (1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    yield pid, depth, now, highest
  for child in children:
    yield from _family(int(child), depth + 1)


def curate(folder: Path, output: Path, workers: int) -> dict[str, float]:
  command = [
    *(sys.executable, "-m", "data_pipelines.curate", f"--config={_CONFIG}", f"--input={folder}"),
    *(f"--output={output}", f"--workers={workers}", "--config.probe.max_seconds=20000"),
  ]
  try:
    found = watched(command)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {"kept": report["kept"], "frames": report["costs"]["frames"]} | found
  finally:
    shutil.rmtree(output, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  from benchmarks import common

  parser = common.parser(__doc__, rounds=1)
  parser.add_argument("--cases", default="planted,film", help='"planted", "film" or both.')
  parser.add_argument("--times", default="1,4", help='How much of each (default: "1,4").')
  parser.add_argument(
    "--share", type=float, default=1.0, help="Of a planted corpus (1: 345 files)."
  )
  parser.add_argument("--size", default="240,320", help="Of the film: height,width.")
  parser.add_argument("--processes", type=int, default=2, help="How many at once (default: 2).")
  options = parser.parse_args(arguments)
  work = Path(tempfile.mkdtemp(prefix="mgen_jax-memory-"))
  rows = []
  for case in options.cases.split(","):
    for times in common.numbers(options.times):
      folder = work / f"{case}{times}"
      if case == "planted":
        write_planted(folder, times, options.share, options.processes)
      else:
        seconds = 60 * _MINUTES * times
        write_film(folder / "film.mp4", seconds, *common.numbers(options.size))
      for round_ in range(options.rounds):
        found = curate(folder, work / "curated", options.processes)
        rows.append({"case": case, "times": times, "round": round_ + 1, **found})
      shutil.rmtree(folder)
  shutil.rmtree(work)
  return common.report("curation_memory", rows, options.out)


if __name__ == "__main__":
  main()
