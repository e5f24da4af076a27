"""What the sources should hold, by a list as `sha256sum` writes it.

Some damage leaves a whole video, only another one (docs/data.md); a hash that was taken before is
what tells. Not here: hashing and comparing (`sources`).
"""

import os
import re
from pathlib import Path

from mgen_jax.errors import UserError

# A hash, a blank, a blank or a star, the path; behind a backslash, one with escaped signs.
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}


def read(file: str, root: Path) -> dict[str, str]:
  """{path relative to `root`: SHA-256} of a list whose paths are relative to it, or absolute.

  Raises:
    UserError: the list cannot be read, a line is not one of `sha256sum`, two lines disagree.
  """
  try:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
  except OSError as error:
    raise UserError(f"--checksums={file} cannot be read ({error.strerror}).") from error
  except UnicodeDecodeError as error:
    raise UserError(f"--checksums={file} is not UTF-8; write it with sha256sum.") from error
  found: dict[str, str] = {}
  for number, line in enumerate(lines, start=1):
    parts = _LINE.fullmatch(line)
    if parts is None:
      raise UserError(
        f"--checksums={file}, line {number}: {line[:80]!r} is not a SHA-256 and a path; write the"
        " list with sha256sum."
      )
    escaped, digest, path = parts.groups()
    if escaped:
      path = re.sub(r"\\[\\nr]", lambda sign: _ESCAPES[sign[0]], path)
    name = os.path.relpath(os.path.join(root, path), root)
    if found.setdefault(name, digest.lower()) != digest.lower():
      raise UserError(f"--checksums={file}, line {number}: {path} has another hash further up.")
  return found
