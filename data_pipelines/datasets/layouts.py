"""What the folder of each data set must look like, and the clips that are in it.

  faceforensics   videos, in any subfolders                         no classes
  ucf101          CLASS/v_CLASS_g01_c01.avi                         classes in the order of names
  sky_timelapse   folders of frames, more than 48 in each           no classes
  taichi_hd       folders of frames, 256 x 256 pixels               no classes

Orders, splits and what is left out follow the released loaders: they take every file below the
root, so name the folder of the split that you train on (UCF101 has one for all).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mgen_jax.errors import ConfigError, UserError

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
IMAGES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class SourceClip:
  """One clip of a data set.

  Attributes:
    id: its path below the root, without suffix.
    frames: a video file, or the files of its frames in order.
    class_name: "" where there are no classes.
  """

  id: str
  frames: Path | tuple[Path, ...]
  class_name: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
  """A data set: how its folder is read, and how its clips are sampled.

  Attributes:
    clips: (root) -> the clips in it, in order.
    spread: 16 frames are spread over the window of 48 (two gaps are of 4 frames), as the loaders of
      video files do; otherwise every third frame is taken, as those of frame folders do.
    flip: whether half of the windows are flipped left to right.
    resize: "short_side" (then the centre), "square" (the centre, then resized) or "none".
    spare: frames that a clip must have beyond those of a window.
  """

  name: str
  title: str
  clips: Callable[[Path], list[SourceClip]]
  spread: bool
  flip: bool
  resize: str
  spare: int = 0
  classes: bool = False


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
  return sorted(
    path
    for path in root.rglob("*")
    if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
  )


def _relative(root: Path, path: Path) -> str:
  return path.relative_to(root).as_posix()


def _describe(root: Path) -> str:
  """The first things in a folder, for a message."""
  names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
  more = " ..." if len(names) > 4 else ""
  return f"found {', '.join(names[:4])}{more}" if names else "it is empty"


def _wrong(root: Path, name: str, expected: str) -> UserError:
  return UserError(
    f"--source={root} is not laid out as {name}: expected {expected}; {_describe(root)}."
  )


def _video_files(root: Path) -> list[SourceClip]:
  videos = _files(root, VIDEOS)
  if not videos:
    raise _wrong(root, "faceforensics", "videos like train/000.mp4")
  return [SourceClip(_relative(root, path.with_suffix("")), path) for path in videos]


def _class_folders(root: Path) -> list[SourceClip]:
  expected = "one folder for each class, like ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"
  videos = _files(root, VIDEOS)
  if not videos:
    raise _wrong(root, "ucf101", expected)
  for path in videos:
    if path.parent.parent != root:
      raise UserError(
        f"--source={root} is not laid out as ucf101: expected {expected}; found "
        f"{_relative(root, path)}."
      )
  return [
    SourceClip(_relative(root, path.with_suffix("")), path, path.parent.name) for path in videos
  ]


def _frame_number(path: Path) -> int:
  """The number at the end of a frame's name: 12 of "clip_0012.jpg"."""
  text = path.name.split(".")[0].split("_")[-1]
  if not text.isdigit():
    raise UserError(
      f"{path} is no frame: its name must end with a number, like frame_0012{path.suffix}."
    )
  return int(text)


def _frame_folders(name: str) -> Callable[[Path], list[SourceClip]]:
  def clips(root: Path) -> list[SourceClip]:
    folders: dict[Path, list[Path]] = {}
    for path in _files(root, IMAGES):
      folders.setdefault(path.parent, []).append(path)
    if not folders:
      raise _wrong(root, name, "one folder of frames for each clip, like clip/frame_0000.jpg")
    return [
      SourceClip(
        _relative(root, folder) if folder != root else root.name,
        tuple(sorted(frames, key=_frame_number)),
      )
      for folder, frames in sorted(folders.items())
    ]

  return clips


LAYOUTS = {
  layout.name: layout
  for layout in (
    Layout("faceforensics", "FaceForensics", _video_files, True, True, "short_side"),
    Layout("ucf101", "UCF101", _class_folders, True, True, "short_side", classes=True),
    Layout(
      "sky_timelapse", "SkyTimelapse", _frame_folders("sky_timelapse"), False, False, "square",
      spare=1,
    ),
    Layout("taichi_hd", "Taichi-HD", _frame_folders("taichi_hd"), False, True, "none"),
  )
}  # fmt: skip


def layout(name: str) -> Layout:
  """The layout of a name. Raises ConfigError for another one."""
  if name not in LAYOUTS:
    raise ConfigError(f"--name={name} is no data set here: use one of {', '.join(LAYOUTS)}.")
  return LAYOUTS[name]


def scan(name: str, root: Path | str) -> list[SourceClip]:
  """The clips of a data set in a folder, in order.

  Raises:
    UserError: no such folder, or another layout (says what was expected and what was found).
  """
  root = Path(root)
  if not root.is_dir():
    raise UserError(f"--source={root} is no folder: name that of your copy of {name}.")
  return layout(name).clips(root)


def classes(clips: list[SourceClip]) -> tuple[str, ...]:
  """The classes in the order of their numbers: that of the names of their folders."""
  return tuple(sorted({clip.class_name for clip in clips if clip.class_name}))
