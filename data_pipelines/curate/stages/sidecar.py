"""The text that a file brings along: `clip.txt` beside `clip.mp4`, or a line of captions.jsonl.

The two layouts are those of `mgen_jax.data.ingest`; a line wins over a text file. captions.jsonl is
looked for in the file's own folder, or named by `file`, which may also hold what a captioner wrote
elsewhere: a batch, for clips of these sources.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.curate import stage
from mgen_jax.data.files import sha256_file
from mgen_jax.data.ingest import CAPTIONS_NAME
from mgen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sidecar(stage.SourceStage):
  """Text that is no UTF-8 is a fault of the file that holds it: the run says so and stops."""

  name = "sidecar"
  beside = True
  columns = {"source_caption": pa.string()}  # "" if there is none

  file: str = ""  # path of a captions.jsonl for all sources; "file" names the end of their paths

  def scorer(self) -> str:
    return f"lines {sha256_file(_existing(self.file))[:12]}" if self.file else "texts beside files"

  def score(self, path: str) -> dict[str, Any]:
    lines = self.file or str(Path(path).parent / CAPTIONS_NAME)
    if self.file or os.path.isfile(lines):
      text = find(read_lines(lines, os.stat(_existing(lines)).st_mtime_ns), path)
      if text:
        return {"source_caption": text}
    beside = Path(path).with_suffix(".txt")
    return {"source_caption": _one_line(read_text(beside)) if beside.is_file() else ""}


def read_text(path: Path) -> str:
  """A UTF-8 file. Raises UserError if it is none."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error


@functools.lru_cache(maxsize=4)
def read_lines(path: str, changed: int) -> dict[str, str]:
  """{"file": ..., "caption": ...} lines as {file: caption}; `changed` only tells versions apart.

  Raises UserError with the number of a line that is something else.
  """
  found = {}
  for number, line in enumerate(read_text(Path(path)).splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      found[_normal(row["file"])] = _one_line(row["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{path}, line {number}: write {{"file": "clip.mp4", "caption": "..."}}.'
      ) from error
  return found


def find(lines: dict[str, str], path: str) -> str:
  """The caption of the line that names the longest end of `path`; "" if none does."""
  parts = _normal(path).split("/")
  ends = ("/".join(parts[start:]) for start in range(len(parts)))
  return next((lines[end] for end in ends if end in lines), "")


def _existing(path: str) -> Path:
  if not Path(path).is_file():
    raise UserError(f"{path} is no file: sidecar.file names a captions.jsonl.")
  return Path(path)


def _normal(path: str) -> str:
  return path.replace(os.sep, "/").removeprefix("./")


def _one_line(text: str) -> str:
  return " ".join(text.split())
