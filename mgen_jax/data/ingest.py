"""From a folder of videos and images to an index: what can be read, and with which caption.

The folder may be plain, with captions in one of several forms (`listing`), hold WebDataset tars
(`tars`) or records of media files (`record_media`), whose clips are read where they are, or the
tables of a Hugging Face data set (`tables`), whose clips are unpacked first. Nothing is filtered by
quality here (that is curation) and no shape is chosen (`buckets`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Literal

from absl import logging

from mgen_jax.data import listing, media, record_media, records, tables, tars
from mgen_jax.data.files import write_text_atomic
from mgen_jax.errors import UserError

SCHEMA_VERSION = 1
CAPTIONS_NAME = listing.CAPTIONS_NAME  # what a folder made for `scan` should hold
INDEX_NAME = "index.jsonl"
SUMMARY_NAME = "summary.json"
_LISTED_BAD_FILES = 20

Split = Literal["train", "held_out"]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Clip:
  """One usable file.

  Attributes:
    id: 16 hexadecimal digits, of the relative path: the same wherever the folder is.
    path: relative to the folder, with forward slashes.
    kind: "video" or "image".
    width, height: as shown (rotation applied), in pixels.
    fps: frames per second (an image: 0).
    frames: how many (an image: 1).
    duration: in seconds.
    caption: its text, on one line.
    split: "train", or "held_out" for evaluation.
    camera: its motion, like "zoom in", where captions.jsonl names it; else "".
    archive: the tar that holds it, or the folder of records, relative to the folder; "": it is a
      file of its own.
    offset, bytes: where in the tar; or the number of the record, and the size of its file.
  """

  id: str
  path: str
  kind: Literal["video", "image"]
  width: int
  height: int
  fps: float
  frames: int
  duration: float
  caption: str
  split: Split
  camera: str = ""
  archive: str = ""
  offset: int = 0
  bytes: int = 0

  def content(self) -> tuple:
    """What an example depends on: all but the place in an archive."""
    return dataclasses.astuple(dataclasses.replace(self, archive="", offset=0, bytes=0))[:-3]

  def open(self, folder: Path) -> Path | media.NamedBytes:
    """The file, or its bytes where it is part of an archive; for the readers of `media`.

    Raises MediaError if the archive is not there or was cut.
    """
    return _open(folder, self.path, self.archive, self.offset, self.bytes)


@dataclasses.dataclass(frozen=True)
class Index:
  """The usable clips of a folder, sorted by path, and a summary of all that was found there.

  `summary` holds plain values: "folder", "files" (media files seen) = "clips" + "without_caption" +
  "unreadable"; "clips" = "videos" + "images" = "train" + "held_out"; "seconds" of video;
  "listed_but_missing" (lines of captions.jsonl without their file); "bad_files" (the first 20
  unreadable ones, with the reason); "sha256".
  """

  folder: Path
  clips: tuple[Clip, ...]
  summary: Mapping[str, Any]

  @property
  def sha256(self) -> str:
    """Over every field of every clip; the place of the folder does not matter."""
    return hashlib.sha256("".join(_lines(self.clips)).encode()).hexdigest()

  def of_split(self, split: Split) -> tuple[Clip, ...]:
    return tuple(clip for clip in self.clips if clip.split == split)

  def save(self, folder: Path | str) -> None:
    """Writes index.jsonl and, beside it, summary.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {
      "schema_version": SCHEMA_VERSION,
      "folder": str(self.folder),
      "clips": len(self.clips),
      "sha256": self.sha256,
    }
    write_text_atomic(folder / SUMMARY_NAME, json.dumps(self.summary, indent=2) + "\n")
    write_text_atomic(folder / INDEX_NAME, json.dumps(head) + "\n" + "".join(_lines(self.clips)))


def _open(folder: Path, path: str, archive: str, offset: int, size: int) -> Path | media.NamedBytes:
  if not archive:
    return folder / path
  if (folder / archive).is_dir():
    try:
      data = records.opened(folder / archive)[offset].arrays[records.MEDIA]
    except (records.RecordError, IndexError, KeyError) as error:
      raise media.MediaError(f"{path} cannot be read from its shard ({error}).") from error
    return media.NamedBytes(data.tobytes(), str(folder / path))
  try:
    with (folder / archive).open("rb") as file:
      file.seek(offset)
      data = file.read(size)
  except OSError as error:
    raise media.MediaError(f"{folder / archive} cannot be read ({error.strerror}).") from error
  if len(data) < size:
    raise media.MediaError(f"{folder / archive} is cut short; copy it again.")
  return media.NamedBytes(data, str(folder / path))


