"""From a folder of videos and images to an index: what can be read, and with which caption.

The folder is searched through all its subfolders. Captions are lines {"file": ..., "caption": ...}
of `captions.jsonl` in the folder itself, or a text file `name.txt` beside each `name.mp4`; a line
of `captions.jsonl` wins over a text file. Nothing is filtered by quality here (that is curation)
and no shape is chosen (`buckets`).
"""

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Literal

from mgen_jax.data import media
from mgen_jax.data.files import write_text_atomic
from mgen_jax.errors import UserError

SCHEMA_VERSION = 1
CAPTIONS_NAME = "captions.jsonl"
INDEX_NAME = "index.jsonl"
SUMMARY_NAME = "summary.json"
_LISTED_BAD_FILES = 20
_CAPTION_LINE = '{"file": "clip.mp4", "caption": "a red circle moves left"}'
_CAPTION_FORMS = (
  f"either a file {CAPTIONS_NAME} with a line {_CAPTION_LINE} for each, or a text file clip.txt"
  " beside each clip.mp4"
)

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
  progress: Progress | None = None,
) -> Index:
  """Looks at every video and image under `folder` and keeps those that can be read and have a text.

  A video is opened, its first frame decoded and its index compared with its size; an image is
  decoded. Hidden files are passed over, links to folders are not followed, and a link to a file
  outside the folder is refused.

  Args:
    seed, held_out: the split. A clip is held out by the hash of (seed, its path), so it stays where
      it is when others come; each side has at least one where there are two clips or more.
    threads: files looked at in parallel (default: two per core).
    progress: called with (files looked at, files in all), on this thread.

  Raises:
    UserError: no such folder, no media in it, no caption for any of it, none of it readable, or a
      line of captions.jsonl that cannot be used.
  """
  root = Path(folder)
  if not root.is_dir():
    raise UserError(f"the folder of videos {root} does not exist; give the path of a folder.")
  root = root.resolve()
  files = sorted(_media_files(root))
  if not files:
    raise UserError(
      f"the folder {root} holds no videos or images; put files in it that end in"
      f" {', '.join(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)}."
    )
  listed, cameras = _read_captions(root / CAPTIONS_NAME)
  captions, bad = _captions_of(root, files, listed)
  if not captions:
    complaint = f"; the first at fault: {next(iter(bad.values()))}" if bad else ""
    raise UserError(
      f"none of the {len(files)} videos and images in {root} has a caption: add {_CAPTION_FORMS}"
      f"{complaint}."
    )
  without_caption = len(files) - len(captions) - len(bad)

  found: dict[str, media.MediaInfo] = {}
  for done, (path, info) in enumerate(_probe_all(root, list(captions), threads), start=1):
    if isinstance(info, media.MediaInfo):
      found[path] = info
    else:
      bad[path] = info
    if progress:
      progress(done, len(captions))
  if not found:
    raise UserError(
      f"none of the {len(captions)} captioned files in {root} can be read; the first says:"
      f" {next(bad[path] for path in captions)}"
    )

  splits = _split(list(found), seed, held_out)
  clips = tuple(
    _clip(path, info, captions[path], splits[path], cameras.get(path, ""))
    for path, info in found.items()
  )
  index = Index(root, clips, {})
  summary = {
    "folder": str(root),
    "files": len(files),
    "clips": len(clips),
    "videos": sum(clip.kind == "video" for clip in clips),
    "images": sum(clip.kind == "image" for clip in clips),
    "train": len(index.of_split("train")),
    "held_out": len(index.of_split("held_out")),
    "seconds": round(sum(clip.duration for clip in clips), 3),
    "without_caption": without_caption,
    "listed_but_missing": len(set(listed) - set(files)),
    "unreadable": len(bad),
    "bad_files": [{"file": path, "reason": bad[path]} for path in sorted(bad)[:_LISTED_BAD_FILES]],
    "sha256": index.sha256,
  }
  return dataclasses.replace(index, summary=summary)


def _media_files(root: Path) -> Iterator[str]:
  """Paths relative to `root`, with forward slashes, of what looks like media."""
  suffixes = frozenset(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)
  for here, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in names:
      if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
        yield (Path(here) / name).relative_to(root).as_posix()


