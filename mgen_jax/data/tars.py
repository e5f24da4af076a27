"""WebDataset tars: clips are read where they are, by their offset; nothing is ever extracted.

A sample is all members whose names agree up to the first dot of the last part: `000017.mp4` with
`000017.txt` (its caption) or `000017.json` (a map with a key for it). Names are only labels, so one
like `../x` leads nowhere. Members that can carry code (pickles, PyTorch files) are refused, and so
are compressed tars, which cannot be read from the middle.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mgen_jax.data import listing, media
from mgen_jax.data.listing import Found, Listing
from mgen_jax.errors import UserError

_UNSAFE = (".pyd", ".pickle", ".pkl", ".pth", ".pt", ".joblib")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEDIA = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
_LONGEST_TEXT = 2**20  # bytes of a caption file; more is no caption

Parts = dict[str, tuple[int, int]]  # suffix of a member -> offset, bytes
Samples = dict[str, Parts]  # by name


def find(root: Path) -> list[str]:
  """The tars below `root`, relative to it, in order."""
  return sorted(listing.named(root, (".tar",)))


def refuse_compressed(root: Path) -> None:
  """Says why tars that are there were not read. Raises UserError if there is a compressed one."""
  packed = sorted(listing.named(root, _COMPRESSED))
  if packed:
    raise UserError(
      f"{root / packed[0]} is a compressed tar, which cannot be read from the middle: unpack it to"
      " a .tar (video does not get smaller by compression)."
    )


def members(root: Path, name: str, caption_key: str | None = None) -> Listing:
  """The clips of one tar, as paths `NAME/MEMBER`.

  Args:
    root: the folder.
    name: of the tar, relative to it.
    caption_key: of JSON members; None: a usual one. It is read from the text member otherwise.

  Raises:
    UserError: a JSON member lacks the key that was asked for.
  """
  path, listed = root / name, Listing(root)
  if not path.resolve().is_relative_to(root):
    listed.bad[name] = f"{path} is a link that leaves the folder; copy the file instead."
    return listed
  samples: Samples = {}
  try:
    with path.open("rb") as file:
      for member in _members(path):
        _sort(member, listed, name, samples, os.fstat(file.fileno()).st_size)
  except (tarfile.TarError, OSError) as error:  # what came before the fault is good
    listed.bad[name] = f"{path} cannot be read to its end as a tar ({error}); copy it again."
  if samples:
    with path.open("rb") as file:
      for key, parts in samples.items():
        _add(listed, file, name, key, parts, caption_key)
  listed.files += len(listed.found) + len(listed.bad)
  return listed


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
  with tarfile.open(path, "r:", errors="surrogateescape") as tar:
    while (member := tar.next()) is not None:
      tar.members = []  # of a million members none is needed again
      yield member


def _sort(member: tarfile.TarInfo, listed: Listing, name: str, samples: Samples, size: int) -> None:
  """Puts a member with its sample, or with what cannot be used; `size` is the tar's."""
  folder, _, last = member.name.rpartition("/")
  if member.isdir() or last.startswith("."):
    return
  stem, _, suffix = last.partition(".")
  suffix = f".{suffix.lower()}"
  key = f"{folder}/{stem}" if folder else stem
  label = f"{name}/{key}{suffix}"
  printable = label.encode(errors="backslashreplace").decode()
  path = listed.root / label
  if printable != label:
    listed.bad[printable] = f"the name {printable} is not UTF-8; rename it."
  elif not member.isreg() or member.issparse():
    listed.bad[label] = f"{path} is a link or device in a tar; store a plain file."
  elif suffix.endswith(_UNSAFE):
    listed.bad[label] = f"{path} can run code when opened and is never read; store JSON or text."
  elif member.offset_data + member.size > size:
    listed.bad[label] = f"{path} is cut short; copy {name} again."
  elif suffix in samples.setdefault(key, {}):
    listed.bad[f"{label} again"] = f"{path} is there twice; the first one is used."
  else:
    samples[key][suffix] = (member.offset_data, member.size)


def _add(
  listed: Listing,
  file: BinaryIO,
  name: str,
  key: str,
  parts: Parts,
  caption_key: str | None,
) -> None:
  """Adds the clips of one sample, if it has some."""
  clips = [suffix for suffix in parts if suffix in _MEDIA]
  if not clips:
    return
  where = f"{name}/{key}"
  try:
    caption, camera = _text(listed.root, file, where, parts, caption_key)
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    for suffix in clips:
      listed.bad[where + suffix] = f"{listed.root / where}: its caption cannot be read ({error})."
    return
  for suffix in clips:
    offset, size = parts[suffix]
    if caption:
      listed.found[where + suffix] = Found(caption, camera, name, offset, size)
    else:
      listed.files += 1


def _text(
  root: Path, file: BinaryIO, where: str, parts: Parts, caption_key: str | None
) -> tuple[str, str]:
  """(caption, camera) of a sample: from its text, or from its JSON where a key is asked for."""

  def read(suffix: str) -> str:
    offset, size = parts[suffix]
    file.seek(offset)
    return file.read(min(size, _LONGEST_TEXT)).decode("utf-8-sig")

  caption, camera = "", ""
  if ".json" in parts:
    entry = json.loads(read(".json"))
    if not isinstance(entry, dict):
      raise UserError(f"{root / where}.json is no map of keys; write {{'caption': ...}}.")
    caption = listing.caption_of(entry, caption_key, f"{root / where}.json")
    camera = entry.get("camera", "")
    camera = listing.one_line(camera) if isinstance(camera, str) else ""
  if ".txt" in parts and (caption_key is None or ".json" not in parts):
    caption = listing.one_line(read(".txt")) or caption
  return caption, camera
