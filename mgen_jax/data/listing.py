"""What a folder says that it holds: media files, and which caption belongs to which.

Captions of a plain folder are lines {"file": ..., "caption": ...} of `captions.jsonl` in the folder
itself, rows of a `metadata.jsonl` or `metadata.csv` in any of its folders (Hugging Face's layout of
images and videos: "file_name" and a column of texts), or a text file `name.txt` beside each
`name.mp4`; the first of these wins. Clips in tars (`tars`) and in tables (`tables`) are listed by
files of their own. Not here: whether a file can be read (`ingest`).
"""

import csv
import dataclasses
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from mgen_jax.data import media
from mgen_jax.errors import UserError

CAPTIONS_NAME = "captions.jsonl"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
# Usual names of the column or key that holds the caption; the first one that is there is taken.
CAPTION_KEYS = ("caption", "text", "prompt", "description", "captions", "label_text")
CAPTION_LINE = '{"file": "clip.mp4", "caption": "a red circle moves left"}'
CAPTION_FORMS = (
  f"either a file {CAPTIONS_NAME} with a line {CAPTION_LINE} for each, or a text file clip.txt"
  " beside each clip.mp4"
)


@dataclasses.dataclass(frozen=True)
class Found:
  """One media file with a caption.

  Attributes:
    caption: on one line.
    camera: its motion, "" if that is not known.
    archive: the file that it is a part of, relative to the folder; "": it is a file of its own.
    offset, bytes: where in the archive.
  """

  caption: str
  camera: str = ""
  archive: str = ""
  offset: int = 0
  bytes: int = 0


@dataclasses.dataclass
class Listing:
  """What was found below `root`.

  Attributes:
    root: that all paths are relative to.
    found: by path.
    bad: the reason why, by path, of what cannot be used.
    files: media seen; `found`, `bad` and those without a caption.
    missing: captions whose file is not there.
  """

  root: Path
  found: dict[str, Found] = dataclasses.field(default_factory=dict)
  bad: dict[str, str] = dataclasses.field(default_factory=dict)
  files: int = 0
  missing: int = 0

  def add(self, other: "Listing") -> None:
    """Takes in what was found in another part of the same folder."""
    self.found |= other.found
    self.bad |= other.bad
    self.files += other.files
    self.missing += other.missing


def folder(root: Path, caption_key: str | None = None) -> Listing:
  """The media files below `root` and their captions.

  Hidden files are passed over and links to folders are not followed.

  Args:
    caption_key: the column of metadata files, or key, that holds the caption.

  Raises:
    UserError: a line of captions.jsonl or of a metadata file that cannot be used.
  """
  files = sorted(named(root, media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES))
  listed = {}
  for path in sorted(named(root, METADATA_NAMES)):
    if path.rsplit("/", 1)[-1] in METADATA_NAMES:
      listed |= _read_metadata(root, path, caption_key)
  listed |= _read_captions(root / CAPTIONS_NAME)
  found, bad = _captions_of(root, files, listed)
  return Listing(root, found, bad, len(files), len(set(listed) - set(files)))


def named(root: Path, endings: Sequence[str]) -> Iterator[str]:
  """Paths relative to `root`, with forward slashes, of the files whose names end so."""
  endings = tuple(endings)
  for here, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in names:
      if not name.startswith(".") and name.lower().endswith(endings):
        yield (Path(here) / name).relative_to(root).as_posix()


def one_line(text: str) -> str:
  """A caption as it is kept: whole UTF-8, which "\\ud800" in JSON (half of an emoji) is not."""
  return " ".join(text.encode("utf-8", "replace").decode().split())


def caption_of(entry: Mapping[str, Any], caption_key: str | None, where: str) -> str:
  """The caption in a row of a table or a JSON map; "" if the usual keys are not there.

  Of a list of captions it is the first.

  Raises:
    UserError: the key that was asked for is not there, or holds no text.
  """
  if caption_key is not None and caption_key not in entry:
    raise UserError(
      f"{where} has no {caption_key!r} for the caption: set config.data.caption_key to one of"
      f" {', '.join(sorted(map(str, entry)))}."
    )
  keys = [caption_key] if caption_key is not None else [k for k in CAPTION_KEYS if k in entry]
  if not keys:
    return ""
  value = entry[keys[0]]
  if isinstance(value, list) and value:
    value = value[0]
  if value is None:
    return ""
  if not isinstance(value, str):
    raise UserError(f"{where} has the caption {value!r} in {keys[0]!r}: it must be a text.")
  return one_line(value)


