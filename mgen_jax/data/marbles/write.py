"""A folder of Marbles clips: mp4 files, their captions, the whole truth, a page to look at them.

    clip_00000.mp4 ...   H.264, with sound
    captions.jsonl       {"file": ..., "caption": ...}; the same layout as a user's own folder
    truth.jsonl          one line a clip: all that is known about it (see `truth`)
    marbles.json         what it was rendered with; its presence says that the folder is whole
    index.html           the clips with their captions, in a browser
    edited/, double/     on request: the edited twins, and the clips at twice the size

Every clip is a function of (seed, its number) alone, so the number of workers changes no byte. The
folder is made under another name and renamed when it is whole.
"""

import concurrent.futures
import contextlib
import dataclasses
import html
import itertools
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mgen_jax.data.files import write_text_atomic
from mgen_jax.data.marbles import defects as defects_lib
from mgen_jax.data.marbles.edits import Edit, sample_edit
from mgen_jax.data.marbles.physics import simulate
from mgen_jax.data.marbles.sound import RATE, onset, soundtrack
from mgen_jax.data.marbles.world import COLOURS, Scene, WorldConfig, caption, sample_scene
from mgen_jax.data.media import encode_video, write_video
from mgen_jax.errors import UserError

MARKER = "marbles.json"
_VERSION = 1  # raise it when the same settings begin to give other clips
_PAGE_CLIPS = 240  # shown in index.html


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a dataset is a function of; see write_dataset."""

  clips: int
  world: WorldConfig
  sizes: tuple[tuple[int, int], ...]
  frames: tuple[int, ...]
  fps: float
  seed: int
  defects: tuple[str, ...]
  sound: bool
  edits: bool
  doubles: bool
  version: int = _VERSION


def write_dataset(
  out: str | os.PathLike,
  clips: int,
  config: WorldConfig,
  *,
  sizes: tuple[tuple[int, int], ...] = ((64, 64),),
  frames: tuple[int, ...] = (16,),
  fps: float = 8.0,
  seed: int = 0,
  workers: int = 0,
  defects: tuple[str, ...] = (),
  sound: bool = True,
  edits: bool = False,
  doubles: bool = False,
  progress: bool | Callable[[int, int], None] = False,
) -> str:
  """Renders a dataset, unless `out` already holds it.

  Args:
    out: the folder to make.
    clips: how many.
    config: the world that scenes are drawn from.
    sizes: (height, width) in pixels, even; clips take them in turn.
    frames: lengths; clips take them in turn, every length for every size.
    fps: frames per second.
    seed: of everything.
    workers: processes; 0 is one a core.
    defects: if given, every second clip (number 1, 3, ...) has one of them, in turn.
    sound: whether the files have a sound track.
    edits: also write the edited twin of each clip without a defect.
    doubles: also write each clip without a defect at twice the size.
    progress: True for a bar (on a terminal only), or a function of (done, all).

  Returns:
    `out`, as an absolute path.

  Raises:
    UserError: a setting that cannot be, or a folder that holds something else.
  """
  settings = Settings(
    clips, config, tuple((int(h), int(w)) for h, w in sizes), tuple(map(int, frames)),
    float(fps), int(seed), tuple(defects), bool(sound), bool(edits), bool(doubles),
  )  # fmt: skip
  _check(settings)
  if workers < 0:
    raise UserError(f"workers is {workers}: use 0 (one a core) or more.")
  out = Path(os.path.abspath(out))
  if _is_rendered(out, settings):
    return str(out)
  _sweep(out)
  staging = out.parent / f".{out.name}.{socket.gethostname()}.{os.getpid()}.partial"
  try:
    staging.mkdir(parents=True)
    for name, wanted in (("edited", edits), ("double", doubles)):
      if wanted:
        (staging / name).mkdir()
    with _reporter(progress) as report:
      records = []
      for record in _render_all(staging, settings, workers):
        records.append(record)
        report(len(records), clips)
    _write_texts(staging, settings, records)
    _rename(staging, out, settings)
  except OSError as error:
    raise UserError(
      f"{out} could not be written ({error.strerror or error}); check the path, its permissions and"
      " the free space."
    ) from error
  finally:
    shutil.rmtree(staging, ignore_errors=True)
  return str(out)


def read_truth(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a dataset's truth.jsonl, in the order of the clips."""
  path = Path(folder) / "truth.jsonl"
  try:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); render the folder again.") from error


