"""Whole files or none: atomic text files, lines of JSON, hashes, and the folder for results.

Not an object-store layer: paths are of a local or mounted file system.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mgen_jax.errors import UserError


def temporary_beside(path: Path) -> Path:
  """A hidden name in the folder of `path`, unique to this process, to be renamed onto it."""
  return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
  """Renames a finished file onto its final name, after its bytes have reached the disk."""
  with temporary.open("rb") as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_text_atomic(path: Path, text: str) -> None:
  """Writes UTF-8 text so that a reader sees the old file or the new one, never a part.

  Raises UserError if the folder is missing, not writable or full.
  """
  temporary = temporary_beside(path)
  try:
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(
      f"{path} could not be written ({error.strerror}); check the folder, its permissions and the"
      " free space."
    ) from error


def make_folder(folder: Path, flag: str) -> Path:
  """Makes a folder that the user has named for results, to be called before they are worked for.

  Args:
    folder: it may exist.
    flag: what named it, for the message: "--out=DIR".

  Raises:
    UserError: it cannot be made, or nothing can be written there.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{flag} cannot be made ({error.strerror}): name another folder.") from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"{flag} cannot be written to: name another folder, or change its rights.")
  return folder


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines, in order; [] if it is not there yet.

  A last line without its end is left out: it is being written, or was cut short.

  Raises:
    UserError: a whole line that is no JSON object, as a crash of the machine may leave behind.
  """
  if not Path(path).exists():
    return []
  found = []
  with open(path, "rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.endswith(b"\n"):
        break
      try:
        value = json.loads(line)
      except ValueError:
        value = None
      if not isinstance(value, dict):
        raise UserError(f"line {number} of {path} cannot be read: delete it, or restore the file.")
      found.append(value)
  return found


def sha256_file(path: Path) -> str:
  """The SHA-256 of a file's bytes, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
