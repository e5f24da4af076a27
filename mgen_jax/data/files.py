"""Whole files or none: atomic text files, and the hash of a file.

Not an object-store layer: paths are of a local or mounted file system.
"""

import hashlib
import os
from pathlib import Path

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


def sha256_file(path: Path) -> str:
  """The SHA-256 of a file's bytes, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
