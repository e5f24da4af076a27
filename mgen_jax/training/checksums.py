"""Checksums of the files of a checkpoint, to tell one that has changed since it was written.

  STEP/checksums-0-of-1.json   {"files": {relative path: [bytes, SHA-256]}}

Of P processes, process p keeps those of every P-th file: no host reads all of a large model. How
many processes read is another matter: each takes its share of all that is listed. A checkpoint
whose run ended between its commit and its checksums has none, and is used with a warning: it is
whole all the same, since Orbax names it only then.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path

from absl import logging

from mgen_jax.data.files import sha256_file, write_text_atomic

_PATTERN = "checksums-*-of-*.json"
_BEING_WRITTEN = f".{_PATTERN}.*"  # by another process of the run, just now
_THREADS = 8


class Damaged(Exception):
  """A file that is not what was written; the message names it."""


def write(folder: Path, process: int, processes: int) -> None:
  """Keeps the checksums of this process's share of a whole checkpoint."""
  files = _files(folder)[process::processes]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    content = {"files": dict(pool.map(functools.partial(_entry, folder), files))}
  name = f"checksums-{process}-of-{processes}.json"
  write_text_atomic(folder / name, json.dumps(content, indent=1) + "\n")


def verify(folder: Path, process: int, processes: int) -> None:
  """Compares this process's share of the files with their checksums.

  Raises:
    Damaged: a file is missing, or is not what was written.
  """
  lists = sorted(folder.glob(_PATTERN))
  writers = int(lists[0].stem.split("-")[-1]) if lists else 1
  if len(lists) < writers:
    missing = "no checksums" if not lists else f"{len(lists)} of {writers} lists of checksums"
    logging.warning("%s has %s: the files without one are not verified", folder, missing)
  expected = _listed(lists)

  def check(item: tuple[str, list]) -> None:
    name, (size, digest) = item
    path = folder / name
    if not path.is_file():
      raise Damaged(f"{name} is missing")
    if path.stat().st_size != size:
      raise Damaged(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    if sha256_file(path) != digest:
      raise Damaged(f"{name} is not what was written (another SHA-256)")

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(check, sorted(expected.items())[process::processes]))


def digest(folder: Path) -> str:
  """One checksum of a whole checkpoint, however many processes have written it; from its lists,
  and where they are not complete from the files.

  Raises:
    Damaged: a list cannot be read.
  """
  lists = sorted(folder.glob(_PATTERN))
  if not lists or len(lists) < int(lists[0].stem.split("-")[-1]):
    files = _files(folder)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      listed = dict(pool.map(functools.partial(_entry, folder), files))
  else:
    listed = _listed(lists)
  return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
  """Of a checkpoint, in order, without the lists."""
  return sorted(
    path
    for path in folder.rglob("*")
    if not (path.parent == folder and (path.match(_PATTERN) or path.match(_BEING_WRITTEN)))
    and path.is_file()
  )


def _entry(folder: Path, path: Path) -> tuple[str, list]:
  return path.relative_to(folder).as_posix(), [path.stat().st_size, sha256_file(path)]


def _listed(lists: Sequence[Path]) -> dict[str, list]:
  expected = {}
  for path in lists:
    try:
      expected |= json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
      raise Damaged(f"{path.name} is no list of checksums") from error
  return expected