def truth(clip: defects_lib.Clip, fps: float) -> dict[str, Any]:
  """All that is known about a clip, as plain values.

  Positions [T][x, y] and radii [T] are in pixels of the file (a pixel covers [x, x + 1]); velocity
  is in short sides of the picture per second, before any bounce and relative to the world, not to a
  moving camera. Where there are several shots ("shots"), all of it holds for the first.
  """
  scene, (frames, height, width, _) = clip.scene, clip.frames.shape
  track = simulate(scene, frames, *clip.inner, fps)
  centres, radii = track.in_pixels(*clip.inner)
  centres = centres + clip.shift
  end = _first_shot(clip) / fps
  objects = [
    {
      "colour": thing.colour,
      "rgb": list(COLOURS[thing.colour]),
      "shape": thing.shape,
      "size": thing.size,
      "texture": thing.texture,
      "identity": f"{thing.texture} {thing.colour} {thing.shape} #{thing.identity}",
      "motion": thing.motion,
      "velocity": _rounded(track.velocities[i]),
      "positions": _rounded(centres[i]),
      "radii": _rounded(radii[i]),
      "bounces": [
        {"time": b.time, "sample": onset(b.time), "with": b.other}
        for b in track.bounces
        if b.object == i and b.time < end
      ],
      "hidden": thing.hidden,
    }
    for i, thing in enumerate(scene.objects)
  ]
  return {
    "caption": caption(scene),
    "width": width,
    "height": height,
    "frames": frames,
    "fps": fps,
    "duration": frames / fps,
    "scene_seed": scene.seed,
    "background": scene.background,
    "camera": {
      "move": scene.camera,
      "centres": _rounded(track.camera_centres),
      "zooms": _rounded(track.zooms),
    },
    "objects": objects,
    "defects": list(clip.defects),
    **clip.details,
  }


# Settings and folders


def _check(settings: Settings):
  if settings.clips < 1:
    raise UserError(f"clips is {settings.clips}: ask for at least one.")
  if not settings.sizes or any(h < 16 or w < 16 or h % 2 or w % 2 for h, w in settings.sizes):
    raise UserError(f"sizes is {settings.sizes}: use even (height, width) of 16 or more.")
  if any(max(size) > 4 * min(size) for size in settings.sizes):
    raise UserError(f"sizes is {settings.sizes}: a side may be four times the other at most.")
  if not settings.frames or min(settings.frames) < 1:
    raise UserError(f"frames is {settings.frames}: use lengths of 1 or more.")
  if not 0 < settings.fps <= 240:
    raise UserError(f"fps is {settings.fps}: use a rate above 0 and up to 240.")
  if settings.seed < 0:
    raise UserError(f"seed is {settings.seed}: use 0 or more.")
  for defect in settings.defects:
    if defect not in defects_lib.DEFECTS:
      known = ", ".join(defects_lib.DEFECTS)
      raise UserError(f'defects has "{defect}"; known: {known}.')


def _plain(settings: Settings) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(settings)))


