"""Kept clips as a folder that training reads: mp4s, captions.jsonl, and where each came from.

    clips/<clip_id>.mp4   H.264 at the source's size and rate, constant rate, with its sound
    captions.jsonl        what `mgen_jax.ingest` reads: file, caption, camera
    clips.parquet         each clip: bucket, all scores, source hash and span, its own SHA-256

Give the folder to an experiment as `data.videos`; its stages ingest, encode and train do the rest.
What was rejected is in the run's selection.parquet. Not here: what is kept (`select`), the same
clips as shards of records (`shards`).
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.curate import decode, store, work
from data_pipelines.curate.config import ExportConfig
from data_pipelines.curate.engines import Engine
from data_pipelines.curate.recipe import CLIP_KEYS
from data_pipelines.curate.run import Progress, Run
from mgen_jax.data import media
from mgen_jax.data.files import publish, sha256_file
from mgen_jax.data.ingest import CAPTIONS_NAME
from mgen_jax.errors import UserError

FOLDER = "export"
INDEX_NAME = "clips.parquet"
_CLIPS = "clips"
_STAGE = "export"
_CODE = 1  # raised whenever equal settings write other files
_CHUNK = 32  # frames
_RATE = 48_000  # Hz
_FILE = {
  "file": pa.string(),
  "file_bytes": pa.int64(),
  "file_sha256": pa.string(),
  "frames_written": pa.int32(),
}
_DUE = ("source_id", "copy", "clip_id", "path", "start", "end", "fps", "has_audio")


@dataclasses.dataclass(frozen=True)
class Task:
  """The kept clips of one partition, as rows of `_DUE`."""

  root: str
  input_root: str
  partition: int
  version: str
  inputs: str
  clips: tuple[Mapping[str, Any], ...]
  config: ExportConfig
  limits: decode.Limits


def export(
  run: Run,
  selection: pa.Table,
  engine: Engine,
  config: ExportConfig,
  *,
  limits: decode.Limits | None = None,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Writes what is missing of the export; {"clips", "failed", "bytes"}.

  Clips that are no longer kept are taken away; they can be cut again from their sources.

  Raises:
    UserError: the folder cannot be written.
  """
  limits = limits or decode.Limits()
  version = _version(config)
  kept = selection.filter(selection["keep"])
  known = [name for name in _DUE if name in kept.column_names]
  due: dict[int, list[dict[str, Any]]] = {}
  for row in kept.select(["partition", *known]).to_pylist():
    due.setdefault(row.pop("partition"), []).append(row)
  tasks = []
  for partition in range(run.recipe.partitions):
    clips = tuple(due.get(partition, ()))
    inputs = hashlib.sha256(json.dumps([version, clips]).encode()).hexdigest()
    commit = run.store.commit_of(_STAGE, version, partition)
    done = commit is not None and commit.inputs == inputs and _are_there(run, version, partition)
    if not done and (clips or commit is not None):
      root, videos = str(run.store.root.resolve()), str(run.input_root)
      tasks.append(Task(root, videos, partition, version, inputs, clips, config, limits))
  if progress:
    progress("cutting clips", 0, len(tasks))
  for number, _ in enumerate(engine.run(run_task, tasks), start=1):
    if progress:
      progress("cutting clips", number, len(tasks))
  return _finish(run, kept, version)


def _are_there(run: Run, version: str, partition: int) -> bool:
  """Whether the files of a committed partition have the sizes that they were written with."""
  folder = run.store.root / FOLDER
  rows = store.rows_of(run.store.read(_STAGE, version, partition), ("file", "file_bytes"))
  sizes = {row["file"]: row["file_bytes"] for row in rows if row["file"]}
  paths = {file: folder / file for file in sizes}
  return all(paths[f].is_file() and paths[f].stat().st_size == sizes[f] for f in sizes)


def _version(config: ExportConfig) -> str:
  settings = {name: getattr(config, name) for name in ("crf", "preset", "sound")}
  content = json.dumps([_CODE, settings], sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:12]


def run_task(task: Task) -> None:
  """Cuts the clips of one partition that are not there yet, and commits."""
  kept = store.Store(task.root)
  folder = Path(task.root) / FOLDER / _CLIPS
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise store.not_written(folder, error) from error
  earlier = kept.read(_STAGE, task.version, task.partition)
  old = {row["clip_id"]: row for row in store.rows_of(earlier)} if earlier is not None else {}
  rows, began = [], time.process_time()
  for clip in task.clips:
    path = folder / f"{clip['clip_id']}.mp4"
    row = old.get(clip["clip_id"])
    if row is None or not path.is_file() or path.stat().st_size != row["file_bytes"]:
      row = {name: clip[name] for name in CLIP_KEYS} | _cut_guarded(task, clip, path)
    rows.append(row)
  kept.write(
    _STAGE,
    task.version,
    task.partition,
    store.table_of(rows, CLIP_KEYS | _FILE | work.FAULT),
    inputs=task.inputs,
    counters={"in": len(task.clips), "out": len(rows), "cpu_s": time.process_time() - began},
  )