def _read_captions(path: Path) -> tuple[dict[str, str], dict[str, str]]:
  """Captions, and camera motions where there are some, by relative path from captions.jsonl; every
  fault is named by its line."""
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028, as splitlines does
  except FileNotFoundError:
    return {}, {}
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); save it as UTF-8 text.") from error
  captions: dict[str, str] = {}
  cameras: dict[str, str] = {}
  line_of: dict[str, int] = {}
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    file, caption, camera = _parse_caption_line(f"line {number} of {path}", line)
    if file in line_of:
      raise UserError(
        f"lines {line_of[file]} and {number} of {path} both describe {file!r}; keep one of them."
      )
    line_of[file] = number
    captions[file] = caption
    if camera:
      cameras[file] = camera
  return captions, cameras


def _parse_caption_line(where: str, line: str) -> tuple[str, str, str]:
  try:
    entry = json.loads(line)
  except ValueError as error:
    raise UserError(f"{where} is not JSON ({error}); write {_CAPTION_LINE}.") from error
  file = entry.get("file") if isinstance(entry, dict) else None
  caption = entry.get("caption") if isinstance(entry, dict) else None
  if not isinstance(file, str) or not isinstance(caption, str):
    raise UserError(f'{where} lacks "file" or "caption" as texts; write {_CAPTION_LINE}.')
  camera = entry.get("camera", "")
  if not isinstance(camera, str):
    raise UserError(f'{where} has a "camera" that is no text; write its motion, like "zoom in".')
  normal = posixpath.normpath(file)
  if not file or posixpath.isabs(normal) or normal.split("/")[0] == "..":
    raise UserError(f"{where} names {file!r}; give a path inside the folder, relative to it.")
  return normal, _one_line(caption), _one_line(camera)


def _captions_of(
  root: Path, files: Sequence[str], listed: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
  """Caption of each file that has one; complaint about each whose name or text is not UTF-8."""
  captions: dict[str, str] = {}
  bad: dict[str, str] = {}
  for path in files:
    printable = path.encode(errors="backslashreplace").decode()
    if printable != path:
      bad[printable] = f"the name {printable} is not UTF-8; rename it."
      continue
    sidecar = (root / path).with_suffix(".txt")
    try:
      caption = listed.get(path) or _one_line(sidecar.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
      continue
    except (OSError, UnicodeDecodeError) as error:
      bad[path] = f"{sidecar} cannot be read ({error}); save it as UTF-8 text."
      continue
    if caption:
      captions[path] = caption
  return captions, bad


def _one_line(text: str) -> str:
  return " ".join(text.split())


def _probe_all(
  root: Path, paths: Sequence[str], threads: int | None
) -> Iterator[tuple[str, media.MediaInfo | str]]:
  """Each path with what it holds, or with the reason why it cannot be used; in order."""

  def look(path: str) -> media.MediaInfo | str:
    try:
      if not (root / path).resolve().is_relative_to(root):
        return f"{root / path} is a link that leaves the folder; copy the file instead."
      info = media.probe(root / path)
      if info.kind == "image":
        media.read_image(root / path)  # nothing less tells whether it is whole
    except (media.MediaError, OSError) as error:
      return str(error)
    return info

  pool = futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1))
  try:
    yield from zip(paths, pool.map(look, paths), strict=True)
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


def _clip(path: str, info: media.MediaInfo, caption: str, split: Split, camera: str) -> Clip:
  return Clip(
    id=hashlib.sha256(path.encode()).hexdigest()[:16],
    path=path,
    kind=info.kind,
    width=info.width,
    height=info.height,
    fps=info.fps,
    frames=info.frames,
    duration=info.duration,
    caption=caption,
    split=split,
    camera=camera,
  )


def _lines(clips: Sequence[Clip]) -> Iterator[str]:
  for clip in clips:
    line = dataclasses.asdict(clip)
    if not clip.camera:
      del line["camera"]
    yield json.dumps(line, ensure_ascii=False) + "\n"