def _is_rendered(out: Path, settings: Settings) -> bool:
  """Whether `out` is whole; refuses a folder that holds anything else."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return False
  try:
    found = json.loads((out / MARKER).read_text(encoding="utf-8"))["settings"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{out} exists and holds no Marbles clips (no readable {MARKER}); give a new folder."
    ) from error
  wanted = _plain(settings)
  for key, value in wanted.items():
    if found.get(key) != value:
      raise UserError(
        f"{out} holds Marbles clips with {key} = {_short(found.get(key), value)}, not"
        f" {_short(value, found.get(key))}; give another folder or delete it."
      )
  names = set(os.listdir(out))
  lost = [i for i in range(settings.clips) if _file(i) not in names]
  if lost:
    raise UserError(f"{out} has lost {len(lost)} clips ({_file(lost[0])} ...); delete the folder.")
  return True


def _short(value, other):
  """Of two worlds, only the words that differ."""
  if isinstance(value, dict) and isinstance(other, dict):
    return {key: item for key, item in value.items() if other.get(key) != item}
  return value


def _rename(staging: Path, out: Path, settings: Settings):
  try:
    os.replace(staging, out)  # an empty folder may be there
  except OSError:
    # Another process may have rendered the same in the meantime.
    if not (out.exists() and _is_rendered(out, settings)):
      raise


def _sweep(out: Path):
  """Removes what a killed process of this machine left behind."""
  for path in out.parent.glob(f".{out.name}.{socket.gethostname()}.*.partial"):
    pid = path.name.split(".")[-2]
    if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
      shutil.rmtree(path, ignore_errors=True)


def _file(index: int) -> str:
  return f"clip_{index:05d}.mp4"


# Rendering


def _render_all(folder: Path, settings: Settings, workers: int) -> Iterator[dict[str, Any]]:
  """Writes all files; yields the truth of each clip, in order."""
  workers = min(workers or _cores(), settings.clips)
  jobs = zip(
    itertools.repeat(folder), itertools.repeat(settings), range(settings.clips), strict=False
  )
  if workers == 1:
    yield from itertools.starmap(_write_clip, jobs)
    return
  # Spawned, not forked: the parent may hold threads and devices (JAX does).
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
  try:
    chunk = max(1, min(16, settings.clips // (4 * workers)))
    yield from pool.map(_write_job, jobs, chunksize=chunk)
  finally:
    pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def _cores() -> int:
  """Those that this process may use, where the system tells."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _write_job(job):
  return _write_clip(*job)


def _scene_seed(settings: Settings, index: int) -> int:
  # 52 bits: a number that JSON keeps exactly.
  words = np.random.SeedSequence([settings.seed, index]).generate_state(2, np.uint32)
  return int(words[0]) << 20 | int(words[1]) >> 12