def inside(file: str, where: str) -> str:
  """A relative path that stays below its folder, in its shortest form. Raises UserError."""
  normal = posixpath.normpath(file)
  if not file or posixpath.isabs(normal) or normal.split("/")[0] == "..":
    raise UserError(f"{where} names {file!r}; give a path inside the folder, relative to it.")
  return normal


def _read_text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); save it as UTF-8 text.") from error


def _read_captions(path: Path) -> dict[str, Found]:
  """What captions.jsonl says, by relative path; every fault is named by its line."""
  if not path.exists():
    return {}
  found: dict[str, Found] = {}
  line_of: dict[str, int] = {}
  for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not at U+2028
    if not line.strip():
      continue
    file, entry = _parse_caption_line(f"line {number} of {path}", line)
    if file in line_of:
      raise UserError(
        f"lines {line_of[file]} and {number} of {path} both describe {file!r}; keep one of them."
      )
    line_of[file] = number
    found[file] = entry
  return found


def _parse_json(where: str, line: str) -> Any:
  try:
    return json.loads(line)
  except ValueError as error:
    raise UserError(f"{where} is not JSON ({error}); write {CAPTION_LINE}.") from error


def _parse_caption_line(where: str, line: str) -> tuple[str, Found]:
  entry = _parse_json(where, line)
  file = entry.get("file") if isinstance(entry, dict) else None
  caption = entry.get("caption") if isinstance(entry, dict) else None
  if not isinstance(file, str) or not isinstance(caption, str):
    raise UserError(f'{where} lacks "file" or "caption" as texts; write {CAPTION_LINE}.')
  camera = entry.get("camera", "")
  if not isinstance(camera, str):
    raise UserError(f'{where} has a "camera" that is no text; write its motion, like "zoom in".')
  return inside(file, where), Found(one_line(caption), one_line(camera))


def _read_metadata(root: Path, name: str, caption_key: str | None) -> dict[str, Found]:
  """Captions by path from a metadata file, whose paths are relative to its own folder."""
  path, found = root / name, {}
  for number, row in _rows(path):
    where = f"line {number} of {path}"
    if not found and not any(str(key).endswith("file_name") for key in row):
      logging.warning('%s has no "file_name": it is not read for captions.', path)
      return {}
    files = [key for key in row if key == "file_name" or str(key).endswith("_file_name")]
    if len(files) != 1 or not isinstance(row[files[0]], str):
      raise UserError(f'{where} needs one "file_name" with the path of a file beside it.')
    file = inside(posixpath.join(posixpath.dirname(name), row[files[0]]), where)
    if file in found:
      raise UserError(f"{where} describes {file!r}, which another line does too; keep one of them.")
    found[file] = Found(caption_of(row, caption_key, where))
  return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line, row) of a metadata file."""
  text = _read_text(path)
  if path.suffix == ".csv":
    reader = csv.DictReader(io.StringIO(text))
    try:
      for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
      raise UserError(f"line {reader.line_num} of {path} is not CSV ({error}).") from error
    return
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      row = _parse_json(f"line {number} of {path}", line)
      if not isinstance(row, dict):
        raise UserError(
          f'line {number} of {path} is no map: write {{"file_name": ..., "text": ...}}.'
        )
      yield number, row


def _captions_of(
  root: Path, files: Iterable[str], listed: Mapping[str, Found]
) -> tuple[dict[str, Found], dict[str, str]]:
  """The files that have a caption; complaint about each whose name or text is not UTF-8."""
  found: dict[str, Found] = {}
  bad: dict[str, str] = {}
  for path in files:
    printable = path.encode(errors="backslashreplace").decode()
    if printable != path:
      bad[printable] = f"the name {printable} is not UTF-8; rename it."
      continue
    sidecar = (root / path).with_suffix(".txt")
    entry = listed.get(path, Found(""))
    try:
      caption = entry.caption or one_line(sidecar.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
      continue
    except (OSError, UnicodeDecodeError) as error:
      bad[path] = f"{sidecar} cannot be read ({error}); save it as UTF-8 text."
      continue
    if caption:
      found[path] = dataclasses.replace(entry, caption=caption)
  return found, bad
