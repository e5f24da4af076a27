"""Folders of records of media files: clips are read where they are, by number, like those of tars.

Each record holds a whole video or image file in the array "media" (`records.MEDIA`), its caption,
and in "info" what else is known: "file", the name that it had, and "camera". The folder is
committed by its manifest (`records.write_manifest`). Not here: records of latents, which are the
result of encoding such clips.
"""

from pathlib import Path, PurePosixPath

from mgen_jax.data import listing, media, records
from mgen_jax.data.listing import Found, Listing


def find(root: Path) -> list[str]:
  """The folders of shards below `root`, relative to it ("." is itself), in order."""
  shards = listing.named(root, (records.SHARD_SUFFIX,))
  return sorted({str(PurePosixPath(shard).parent) for shard in shards})


def members(root: Path, name: str, caption_key: str | None = None) -> Listing:
  """The clips of one folder of records, as paths `NAME/NUMBER.mp4`.

  Args:
    root: the folder of all.
    name: of the folder of records, relative to it.
    caption_key: of `info`; None: the caption of the record.

  Raises:
    UserError: a record lacks the key that was asked for.
  """
  folder, listed = root / name, Listing(root)
  try:
    links = [path for path in folder.iterdir() if not path.resolve().is_relative_to(root)]
    if links:
      raise records.RecordError(f"{links[0]} is a link that leaves the folder; copy it instead.")
    source = records.opened(folder)
    for number in range(len(source)):
      record = source[number]
      if records.MEDIA not in record.arrays:
        held = ", ".join(sorted(record.arrays)) or "nothing"
        raise records.RecordError(
          f'{folder} holds {held} and no "{records.MEDIA}": latents, for one, are encoded already.'
        )
      listed.files += 1
      _add(listed, name, number, record, caption_key)
  except records.RecordError as error:  # what came before the fault is good
    listed.bad[name] = str(error)
    listed.files += 1
  return listed


def _add(
  listed: Listing, name: str, number: int, record: records.Record, caption_key: str | None
) -> None:
  """Adds the clip of one record, if it has a caption."""
  caption = listing.one_line(record.caption)
  if caption_key is not None:
    where = f"record {number} of {listed.root / name}"
    caption = listing.caption_of(record.info, caption_key, where)
  if not caption:
    return
  data = record.arrays[records.MEDIA]
  suffix = media.suffix_of(data[:16].tobytes(), str(record.info.get("file", "")))
  path = str(PurePosixPath(name, f"{number:09d}{suffix}"))
  camera = listing.one_line(str(record.info.get("camera", "")))
  listed.found[path] = Found(caption, camera, name, number, data.nbytes)
