"""Which files there are: found, hashed and dealt into partitions, once and again when some are new.

A source is known by the hash of its bytes, so moving a folder changes no id and costs no work. A
file that is an exact copy of another is a source of its own (`copy` 1, 2, ... in order of path).
Not here: what a file holds (the probe stage).
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.curate.recipe import SOURCE_COLUMNS
from data_pipelines.curate.store import read_table, rows_of, table_of, write_table
from mgen_jax.data.files import sha256_file
from mgen_jax.data.ingest import CAPTIONS_NAME
from mgen_jax.data.media import IMAGE_SUFFIXES
from mgen_jax.errors import UserError

NAME = "sources.parquet"
REASONS: Mapping[str, str] = {
  "linked_outside": "it is a link that leaves the folder; copy the file instead",
  "cannot_open": "it cannot be opened; check its permissions, or the link",
  "name_not_utf8": "its name is not UTF-8; rename it",
  "checksum": "its SHA-256 is not that of the list in --checksums; copy it again",
}
_IGNORED = frozenset(
  (*IMAGE_SUFFIXES, ".txt", ".json", ".jsonl", ".csv", ".parquet", ".md", ".html", ".srt", ".vtt")
)
_TYPES = SOURCE_COLUMNS | {
  "partition": pa.int32(),
  "mtime_ns": pa.int64(),
  "listed_error": pa.string(),
  "beside": pa.string(),
}


def find(pattern: str) -> tuple[Path, list[str]]:
  """The folder and the paths in it, sorted, of a folder (searched through) or of a pattern.

  Hidden files, pictures and texts are passed over; anything else counts as a video until the probe
  says otherwise.

  Raises:
    UserError: nothing there.
  """
  if os.path.isdir(pattern):
    root = Path(pattern).resolve()
    paths = sorted(_walk(root))
  else:
    if not glob.has_magic(pattern):
      if not os.path.isfile(pattern):
        raise UserError(f"--input={pattern} does not exist; give a folder, a file or a pattern.")
      root = Path(pattern).resolve().parent
      paths = [Path(pattern).name]
    else:
      fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)]
      root = Path(os.path.dirname(fixed) or ".").resolve()
      found = (Path(path) for path in glob.glob(pattern, recursive=True))
      paths = sorted(
        os.path.relpath(os.path.abspath(path), root) for path in found if path.is_file()
      )
  if not paths:
    raise UserError(f"--input={pattern} holds no videos; give a folder, a file or a pattern.")
  return root, paths


def _walk(root: Path) -> Iterator[str]:
  for here, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in names:
      if not name.startswith(".") and Path(name).suffix.lower() not in _IGNORED:
        yield (Path(here) / name).relative_to(root).as_posix()


def update(
  store_root: Path,
  input_root: Path,
  paths: Sequence[str],
  partitions: int,
  *,
  threads: int | None = None,
  progress: Callable[[int, int], None] | None = None,
  checksums: Mapping[str, str] | None = None,
) -> pa.Table:
  """Writes sources.parquet for `paths` and returns it; only new or changed files are hashed.

  Columns: source_id (SHA-256 of the bytes), copy, path (relative to the input), bytes, partition,
  mtime_ns, listed_error (a key of `REASONS` for a file that is not touched; its id is then the hash
  of its path), beside (sizes and times of the texts that may hold its caption).

  Args:
    checksums: SHA-256 by path; these files are read in any case, and one that has another hash is
      listed as "checksum".
  """
  path = store_root / NAME
  known: dict[str, Mapping[str, Any]] = {}
  if path.exists():
    known = {row["path"]: row for row in rows_of(read_table(path))}

  def look(name: str) -> dict[str, Any]:
    wanted = (checksums or {}).get(name)
    # What a disk does to a file shows in neither its size nor its time.
    row = _look(input_root, name, known.get(_printable(name)) if wanted is None else None)
    if row["listed_error"] or wanted in (None, row["source_id"]):
      return row
    return row | _unusable(name, "checksum")

  rows = []
  with futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
    for done, row in enumerate(pool.map(look, paths), start=1):
      rows.append(row)
      if progress:
        progress(done, len(paths))
  rows.sort(key=lambda row: (row["source_id"], row["path"]))
  before = None
  for row in rows:
    same = before is not None and before["source_id"] == row["source_id"]
    row["copy"] = before["copy"] + 1 if same else 0
    row["partition"] = int(row["source_id"][:8], 16) % partitions
    before = row
  table = table_of(rows, _TYPES)
  if not path.exists() or not read_table(path).equals(table):
    write_table(path, table)
  return table


def _printable(name: str) -> str:
  return name.encode(errors="backslashreplace").decode()


def _look(root: Path, name: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
  row: dict[str, Any] = {"path": _printable(name), "bytes": None, "mtime_ns": None}
  try:
    if row["path"] != name:
      return row | _unusable(name, "name_not_utf8")
    if not (root / name).resolve().is_relative_to(root):
      return row | _unusable(name, "linked_outside")
    stat = (root / name).stat()
    row |= {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "listed_error": None}
    row["beside"] = _texts_beside(root / name)
    if known and all(known[key] == row[key] for key in ("bytes", "mtime_ns", "listed_error")):
      return row | {"source_id": known["source_id"]}
    return row | {"source_id": sha256_file(root / name)}
  except (OSError, RuntimeError):  # gone, not readable, or a link in a circle
    return row | _unusable(name, "cannot_open")


def _texts_beside(path: Path) -> str:
  found = []
  for text in (path.with_suffix(".txt"), path.parent / CAPTIONS_NAME):
    if text.is_file():
      stat = text.stat()
      found.append(f"{text.suffix} {stat.st_size} {stat.st_mtime_ns}")
  return "; ".join(found)


def _unusable(name: str, code: str) -> dict[str, Any]:
  digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
  return {"source_id": digest, "listed_error": code}


def of_partition(store_root: Path, partition: int) -> list[dict[str, Any]]:
  """The rows of one partition of what `update` wrote, in order of (source_id, copy)."""
  return rows_of(read_table(store_root / NAME, [("partition", "==", partition)]))


def read(store_root: Path) -> pa.Table:
  """What `update` wrote."""
  path = store_root / NAME
  if not path.exists():
    raise UserError(f"{store_root} holds no run of curation; give the --output of one.")
  return read_table(path)
