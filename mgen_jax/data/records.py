"""Training records: the one schema of our ArrayRecord payloads, written whole and read checked.

A folder of records is some shards and `manifest.json`, which is committed last: bytes, records and
SHA-256 of every shard, the bucket, and the settings that made them. An ArrayRecord file that was
cut short opens without a word and reports 0 records, so nothing here trusts a file by its presence:
a shard gets its name only after it was reopened and counted, and a reader compares with the
manifest. Not here: what the arrays mean (see the encode stage) and how they are batched
(`pipeline`).
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.data.files import publish, sha256_file, temporary_beside, write_text_atomic
from mgen_jax.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_SUFFIX = ".arrayrecord"

_DTYPES = {
  np.dtype(dtype).name: np.dtype(dtype)
  for dtype in (
    *(np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64),
  )
}


class RecordError(UserError):
  """A record, a shard or a manifest that cannot be used."""


# --------------------------------------------------------------------------------------------------
# The payload.


@dataclasses.dataclass(frozen=True)
class Record:
  """One example.

  Attributes:
    id: of the clip it was made from.
    bucket: `Bucket.name` of the example.
    caption: its text, "" if it has none.
    fps: frames per second of the example as sampled (0 for an image).
    start: where in the clip it starts, in seconds.
    arrays: by name, for example "mean" and "logvar" [t, h, w, C]; read-only when read.
    info: scores and provenance; plain numbers, strings, lists and maps.
  """

  id: str
  bucket: str
  caption: str
  fps: float
  start: float
  arrays: Mapping[str, np.ndarray]
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pack(record: Record) -> bytes:
  """The bytes of a record: a msgpack map in a fixed order of keys, arrays as (dtype, shape, data).

  Equal records give equal bytes. Raises RecordError for a dtype outside the schema.
  """
  fields = {"schema_version": SCHEMA_VERSION} | {
    field.name: getattr(record, field.name) for field in dataclasses.fields(record)
  }
  fields["arrays"] = {
    name: _pack_array(name, record.arrays[name]) for name in sorted(record.arrays)
  }
  fields["info"] = {name: record.info[name] for name in sorted(record.info)}
  return msgpack.packb(fields)


def unpack(payload: bytes) -> Record:
  """The record in `payload`; its arrays are read-only views into it. Raises RecordError."""
  try:
    fields = msgpack.unpackb(payload)
  except (ValueError, msgpack.UnpackException) as error:
    raise RecordError(f"these {len(payload)} bytes are not a record ({error}).") from error
  version = fields.pop("schema_version", None) if isinstance(fields, dict) else None
  if version != SCHEMA_VERSION:
    raise RecordError(
      f"the record has schema version {version} but this program reads {SCHEMA_VERSION};"
      " write the records again with this version."
    )
  expected = {field.name for field in dataclasses.fields(Record)}
  if set(fields) != expected:
    raise RecordError(f"the record has the keys {sorted(fields)} instead of {sorted(expected)}.")
  fields["arrays"] = {name: _unpack_array(name, *a) for name, a in fields["arrays"].items()}
  return Record(**fields)


def _pack_array(name: str, array: np.ndarray) -> tuple[str, list[int], bytes]:
  dtype = np.asarray(array).dtype.name
  if dtype not in _DTYPES:
    raise RecordError(f"the array {name!r} has dtype {dtype}; a record holds {', '.join(_DTYPES)}.")
  array = np.asarray(array, dtype=_DTYPES[dtype])  # native byte order
  return dtype, list(array.shape), array.tobytes()


def _unpack_array(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
  try:
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
  except (KeyError, ValueError) as error:
    raise RecordError(f"the array {name!r} is not {dtype} of shape {shape} ({error}).") from error


# --------------------------------------------------------------------------------------------------
# Clips as they are, with what is known of them.

MEDIA = "media"  # the array of a record that holds a whole file, uint8 [bytes]


@functools.lru_cache(maxsize=256)
def opened(folder: Path) -> "RecordSource":
  """`open_records`, once in a process: for readers that ask for one record at a time."""
  return open_records(folder)


# --------------------------------------------------------------------------------------------------
# Writing.


@dataclasses.dataclass(frozen=True)
class Shard:
  """One verified file of records; `name` is relative to its folder."""

  name: str
  bytes: int
  records: int
  sha256: str


def shard_name(index: int, count: int) -> str:
  """The name of shard `index` of `count`."""
  return f"{index:05d}-of-{count:05d}{SHARD_SUFFIX}"


def count_records(path: Path) -> int:
  """How many records a shard holds; raises RecordError if it is cut short or no shard at all."""
  message = f"the shard {path} is truncated or not an ArrayRecord file; write it again."
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    readable, records = reader.ok(), reader.num_records()
    reader.close()
  except RuntimeError as error:
    raise RecordError(message) from error
  if not readable:  # a file without its footer opens as one of 0 records
    raise RecordError(message)
  return records


def inspect_shard(path: Path) -> Shard:
  """Opens, counts and hashes a shard that exists (for example one that another host wrote)."""
  if not path.is_file():
    raise RecordError(f"the shard {path} is missing; write it again.")
  return Shard(path.name, path.stat().st_size, count_records(path), sha256_file(path))


class RecordWriter:
  """Writes one shard; it appears under its name only once it is whole and verified.

  Use it in a `with`: leaving normally closes, reopens, counts, hashes and renames (then `shard`
  tells what was written); leaving by an exception removes the unfinished file.

  Args:
    path: of the shard; its folder is made if needed.
    compression: "uncompressed", or "zstd:1" where storage or the network is the limit (latents:
      22 % smaller, 29 % slower to read locally; nothing to gain on mp4).
  """

  def __init__(self, path: Path | str, *, compression: str = "uncompressed"):
    if compression != "uncompressed" and not compression.startswith("zstd:"):
      raise UserError(f"compression {compression!r} is unknown; use 'uncompressed' or 'zstd:1'.")
    self.path = Path(path)
    self.shard: Shard | None = None
    self._compression = compression
    self._temporary = temporary_beside(self.path)
    self._writer = None
    self._records = 0

  def __enter__(self) -> "RecordWriter":
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      # One record a group: random access then reads nothing but the record it wants.
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._temporary), f"group_size:1,{self._compression}"
      )
    except (OSError, RuntimeError) as error:
      raise self._failed(error) from error
    return self

  def write(self, record: Record) -> None:
    """Appends a record; raises RecordError if it cannot be stored, for example on a full disk."""
    payload = pack(record)
    try:
      self._writer.write(payload)
    except RuntimeError as error:
      raise self._failed(error) from error
    self._records += 1

  def __exit__(self, exception_type, exception, traceback) -> None:
    try:
      self._writer.close()
      if exception_type is None:
        self._commit()
    except (OSError, RuntimeError) as error:
      if exception_type is None:  # otherwise the first exception is the one to hear about
        raise self._failed(error) from error
    finally:
      self._temporary.unlink(missing_ok=True)

  def _commit(self) -> None:
    shard = inspect_shard(self._temporary)
    if shard.records != self._records:
      raise RecordError(
        f"{self.path} has {shard.records} of {self._records} records after writing; check the disk."
      )
    publish(self._temporary, self.path)
    self.shard = dataclasses.replace(shard, name=self.path.name)

  def _failed(self, error: Exception) -> RecordError:
    return RecordError(
      f"{self.path} could not be written ({error}); check the folder, its permissions and the"
      " free space."
    )


def write_manifest(
  folder: Path | str, shards: Sequence[Shard], *, bucket: Bucket, settings: Mapping[str, Any]
) -> None:
  """Commits a folder of records: what `open_records` believes. Call it last, on one host.

  Args:
    shards: in the order of their records.
    bucket: the shape of every example in pixels.
    settings: what the records depend on (plain values), compared when they are opened.
  """
  manifest = {
    "schema_version": SCHEMA_VERSION,
    "bucket": bucket.name,
    "settings": dict(settings),
    "records": sum(shard.records for shard in shards),
    "shards": [dataclasses.asdict(shard) for shard in shards],
  }
  write_text_atomic(Path(folder) / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# Reading.


class RecordSource:
  """The records of a committed folder by index; get one from `open_records`.

  Safe to read from many threads, and to pickle: files are opened when first read.

  Attributes:
    folder, bucket, settings, shards: from the manifest.
    digest: SHA-256 over bucket, settings and the hashes of the shards, whatever the folder's name.
  """

  def __init__(
    self, folder: Path, bucket: Bucket, settings: Mapping[str, Any], shards: Sequence[Shard]
  ):
    self.folder = folder
    self.bucket = bucket
    self.settings = settings
    self.shards = tuple(shards)
    self.digest = _digest(bucket, settings, self.shards)
    self._ends = list(itertools.accumulate(shard.records for shard in self.shards))
    spans = [f"{folder / shard.name}[0:{shard.records}]" for shard in self.shards if shard.records]
    self._source = ArrayRecordDataSource(spans) if spans else ()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)} in {self.folder}")
    try:
      return unpack(self._source[index])
    except (RuntimeError, RecordError) as error:
      shard = bisect.bisect_right(self._ends, index)
      position = index - (self._ends[shard] - self.shards[shard].records)
      path = self.folder / self.shards[shard].name
      raise RecordError(
        f"record {position} of {path} cannot be read ({error}); write that shard again."
      ) from error


def open_records(
  folder: Path | str, *, settings: Mapping[str, Any] | None = None, check_hashes: bool = False
) -> RecordSource:
  """Opens a committed folder after comparing every shard with the manifest.

  Args:
    settings: if given, must equal those the records were written with.
    check_hashes: read every byte and compare its SHA-256 too (sizes and counts always are).

  Raises:
    RecordError: no manifest, other settings, or a shard that is missing, truncated or altered.
  """
  folder = Path(folder)
  bucket, written_with, shards = _read_manifest(folder)
  if settings is not None:
    _check_settings(folder, json.loads(json.dumps(settings)), written_with)  # as JSON keeps them

  def check(shard: Shard) -> None:
    path = folder / shard.name
    if not path.is_file():
      raise RecordError(f"the shard {path} is missing; write the records again.")
    size = path.stat().st_size
    if size != shard.bytes:
      raise RecordError(
        f"the shard {path} has {size:,} bytes instead of {shard.bytes:,}: it is truncated or was"
        " replaced; write the records again."
      )
    if count_records(path) != shard.records:
      raise RecordError(f"the shard {path} does not hold {shard.records} records; write it again.")
    if check_hashes and sha256_file(path) != shard.sha256:
      raise RecordError(f"the shard {path} was altered (another SHA-256); write it again.")

  with futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(check, shards))
  return RecordSource(folder, bucket, written_with, shards)


def _read_manifest(folder: Path) -> tuple[Bucket, dict[str, Any], list[Shard]]:
  path = folder / MANIFEST_NAME
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise RecordError(
      f"{folder} has no {MANIFEST_NAME}: it is no folder of records, or writing them never ended;"
      " write them again."
    ) from error
  except (OSError, ValueError) as error:
    raise RecordError(f"{path} cannot be read ({error}); write the records again.") from error
  if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
    raise RecordError(
      f"{path} is not a manifest of schema version {SCHEMA_VERSION}; write the records again."
    )
  try:
    shards = [Shard(**shard) for shard in manifest["shards"]]
    outside = [shard.name for shard in shards if os.path.basename(shard.name) != shard.name]
    if outside:
      raise RecordError(f"{path} names the shard {outside[0]!r} outside its folder.")
    return parse_bucket(manifest["bucket"]), dict(manifest["settings"]), shards
  except (KeyError, TypeError) as error:
    raise RecordError(f"{path} is damaged ({error!r}); write the records again.") from error


def _check_settings(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  differing = [
    f"{key}={found.get(key)!r} (now {wanted.get(key)!r})"
    for key in sorted(set(wanted) | set(found))
    if wanted.get(key) != found.get(key)
  ]
  if differing:
    raise RecordError(
      f"the records in {folder} were written with {', '.join(differing)}; delete the folder to"
      " write them again, or go back to the old settings."
    )


def _digest(bucket: Bucket, settings: Mapping[str, Any], shards: Sequence[Shard]) -> str:
  content = [bucket.name, settings, [[shard.records, shard.sha256] for shard in shards]]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