def load(folder: Path | str) -> Index:
  """Reads an index that `Index.save` wrote; raises UserError if it is absent or damaged."""
  path = Path(folder) / INDEX_NAME
  try:
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
    summary = json.loads((path.parent / SUMMARY_NAME).read_text(encoding="utf-8"))
    if head["schema_version"] != SCHEMA_VERSION:
      raise UserError(
        f"{path} has schema version {head['schema_version']} but this program reads"
        f" {SCHEMA_VERSION}; delete it and run again."
      )
    index = Index(Path(head["folder"]), tuple(Clip(**line) for line in lines), summary)
    expected = head["sha256"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete it and run again.") from error
  if index.sha256 != expected:
    raise UserError(f"{path} was altered (another SHA-256); delete it and run again.")
  return index


def scan(
  folder: Path | str,
  *,
  seed: int = 0,
  held_out: float = 0.05,
  threads: int | None = None,
  caption_key: str | None = None,
  unpack_to: Path | None = None,
  progress: Progress | None = None,
) -> Index:
  """Looks at every video and image under `folder` and keeps those that can be read and have a text.

  A video is opened, its first frame decoded and its index compared with its size; an image is
  decoded. Hidden files are passed over, links to folders are not followed, and a link to a file
  outside the folder is refused. A folder with an index.jsonl of its own is taken as that says, with
  its split.

  Args:
    seed, held_out: the split. A clip is held out by the hash of (seed, its path), so it stays where
      it is when others come; each side has at least one where there are two clips or more.
    threads: files looked at in parallel (default: two per core).
    caption_key: the key or column of the caption in JSON files and tables; None: a usual one.
    unpack_to: where the clips of tables go that hold them as bytes.
    progress: called with (files looked at, files in all), on this thread.

  Raises:
    UserError: no such folder, no media in it, no caption for any of it, none of it readable, or a
      line of captions.jsonl that cannot be used.
  """
  root = Path(folder)
  if not root.is_dir():
    raise UserError(f"the folder of videos {root} does not exist; give the path of a folder.")
  if (root / INDEX_NAME).exists():
    return _indexed(root.resolve())
  listed = _list(root.resolve(), caption_key, unpack_to)
  root, bad = listed.root, listed.bad
  if not listed.files:
    raise UserError(
      f"the folder {root} holds no videos or images; put files in it that end in"
      f" {', '.join(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)}."
    )
  if not listed.found:
    complaint = f"; the first at fault: {next(iter(bad.values()))}" if bad else ""
    raise UserError(
      f"none of the {listed.files} videos and images in {root} has a caption: add"
      f" {listing.CAPTION_FORMS}{complaint}."
    )
  without_caption = listed.files - len(listed.found) - len(bad)

  probed: dict[str, media.MediaInfo] = {}
  for done, (path, info) in enumerate(_probe_all(root, listed.found, threads), start=1):
    if isinstance(info, media.MediaInfo):
      probed[path] = info
    else:
      bad[path] = info
    if progress:
      progress(done, len(listed.found))
  if not probed:
    raise UserError(
      f"none of the {len(listed.found)} captioned files in {root} can be read; the first says:"
      f" {next(bad[path] for path in listed.found)}"
    )

  splits = _split(list(probed), seed, held_out)
  clips = tuple(
    _clip(path, info, listed.found[path], splits[path]) for path, info in probed.items()
  )
  return _with_summary(Index(root, clips, {}), listed.files, listed.missing, without_caption, bad)


def _with_summary(
  index: Index, files: int, missing: int, without_caption: int, bad: Mapping[str, str]
) -> Index:
  summary = {
    "folder": str(index.folder),
    "files": files,
    "clips": len(index.clips),
    "videos": sum(clip.kind == "video" for clip in index.clips),
    "images": sum(clip.kind == "image" for clip in index.clips),
    "train": len(index.of_split("train")),
    "held_out": len(index.of_split("held_out")),
    "seconds": round(sum(clip.duration for clip in index.clips), 3),
    "without_caption": without_caption,
    "listed_but_missing": missing,
    "unreadable": len(bad),
    "bad_files": [{"file": path, "reason": bad[path]} for path in sorted(bad)[:_LISTED_BAD_FILES]],
    "sha256": index.sha256,
  }
  return dataclasses.replace(index, summary=summary)


def _indexed(root: Path) -> Index:
  """The index that stands in the folder of its clips, which an earlier look at them has left."""
  index = dataclasses.replace(load(root), folder=root)
  for clip in index.clips:
    path = (root / (clip.archive or clip.path)).resolve()
    if not path.is_relative_to(root):
      raise UserError(f"{root / INDEX_NAME} lists {clip.path}, which lies outside of the folder.")
    if not path.exists():
      raise UserError(
        f"{root / INDEX_NAME} lists {clip.path}, which is not there: restore it, or delete the"
        " index to have the folder looked through."
      )
  return _with_summary(index, len(index.clips), 0, 0, {})


def _list(root: Path, caption_key: str | None, unpack_to: Path | None) -> listing.Listing:
  """Files, clips in tars and in records; where none has a caption, clips of tables."""
  listed = listing.folder(root, caption_key)
  archives = tars.find(root)
  for number, path in enumerate(archives, start=1):
    logging.log_every_n(logging.INFO, "listing tar %d of %d, %s", 20, number, len(archives), path)
    listed.add(tars.members(root, path, caption_key))
  for name in record_media.find(root):
    logging.info("listing the records in %s", root / name)
    listed.add(record_media.members(root, name, caption_key))
  if not listed.found and (found := tables.find(root)):
    return tables.clips(root, found, caption_key, unpack_to)
  if not listed.found:
    tars.refuse_compressed(root)
  listed.found = dict(sorted(listed.found.items()))
  return listed


def _probe_all(
  root: Path, found: Mapping[str, listing.Found], threads: int | None
) -> Iterator[tuple[str, media.MediaInfo | str]]:
  """Each path with what it holds, or with the reason why it cannot be used; in order."""

  def look(path: str) -> media.MediaInfo | str:
    try:
      where = found[path]
      if not (root / (where.archive or path)).resolve().is_relative_to(root):
        return f"{root / path} is a link that leaves the folder; copy the file instead."
      source = _open(root, path, where.archive, where.offset, where.bytes)
      info = media.probe(source)
      if info.kind == "image":
        media.read_image(source)  # nothing less tells whether it is whole
    except (media.MediaError, OSError) as error:
      return str(error)
    return info

  pool = futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1))
  try:
    yield from zip(found, pool.map(look, found), strict=True)
  finally:
    pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of files