def _plan(settings: Settings, index: int) -> tuple[Scene, int, int, int]:
  """The scene of a clip, and its frames, height and width."""
  seed = _scene_seed(settings, index)
  height, width = settings.sizes[index % len(settings.sizes)]
  frames = settings.frames[index // len(settings.sizes) % len(settings.frames)]
  return sample_scene(seed, settings.world), frames, height, width


def _edit(settings: Settings, index: int) -> Edit | None:
  if not settings.edits or _is_planted(settings, index):
    return None
  scene, *shape = _plan(settings, index)
  track = simulate(scene, *shape, settings.fps)
  return sample_edit(scene, settings.world, track, scene.seed)


def _is_planted(settings: Settings, index: int) -> bool:
  return bool(settings.defects) and index % 2 == 1


def _make(settings: Settings, index: int) -> defects_lib.Clip:
  scene, *shape = _plan(settings, index)
  if not _is_planted(settings, index):
    edit = _edit(settings, index)
    return defects_lib.clean(edit.source if edit else scene, *shape, settings.fps)
  defect = settings.defects[index // 2 % len(settings.defects)]
  if defect != "near_duplicate":
    return defects_lib.plant(defect, scene, *shape, settings.fps, scene.seed)
  clip = defects_lib.near_duplicate(_make(settings, index - 1))
  return dataclasses.replace(clip, details={**clip.details, "duplicate_of": _file(index - 1)})


def _write_clip(folder: Path, settings: Settings, index: int) -> dict[str, Any]:
  clip = _make(settings, index)
  frames, height, width, _ = clip.frames.shape
  record: dict[str, Any] = {"file": _file(index)}
  edit = _edit(settings, index)
  if edit:
    twin = defects_lib.clean(edit.target, frames, height, width, settings.fps)
    record["edit"] = {
      "file": f"edited/{_file(index)}",
      "kind": edit.kind,
      "instruction": edit.instruction,
      "object": edit.object,
      "caption": caption(edit.target),
      "objects": [dataclasses.asdict(thing) for thing in edit.target.objects],
      "background": edit.target.background,
    }
    _save(folder / record["edit"]["file"], twin, settings)
  if settings.doubles and not _is_planted(settings, index):
    double = defects_lib.clean(clip.scene, frames, 2 * height, 2 * width, settings.fps)
    record["double"] = {"file": f"double/{_file(index)}"}
    _save(folder / record["double"]["file"], double, settings)
  if "corrupt" in clip.defects:
    data = encode_video(clip.frames, settings.fps, audio=_sound(clip, settings), crf=clip.crf)
    data, record["how"] = defects_lib.corrupt_bytes(data, clip.scene.seed)
    (folder / _file(index)).write_bytes(data)
  else:
    _save(folder / _file(index), clip, settings)
  return {**record, **truth(clip, settings.fps)}


def _save(path: Path, clip: defects_lib.Clip, settings: Settings):
  audio = _sound(clip, settings)
  write_video(path, clip.frames, settings.fps, audio=audio, audio_rate=RATE, crf=clip.crf)


def _sound(clip: defects_lib.Clip, settings: Settings) -> np.ndarray | None:
  if not settings.sound:
    return None
  track = simulate(clip.scene, len(clip.frames), *clip.inner, settings.fps)
  samples = soundtrack(clip.scene, track)
  samples[onset(_first_shot(clip) / settings.fps) :] = 0
  return samples


def _first_shot(clip: defects_lib.Clip) -> int:
  """The number of frames that `clip.scene` is on screen."""
  shots = clip.details.get("shots", [])
  return shots[1]["first_frame"] if len(shots) > 1 else len(clip.frames)


def _rounded(values: np.ndarray) -> list:
  return np.round(values, 4).tolist()


# Texts


def _write_texts(folder: Path, settings: Settings, records: list[dict[str, Any]]):
  captions = ({"file": record["file"], "caption": record["caption"]} for record in records)
  write_text_atomic(folder / "captions.jsonl", _lines(captions))
  write_text_atomic(folder / "truth.jsonl", _lines(records))
  write_text_atomic(folder / "index.html", _page(records))
  marker = {"settings": _plain(settings)}
  write_text_atomic(folder / MARKER, json.dumps(marker, indent=2) + "\n")


def _lines(records: Iterable[dict[str, Any]]) -> str:
  return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _page(records: list[dict[str, Any]]) -> str:
  """A page that plays the first clips; it needs nothing but the files beside it."""
  cells = []
  for record in records[:_PAGE_CLIPS]:
    files = [record["file"]] + [record[key]["file"] for key in ("edit", "double") if key in record]
    notes = record["defects"] + ([record["edit"]["instruction"]] if "edit" in record else [])
    videos = "".join(
      f'<video src="{file}" autoplay loop muted playsinline controls></video>' for file in files
    )
    notes = "".join(f"<b>{html.escape(note)}</b> " for note in notes)
    text = html.escape(record["caption"])
    cells.append(f"<figure>{videos}<figcaption>{notes}{text}</figcaption></figure>")
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Marbles</title><style>'
    "body{font:13px sans-serif;margin:1em;display:flex;flex-wrap:wrap;gap:10px}"
    "figure{margin:0;max-width:340px}video{height:160px;margin-right:4px}b{color:#b02020}"
    f"</style>{''.join(cells)}</html>\n"
  )


# Progress


@contextlib.contextmanager
def _reporter(progress) -> Iterator[Callable[[int, int], None]]:
  if callable(progress):
    yield progress
    return
  console = Console(stderr=True)
  if not progress or not console.is_terminal:
    yield lambda done, total: None
    return
  columns = (TextColumn("Marbles"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console) as bar:
    task = bar.add_task("clips", total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)