def _cut_guarded(task: Task, clip: Mapping[str, Any], path: Path) -> dict[str, Any]:
  source = os.path.join(task.input_root, clip["path"])
  temporary = store.beside(path).with_suffix(".part.mp4")
  try:
    frames = work.guard(task.limits).call(
      cut, source, str(temporary), dict(clip), task.config, task.limits
    )
    found = {"file_bytes": temporary.stat().st_size, "file_sha256": sha256_file(temporary)}
    publish(temporary, path)
  except decode.DecodeError as error:
    return {"error_code": error.code, "error": f"{clip['path']}: {error}"}
  except OSError as error:
    raise store.not_written(path, error) from error
  finally:
    temporary.unlink(missing_ok=True)
  return {"file": f"{_CLIPS}/{path.name}", "frames_written": frames} | found


def cut(
  source: str, target: str, clip: Mapping[str, Any], config: ExportConfig, limits: decode.Limits
) -> int:
  """Writes the frames [start, end) of a source at a constant rate; how many. In a `decode.Guard`.

  Frame j is the one shown at start + (j + 0.5) / fps, so variable rates come out right.
  """
  audio = None
  if config.sound and clip.get("has_audio"):
    audio = _sound(source, clip["start"], clip["end"])
  chunks = _chunks(source, clip["start"], clip["end"], clip["fps"], limits)
  quality = {"crf": config.crf, "preset": config.preset}
  return media.write_video_stream(
    target, chunks, clip["fps"], audio=audio, audio_rate=_RATE, **quality
  )


def _sound(source: str, start: float, end: float) -> np.ndarray | None:
  try:
    return media.read_audio(source, _RATE, start, end)
  except media.MediaError:
    return None  # a picture without its sound is still a clip


def _chunks(
  source: str, start: float, end: float, fps: float, limits: decode.Limits
) -> Iterator[np.ndarray]:
  held: list[np.ndarray] = []
  count, total = 0, max(1, round((end - start) * fps))
  last: np.ndarray | None = None

  def until(moment: float) -> Iterator[np.ndarray]:
    nonlocal held, count
    while last is not None and count < total and start + (count + 0.5) / fps < moment:
      held.append(last)
      count += 1
      if len(held) == _CHUNK:
        yield np.stack(held)
        held = []

  for shown_at, _, forms in decode.decode_frames(source, limits, start, end):
    yield from until(shown_at)
    rgb = forms("rgb", None)
    last = rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2]
  yield from until(float("inf"))
  if held:
    yield np.stack(held)


def _finish(run: Run, kept: pa.Table, version: str) -> dict[str, Any]:
  """Writes index and captions from what is committed, and takes away what is no longer kept."""
  folder = run.store.root / FOLDER
  files: dict[str, dict[str, Any]] = {}
  for partition in range(run.recipe.partitions):
    table = run.store.read(_STAGE, version, partition)
    files |= {row["clip_id"]: row for row in store.rows_of(table)} if table is not None else {}
  ids = kept["clip_id"].to_pylist()
  whole = [bool(files.get(clip, {}).get("file")) for clip in ids]
  table = kept.filter(pa.array(whole, pa.bool_()))
  ids = table["clip_id"].to_pylist()
  for name, kind in _FILE.items():
    table = table.append_column(name, pa.array([files[clip][name] for clip in ids], kind))
  metadata = {"schema_version": str(store.SCHEMA_VERSION), "config": run.name}
  lines = [
    json.dumps({key: value for key, value in line.items() if value}, ensure_ascii=False)
    for line in _captions(table)
  ]
  store.write_table(folder / INDEX_NAME, table.replace_schema_metadata(metadata))
  store.write_text(folder / CAPTIONS_NAME, "".join(line + "\n" for line in lines))
  wanted = set(table["file"].to_pylist())
  for path in sorted((folder / _CLIPS).glob("*.mp4")):
    if f"{_CLIPS}/{path.name}" not in wanted:
      path.unlink()
  return {
    "clips": table.num_rows,
    "failed": whole.count(False),
    "bytes": sum(table["file_bytes"].to_pylist()),
  }


def _captions(table: pa.Table) -> list[dict[str, str]]:
  names = {"file": "file", "caption": "caption", "camera": "caption_camera"}
  known = {key: name for key, name in names.items() if name in table.column_names}
  columns = {key: table[name].to_pylist() for key, name in known.items()}
  return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def faults(run: Run) -> list[str]:
  """One sentence for each exported file that is missing or altered, every byte read."""
  folder = run.store.root / FOLDER
  if not (folder / INDEX_NAME).exists():
    return []
  try:
    table = store.read_table(folder / INDEX_NAME)
  except UserError as error:
    return [str(error)]
  found = []
  for row in table.select(["file", "file_bytes", "file_sha256"]).to_pylist():
    path = folder / row["file"]
    if not path.is_file():
      found.append(f"{path} is missing.")
    elif path.stat().st_size != row["file_bytes"] or sha256_file(path) != row["file_sha256"]:
      found.append(f"{path} was altered or cut short.")
  return found
