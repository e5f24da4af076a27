"""ArrayRecord shards of media files: clips are read where they are, by number, like those of tars.

A record holds a whole video or image file in the array "media" (uint8 [bytes]), its caption, and
in "info" what else is known: "file", the name that it had, and "camera". Shards are named as
`records.shard_name` has it; one that is cut short or that lacks a neighbour is said to be bad. Not
here: records of latents, which are the result of encoding such clips (`records`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from mgen_jax.data import listing, media, records
from mgen_jax.data.listing import Found, Listing

MEDIA = "media"  # the array that holds the file
_SHARD = re.compile(r"(.*?)(\d{5})-of-(\d{5})" + re.escape(records.SHARD_SUFFIX))


def find(root: Path) -> list[str]:
  """The shards below `root`, relative to it, in order."""
  return sorted(listing.named(root, (records.SHARD_SUFFIX,)))


def missing(root: Path, shards: Sequence[str]) -> dict[str, str]:
  """The reason why, by path, of each shard that others count and that is not there."""
  have, wanted = set(shards), set()
  for name in shards:
    folder, _, last = name.rpartition("/")
    if found := _SHARD.fullmatch(last):
      before, count = found[1], int(found[3])
      names = [f"{before}{records.shard_name(number, count)}" for number in range(count)]
      wanted |= {f"{folder}/{last}" if folder else last for last in names}
  return {
    name: f"the shard {root / name} is missing; copy it again." for name in sorted(wanted - have)
  }


def members(root: Path, name: str, caption_key: str | None = None) -> Listing:
  """The clips of one shard, as paths `NAME/NUMBER.mp4`.

  Args:
    root: the folder.
    name: of the shard, relative to it.
    caption_key: of `info`; None: the caption of the record.

  Raises:
    UserError: a record lacks the key that was asked for.
  """
  path, listed = root / name, Listing(root)
  try:
    if not path.resolve().is_relative_to(root):
      raise media.MediaError(f"{path} is a link that leaves the folder; copy the file instead.")
    for number, record in enumerate(_records(path)):
      if MEDIA not in record.arrays:
        held = ", ".join(sorted(record.arrays)) or "nothing"
        raise media.MediaError(
          f'{path} holds {held} and no "{MEDIA}": latents, for one, are encoded already.'
        )
      caption = listing.one_line(record.caption)
      if caption_key is not None:
        caption = listing.caption_of(record.info, caption_key, f"record {number} of {path}")
      listed.files += 1
      if caption:
        data = record.arrays[MEDIA]
        suffix = media.suffix_of(data[:16].tobytes(), str(record.info.get("file", "")))
        camera = listing.one_line(str(record.info.get("camera", "")))
        where = f"{name}/{number:09d}{suffix}"
        listed.found[where] = Found(caption, camera, name, number, data.nbytes)
  except (records.RecordError, media.MediaError) as error:  # what came before the fault is good
    listed.bad[name] = str(error)
    listed.files += 1
  return listed


def read(path: Path, number: int) -> bytes:
  """The file that record `number` of the shard `path` holds. Raises MediaError."""
  try:
    with ArrayRecordDataSource([str(path)]) as source:
      return records.unpack(source[number]).arrays[MEDIA].tobytes()
  except (records.RecordError, RuntimeError, KeyError, IndexError, OSError) as error:
    raise media.MediaError(f"record {number} of {path} cannot be read ({error}).") from error


def _records(path: Path) -> Iterator[records.Record]:
  """All of a shard, one at a time, after it was counted. Raises RecordError."""
  count = records.count_records(path)
  if not count:
    return
  with ArrayRecordDataSource([str(path)]) as source:
    for number in range(count):
      try:
        yield records.unpack(source[number])
      except RuntimeError as error:
        raise records.RecordError(f"record {number} of {path} cannot be read ({error}).") from error
