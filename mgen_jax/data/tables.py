"""Hugging Face data sets as folders of tables: Parquet files, or what `save_to_disk` writes.

One column holds the media, as bytes, as {"bytes", "path"} (the Image and Video features) or as the
path of a file beside the tables; another one holds the caption. Files by path stay where they are;
bytes are unpacked once into a folder, since a row of Parquet cannot be read without its neighbours.
Rows are streamed: memory holds a few of them, or a page of the file, as large as its writer made
it. Needs pyarrow (extra "data"), never `datasets`, and nothing is downloaded: a column of URLs is
refused.
"""

import dataclasses
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from mgen_jax.data import listing, media
from mgen_jax.data.files import temporary_beside
from mgen_jax.data.listing import Found, Listing
from mgen_jax.errors import UserError

_SUFFIXES = (".parquet", ".arrow")
_COLUMNS = ("video", "mp4", "image", "jpg", "png", "webm", "media", "file", "path", "file_name")
# Splits that nobody should train on, by the part of a path that names them.
_OTHER_SPLIT = re.compile(r"(^|/)(test|validation|valid|val|dev)(-|/|\.)")
_ROWS = 8  # read at a time: with videos of some MB each


def find(root: Path) -> list[str]:
  """The tables below `root`, relative to it, in order, without splits for tests and validation.

  Raises UserError if there are only such splits.
  """
  every = [path for path in sorted(listing.named(root, _SUFFIXES)) if "/cache-" not in f"/{path}"]
  kept = [path for path in every if not _OTHER_SPLIT.search(path)]
  if every and not kept:
    raise UserError(
      f"{root} holds tables of splits for tests and validation only ({every[0]}): to train on them"
      " all the same, rename them or name their folder itself."
    )
  if len(kept) < len(every):
    logging.info("%d tables of other splits than train are left out", len(every) - len(kept))
  return kept


def clips(root: Path, tables: Sequence[str], caption_key: str | None, out: Path | None) -> Listing:
  """The clips of tables that all have the same columns.

  Args:
    root: the folder.
    tables: from `find`.
    caption_key: the column of the caption; None: a usual one.
    out: where clips go that are held as bytes, as TABLE/ROW.mp4; those that are there are kept.

  Returns:
    A Listing of `root`, or of `out` where clips were unpacked.

  Raises:
    UserError: pyarrow is missing, a table cannot be read, or its columns are not understood.
  """
  listed, held = Listing(root), {}
  for number, name in enumerate(tables, start=1):
    logging.info("reading table %d of %d, %s", number, len(tables), name)
    for row, source, caption in _rows(root, name, caption_key):
      listed.files += 1
      where = f"row {row} of {root / name}"
      if isinstance(source, str):
        _add_path(listed, name, source, caption, where)
      elif source is None:
        listed.bad[f"{name}/{row:09d}"] = f"{where} is empty; remove it."
      elif caption:
        if out is None:
          raise UserError(f"{root / name} holds clips as bytes; give a folder to unpack them to.")
        path = f"{name}/{row:09d}{media.suffix_of(source.data, source.path)}"
        _write(out / path, source.data)
        held[path] = Found(caption)
  if held:
    both = "is named by a path where other rows hold bytes; use one of both."
    listed.bad |= {path: f"{root / path} {both}" for path in listed.found}
    listed.root, listed.found = out.resolve(), held
  return listed


@dataclasses.dataclass(frozen=True)
class _Bytes:
  data: bytes
  path: str  # as the table has it, for its suffix only


def _rows(
  root: Path, name: str, caption_key: str | None
) -> Iterator[tuple[int, str | _Bytes | None, str]]:
  """(number, path or bytes, caption) of each row; memory holds a few of them."""
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(
      f'{root / name} is a table, which pyarrow reads: pip install "mgen_jax[data]".'
    ) from error
  path = root / name
  try:
    if path.suffix == ".parquet":
      # Page by page: else a whole row group, hundreds of videos, is read at once.
      with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        columns = _columns(path, file.schema_arrow, caption_key)
        batches = file.iter_batches(_ROWS, columns=list(columns), use_threads=False)
        yield from _read(path, batches, *columns)
    else:
      with pa.memory_map(str(path)) as file:
        batches = pa.ipc.open_stream(file)
        columns = _columns(path, batches.schema, caption_key)
        yield from _read(path, batches, *columns)
  except (pa.ArrowException, OSError) as error:
    raise UserError(f"{path} cannot be read as a table ({error}); copy it again.") from error


def _columns(path: Path, schema: Any, caption_key: str | None) -> tuple[str, str]:
  """The columns of the media and of the caption."""
  names = list(schema.names)
  wanted = [caption_key] if caption_key is not None else listing.CAPTION_KEYS
  caption = next((name for name in wanted if name in names), None)
  # A feature says what it is; else names decide, those of bytes before those of paths.
  features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  kinds = features.get("info", {}).get("features", {})
  typed = [n for n in names if isinstance(kinds.get(n), dict)
           and kinds[n].get("_type") in ("Video", "Image")]  # fmt: skip
  source = next((name for name in (*typed, *_COLUMNS) if name in names), None)
  if caption is None or source is None:
    lacking = "the caption" if caption is None else "the media"
    fix = "set config.data.caption_key to one of them" if caption is None else (
      f"rename that of the media to one of {', '.join(_COLUMNS[:4])}"
    )  # fmt: skip
    raise UserError(f"{path} has no known column for {lacking} among {', '.join(names)}: {fix}.")
  return source, caption


def _read(path: Path, batches: Any, source: str, caption: str) -> Iterator:
  number = 0
  for batch in batches:
    for value, text in zip(batch[source], batch[caption], strict=True):
      value, text = value.as_py(), text.as_py()
      where = f"row {number} of {path}"
      if isinstance(value, dict):
        data, name = value.get("bytes"), value.get("path") or ""
        value = _Bytes(data, name) if data else (name or None)
      elif isinstance(value, bytes):
        value = _Bytes(value, "")
      elif value is not None and not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__} in {source!r}, not a file.")
      yield number, value, listing.caption_of({caption: text}, caption, where)
      number += 1


def _add_path(listed: Listing, table: str, file: str, caption: str, where: str) -> None:
  """A row that names a file, relative to the folder of the data set or to that of its table."""
  if "://" in file:
    raise UserError(f"{where} names {file!r}: download the files first, nothing is fetched here.")
  choices = [file, posixpath.join(posixpath.dirname(table), file)]
  choices = [listing.inside(choice, where) for choice in choices]
  path = next((choice for choice in choices if (listed.root / choice).is_file()), None)
  if path is None:
    listed.missing += 1
    listed.files -= 1
  elif caption:
    listed.found[path] = Found(caption)


def _write(path: Path, data: bytes) -> None:
  """A whole file or none; one of the same size is there from an earlier run."""
  try:
    if path.is_file() and path.stat().st_size == len(data):
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.write_bytes(data)
    temporary.rename(path)
  except OSError as error:
    raise UserError(
      f"{path} could not be written ({error.strerror}); check the folder and the free space."
    ) from error