def _hash(seed: int, path: str) -> int:
  return int.from_bytes(hashlib.blake2b(f"{seed}|{path}".encode(), digest_size=8).digest())


def _split(paths: Sequence[str], seed: int, held_out: float) -> dict[str, Split]:
  """By hash; where that leaves one side empty, the clip nearest to it goes there."""
  if not 0.0 <= held_out < 1.0:
    raise UserError(f"held_out is {held_out}; give the share to keep for evaluation, 0 to below 1.")
  ranked = sorted(paths, key=lambda path: _hash(seed, path))
  count = sum(_hash(seed, path) < held_out * 2**64 for path in paths)
  if held_out and len(paths) > 1:
    count = min(max(count, 1), len(paths) - 1)
  apart = set(ranked[:count])
  return {path: "held_out" if path in apart else "train" for path in paths}


def _clip(path: str, info: media.MediaInfo, found: listing.Found, split: Split) -> Clip:
  return Clip(
    id=hashlib.sha256(path.encode()).hexdigest()[:16],
    path=path,
    kind=info.kind,
    width=info.width,
    height=info.height,
    fps=info.fps,
    frames=info.frames,
    duration=info.duration,
    split=split,
    **dataclasses.asdict(found),
  )


def _lines(clips: Sequence[Clip]) -> Iterator[str]:
  for clip in clips:
    line = dataclasses.asdict(clip)
    for name in ("camera", "archive", "offset", "bytes"):
      if not line[name]:
        del line[name]
    yield json.dumps(line, ensure_ascii=False) + "\n"
