"""The exported clips once more, as shards of records by bucket: few large files for many hosts.

    shards/<frames>x<height>x<width>/00000-of-00004.arrayrecord ... manifest.json
    shards/index.jsonl        where each clip is, its caption and its side of the split

A record is a clip's mp4 with its caption and where it came from (`Provenance` of
`mgen_jax.data.records`). Give the folder to an experiment as `data.videos`, like a folder of files:
examples are the same.
The bytes do not depend on engine or workers. Not here: cutting clips (`export`).
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.curate import export, store
from data_pipelines.curate.config import ExportConfig
from data_pipelines.curate.engines import Engine
from data_pipelines.curate.recipe import CLIP_KEYS, SOURCE_COLUMNS
from data_pipelines.curate.run import Progress, Run
from mgen_jax.data import ingest, records
from mgen_jax.data.buckets import parse_bucket
from mgen_jax.errors import UserError

FOLDER = "shards"
# Columns of the selection that are no scores.
_FACTS = {*SOURCE_COLUMNS, *CLIP_KEYS, "partition", "keep", "first_fail", "fails", "error_code",
          "error", "file", "file_bytes", "file_sha256", "frames_written"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """One shard: names of clips, never their bytes."""

  root: str
  bucket: str
  name: str
  clips: tuple[str, ...]
  scorers: Mapping[str, str]


def provenance(row: Mapping[str, Any], scorers: Mapping[str, str]) -> records.Provenance:
  """That of a row of selection.parquet or of clips.parquet."""
  return records.Provenance(
    source_id=row["source_id"],
    source=row["path"],
    clip_id=row["clip_id"] or "",
    start=row["start"],
    end=row["end"],
    scores={name: value for name, value in row.items() if name not in _FACTS},
    scorers=dict(scorers),
    first_fail=row["first_fail"] or "",
    fails=tuple(row["fails"]),
  )


def write(
  run: Run, engine: Engine, config: ExportConfig, *, progress: Progress | None = None
) -> dict[str, int]:
  """Writes the shards of the run's export; {"records", "shards", "buckets"}.

  A bucket whose clips are those of its shards is left as it is. Clips without a caption or a bucket
  are in none; a run with the stages of both off has no shards.

  Raises:
    UserError: the folder cannot be written.
  """
  exported, folder = run.store.root / export.FOLDER, run.store.root / FOLDER
  rows = [row for row in _rows(exported) if row.get("caption") and row.get("bucket")]
  if not rows:
    shutil.rmtree(folder, ignore_errors=True)
    return {"records": 0, "shards": 0, "buckets": 0}
  index = ingest.scan(exported, seed=run.recipe.seed, held_out=config.held_out)
  by_file = {clip.path: clip for clip in index.clips}
  scorers = {stage.name: stage.scorer() for stage in run.recipe.stages if stage.scorer()}
  buckets: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    if row["file"] in by_file:
      buckets.setdefault(row["bucket"], []).append(row)
  tasks, plans = [], {}
  for bucket, members in sorted(buckets.items()):
    settings = {"content": "media", "clips": _digest(members, scorers)}
    parts = list(_parts(members, config.shard_bytes))
    plans[bucket] = settings, [records.shard_name(n, len(parts)) for n in range(len(parts))]
    if _is_there(folder / bucket, settings):
      continue
    shutil.rmtree(folder / bucket, ignore_errors=True)
    ids = [tuple(row["clip_id"] for row in part) for part in parts]
    tasks += [
      Task(str(run.store.root.resolve()), bucket, name, part, scorers)
      for name, part in zip(plans[bucket][1], ids, strict=True)
    ]
  for number, _ in enumerate(engine.run(run_task, tasks), start=1):
    if progress:
      progress("writing shards", number, len(tasks))
  for bucket, (settings, names) in plans.items():
    if not _is_there(folder / bucket, settings):
      made = [records.inspect_shard(folder / bucket / name) for name in names]
      where = folder / bucket
      records.write_manifest(where, made, bucket=parse_bucket(bucket), settings=settings)
  _remove_others(folder, set(plans))
  _write_index(folder, index, by_file, buckets)
  return {
    "records": sum(map(len, buckets.values())),
    "shards": sum(len(names) for _, names in plans.values()),
    "buckets": len(plans),
  }


def run_task(task: Task) -> None:
  """Writes one shard, which appears when it is whole."""
  exported = Path(task.root) / export.FOLDER
  table = store.read_table(exported / export.INDEX_NAME, [("clip_id", "in", list(task.clips))])
  rows = {row["clip_id"]: row for row in table.to_pylist()}
  bucket = parse_bucket(task.bucket)
  with records.RecordWriter(Path(task.root) / FOLDER / task.bucket / task.name) as writer:
    for clip in task.clips:
      row = rows[clip]
      info = {"provenance": provenance(row, task.scorers).plain(), "sha256": row["file_sha256"]}
      caption, data = row["caption"], (exported / row["file"]).read_bytes()
      writer.write(records.media_record(clip, bucket, caption, row["fps"], data, info))


def _rows(exported: Path) -> list[dict[str, Any]]:
  """The exported clips in order of their names."""
  table: pa.Table = store.read_table(exported / export.INDEX_NAME)
  return sorted(table.to_pylist(), key=lambda row: row["clip_id"])


def _parts(rows: Sequence[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
  """Runs of rows of about `most` bytes of files."""
  part, size = [], 0
  for row in rows:
    part.append(row)
    size += row["file_bytes"]
    if size >= most:
      yield part
      part, size = [], 0
  if part:
    yield part


def _digest(rows: Sequence[Mapping[str, Any]], scorers: Mapping[str, str]) -> str:
  content = json.dumps([list(rows), dict(scorers)], default=str)
  return hashlib.sha256(content.encode()).hexdigest()


def _is_there(folder: Path, settings: Mapping[str, Any]) -> bool:
  """Whether a bucket is committed, and made from just that."""
  if not (folder / records.MANIFEST_NAME).exists():
    return False
  try:
    records.open_records(folder, settings=settings)
  except records.RecordError:
    return False
  return True


def _remove_others(folder: Path, buckets: set[str]) -> None:
  """Takes away buckets that have no clip any more; they can be made again."""
  for path in folder.iterdir():
    if path.is_dir() and path.name not in buckets:
      shutil.rmtree(path)


def _write_index(folder, index, by_file, buckets) -> None:
  clips = [
    dataclasses.replace(
      by_file[row["file"]], archive=bucket, offset=number, bytes=row["file_bytes"]
    )
    for bucket, members in buckets.items()
    for number, row in enumerate(members)
  ]
  clips.sort(key=lambda clip: clip.path)
  ingest.Index(folder, tuple(clips), {"of": index.sha256}).save(folder)


def faults(run: Run) -> list[str]:
  """One sentence for each shard that is missing or altered, every byte read; and for records that
  are not of the clips they name."""
  folder = run.store.root / FOLDER
  if not (folder / ingest.INDEX_NAME).exists():
    return []
  found = []
  try:
    index = ingest.load(folder)
  except UserError as error:
    return [str(error)]
  for bucket in sorted({clip.archive for clip in index.clips}):
    members = [clip for clip in index.clips if clip.archive == bucket]
    try:
      source = records.open_records(folder / bucket, check_hashes=True)
      for clip in members:
        record = source[clip.offset]
        if record.id != Path(clip.path).stem or records.Provenance.of(record).clip_id != record.id:
          found.append(f"record {clip.offset} of {folder / bucket} is not {clip.path}.")
    except (records.RecordError, IndexError) as error:
      found.append(str(error))
  return found
