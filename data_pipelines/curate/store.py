"""The folder of a run: parts of scores in Parquet, and commits that say which of them are whole.

    sources.parquet                        every file: hash, path, partition
    <stage>@<version>/part-00042.parquet   scores of one partition
    <stage>@<version>/_commit/00042.json   written after the part was reopened, counted and hashed

A part without its commit does not exist for any reader. Two workers that race write the same bytes,
so the last one wins harmlessly. Not here: what the scores are (`stage`), when they are due
(`work`).
"""

import dataclasses
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mgen_jax.data.files import publish, sha256_file
from mgen_jax.errors import UserError

SCHEMA_VERSION = 1
_SPARE_BYTES = 64 * 2**20  # below this much free space nothing new is begun


class CorruptPart(UserError):
  """A committed file that is missing, cut short or altered."""


@dataclasses.dataclass(frozen=True)
class Commit:
  """Of one part: what it was made from, what it holds, what it cost."""

  stage: str
  version: str
  partition: int
  inputs: str
  bytes: int
  sha256: str
  records: int
  counters: Mapping[str, Any]


class Store:
  """The parts of one output folder."""

  def __init__(self, root: Path | str):
    self.root = Path(root)

  def part_path(self, stage: str, version: str, partition: int) -> Path:
    return self.root / f"{stage}@{version}" / f"part-{partition:05d}.parquet"

  def commit_path(self, stage: str, version: str, partition: int) -> Path:
    return self.root / f"{stage}@{version}" / "_commit" / f"{partition:05d}.json"

  def commit_of(self, stage: str, version: str, partition: int) -> Commit | None:
    """The commit of a part if there is one and its file has the size that it says."""
    path = self.commit_path(stage, version, partition)
    try:
      commit = Commit(**json.loads(path.read_text(encoding="utf-8")))
      size = self.part_path(stage, version, partition).stat().st_size
    except FileNotFoundError:
      return None
    except (ValueError, TypeError):
      return None  # cut short by a machine that died: as good as absent
    return commit if size == commit.bytes else None

  def read(self, stage: str, version: str, partition: int) -> pa.Table | None:
    """The scores of a committed part, or None."""
    if self.commit_of(stage, version, partition) is None:
      return None
    return read_table(self.part_path(stage, version, partition))

  def write(
    self,
    stage: str,
    version: str,
    partition: int,
    table: pa.Table,
    *,
    inputs: str,
    counters: Mapping[str, Any],
  ) -> Commit:
    """Writes, verifies and commits a part. Raises UserError if the disk does not take it."""
    path = self.part_path(stage, version, partition)
    size, digest = write_table(path, table)
    commit = Commit(stage, version, partition, inputs, size, digest, table.num_rows, dict(counters))
    write_text(
      self.commit_path(stage, version, partition),
      json.dumps(dataclasses.asdict(commit), indent=1, sort_keys=True) + "\n",
    )
    return commit

  def commits(self, stage: str, version: str, partitions: int) -> list[Commit]:
    found = (self.commit_of(stage, version, partition) for partition in range(partitions))
    return [commit for commit in found if commit is not None]

  def faults(self) -> list[str]:
    """One sentence for each committed file that is missing or altered, every byte read."""
    found = []
    for path in sorted(self.root.glob("*@*/_commit/*.json")):
      try:
        commit = Commit(**json.loads(path.read_text(encoding="utf-8")))
      except (ValueError, TypeError) as error:
        found.append(f"the commit {path} cannot be read ({error}).")
        continue
      part = self.part_path(commit.stage, commit.version, commit.partition)
      if not part.is_file():
        found.append(f"{part} is missing.")
      elif part.stat().st_size != commit.bytes or sha256_file(part) != commit.sha256:
        found.append(f"{part} was altered or cut short.")
    return found

  def remove_leftovers(self) -> None:
    """Takes away what killed writers left behind; only while no other run uses the folder."""
    for path in self.root.glob("**/.*.part"):
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table) -> tuple[int, str]:
  """Writes a Parquet file whole or not at all, and checks it; (bytes, SHA-256)."""
  temporary = beside(path)
  try:
    _require_space(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, temporary, compression="zstd", version="2.6")
    if pq.read_metadata(temporary).num_rows != table.num_rows:
      raise UserError(f"{path} holds fewer rows than were written; check the disk.")
    size, digest = temporary.stat().st_size, sha256_file(temporary)
    publish(temporary, path)
  except OSError as error:
    raise not_written(path, error) from error
  finally:
    temporary.unlink(missing_ok=True)
  return size, digest


def read_table(path: Path, filters: Sequence[tuple] | None = None) -> pa.Table:
  """A Parquet file, or its rows that meet `filters` (as PyArrow takes them); raises CorruptPart."""
  try:
    return pq.read_table(path, partitioning=None, filters=filters)
  except (OSError, pa.ArrowException) as error:
    raise CorruptPart(
      f"{path} cannot be read ({str(error).splitlines()[0]}); delete it and run again."
    ) from error


def write_text(path: Path, text: str) -> None:
  """Writes a text file whole or not at all, on any shared file system."""
  temporary = beside(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)
  except OSError as error:
    raise not_written(path, error) from error
  finally:
    temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
  """A hidden name in the folder of `path` that no other host or process uses."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def not_written(path: Path, error: OSError) -> UserError:
  """The sentence for a disk that does not take a file."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return UserError(f"{path} could not be written: no space is left; free some and run again.")
  return UserError(
    f"{path} could not be written ({error.strerror or error}); check the folder and its"
    " permissions."
  )


def table_of(rows: Iterable[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
  """Rows as a table of these columns: what is left out is null, and so is NaN."""
  rows = list(rows)
  schema = pa.schema(list(types.items()))
  columns = {
    name: pa.array([_clean(row.get(name)) for row in rows], kind) for name, kind in types.items()
  }
  return pa.table(columns, schema=schema)


def _clean(value: Any) -> Any:
  if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def rows_of(table: pa.Table, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
  return (table if columns is None else table.select(list(columns))).to_pylist()


def _require_space(path: Path) -> None:
  folder = path.parent
  while not folder.exists():
    folder = folder.parent
  if shutil.disk_usage(folder).free < _SPARE_BYTES:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
