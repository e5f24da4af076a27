"""Records come back as they were written, and a damaged shard is named instead of read as empty."""

import dataclasses
import json
import resource
import signal
from concurrent import futures

import cloudpickle
import ml_dtypes
import numpy as np
import pytest

from mgen_jax.data import ingest, media, records
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.records import Record, RecordError, RecordWriter, open_records, pack, unpack

BUCKET = Bucket(16, 64, 64)
SETTINGS = {"autoencoder": "0a1b", "scale": 0.5, "sizes": (1, 2)}


def make_record(index: int) -> Record:
  rng = np.random.default_rng(index)
  return Record(
    id=f"clip-{index}",
    bucket=BUCKET.name,
    caption=f"a small red circle moves left, {index} times",
    fps=8.0,
    start=index / 4,
    arrays={
      "mean": rng.normal(size=(2, 8, 8, 4)).astype(np.float16),
      "logvar": rng.normal(size=(2, 8, 8, 4)).astype(ml_dtypes.bfloat16),
    },
    info={"motion": 2.5, "tags": ["a", "b"]},
  )


def write_shard(path, count, first=0, **writer_options):
  with RecordWriter(path, **writer_options) as writer:
    for i in range(first, first + count):
      writer.write(make_record(i))
  return writer.shard


def write_folder(folder, counts=(5, 7, 3), **writer_options):
  shards, first = [], 0
  for index, count in enumerate(counts):
    name = records.shard_name(index, len(counts))
    shards.append(write_shard(folder / name, count, first, **writer_options))
    first += count
  records.write_manifest(folder, shards, bucket=BUCKET, settings=SETTINGS)
  return folder


def assert_same(a: Record, b: Record):
  assert (a.id, a.bucket, a.caption, a.fps, a.start) == (b.id, b.bucket, b.caption, b.fps, b.start)
  assert dict(a.info) == dict(b.info)
  assert sorted(a.arrays) == sorted(b.arrays)
  for name in a.arrays:
    assert a.arrays[name].dtype == b.arrays[name].dtype
    assert a.arrays[name].shape == b.arrays[name].shape
    assert a.arrays[name].tobytes() == b.arrays[name].tobytes()


@pytest.mark.parametrize("dtype", sorted(records._DTYPES))
def test_every_dtype_and_rank_survives(dtype):
  dtype = records._DTYPES[dtype]
  arrays = {
    "scalar": np.array(1, dtype),
    "empty": np.zeros((0, 3), dtype),
    "matrix": np.arange(6).reshape(2, 3).astype(dtype),
    "strided": np.arange(24).reshape(4, 6).astype(dtype)[::2, ::3].T,
  }
  record = Record("x", BUCKET.name, "", 0.0, 0.0, arrays)
  assert_same(unpack(pack(record)), record)


def test_foreign_byte_order_is_stored_as_ours():
  record = Record("x", BUCKET.name, "", 0.0, 0.0, {"a": np.arange(3, dtype=">f4")})
  np.testing.assert_array_equal(unpack(pack(record)).arrays["a"], np.float32([0, 1, 2]))


def test_equal_records_give_equal_bytes():
  a = make_record(1)
  b = Record(a.id, a.bucket, a.caption, a.fps, a.start, dict(reversed(a.arrays.items())), a.info)
  assert pack(a) == pack(b)


def test_objects_and_other_versions_are_refused(monkeypatch):
  with pytest.raises(RecordError, match="object"):
    pack(Record("x", BUCKET.name, "", 0.0, 0.0, {"a": np.array([None])}))
  with pytest.raises(RecordError, match="not a record"):
    unpack(b"\xc1")
  monkeypatch.setattr(records, "SCHEMA_VERSION", 2)
  newer = pack(make_record(0))
  monkeypatch.undo()
  with pytest.raises(RecordError, match="schema version 2"):
    unpack(newer)


@pytest.mark.parametrize("compression", ["uncompressed", "zstd:1"])
def test_a_folder_reads_back_by_index_across_shards(tmp_path, compression):
  source = open_records(write_folder(tmp_path / "r", compression=compression), check_hashes=True)
  assert len(source) == 15
  assert source.bucket == BUCKET
  for i in (0, 4, 5, 11, 12, 14):
    assert_same(source[i], make_record(i))
  for outside in (-1, 15):
    with pytest.raises(IndexError):
      source[outside]


def test_the_writer_is_deterministic_and_the_digest_follows_the_content(tmp_path):
  a, b = (open_records(write_folder(tmp_path / name)) for name in "ab")
  assert a.shards == b.shards
  assert a.digest == b.digest
  assert open_records(write_folder(tmp_path / "c", counts=(5, 7, 4))).digest != a.digest


def test_a_source_can_be_read_by_threads_and_after_pickling(tmp_path):
  source = open_records(write_folder(tmp_path / "r"))
  source = cloudpickle.loads(cloudpickle.dumps(source))  # as worker processes receive it
  with futures.ThreadPoolExecutor(8) as pool:
    ids = list(pool.map(lambda i: source[i % 15].id, range(300)))
  assert ids == [f"clip-{i % 15}" for i in range(300)]


def test_a_truncated_shard_is_named_and_not_read_as_empty(tmp_path):
  folder = write_folder(tmp_path / "r")
  shard = folder / records.shard_name(1, 3)
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-100])
  with pytest.raises(RecordError, match=r"00001-of-00003.*truncated"):
    open_records(folder)
  half = len(whole) // 2
  shard.write_bytes(whole[:half] + bytes(len(whole) - half))  # a copy that stopped, of full size
  with pytest.raises(RecordError, match="00001-of-00003"):
    open_records(folder)
  for length in (half, len(whole) - 100, 0):
    shard.write_bytes(whole[:length])
    with pytest.raises(RecordError, match="truncated"):
      records.inspect_shard(shard)


def test_a_missing_shard_is_named(tmp_path):
  folder = write_folder(tmp_path / "r")
  (folder / records.shard_name(2, 3)).unlink()
  with pytest.raises(RecordError, match=r"00002-of-00003.*missing"):
    open_records(folder)


def test_a_flipped_bit_is_found_by_the_hash_and_when_it_is_read(tmp_path):
  folder = write_folder(tmp_path / "r")
  shard = folder / records.shard_name(0, 3)
  data = bytearray(shard.read_bytes())
  data[data.index(b"clip-3")] ^= 1
  shard.write_bytes(data)
  with pytest.raises(RecordError, match=r"00000-of-00003.*altered"):
    open_records(folder, check_hashes=True)
  source = open_records(folder)
  assert_same(source[2], make_record(2))
  with pytest.raises(RecordError, match=r"record 3 of .*00000-of-00003"):
    source[3]


def test_an_unfinished_folder_or_a_damaged_manifest_is_refused(tmp_path):
  with pytest.raises(RecordError, match="never ended"):
    open_records(tmp_path)
  manifest = write_folder(tmp_path / "r") / records.MANIFEST_NAME
  content = json.loads(manifest.read_text())
  for damage in ({"schema_version": 9}, {"shards": [{"name": "a"}]}, {"shards": 3}):
    manifest.write_text(json.dumps(content | damage))
    with pytest.raises(RecordError, match=r"manifest\.json"):
      open_records(tmp_path / "r")
  content["shards"][0]["name"] = "../x.arrayrecord"
  manifest.write_text(json.dumps(content))
  with pytest.raises(RecordError, match="outside"):
    open_records(tmp_path / "r")
  manifest.write_text("{")
  with pytest.raises(RecordError, match="cannot be read"):
    open_records(tmp_path / "r")


def test_other_settings_are_refused_by_name(tmp_path):
  folder = write_folder(tmp_path / "r")
  assert len(open_records(folder, settings=SETTINGS)) == 15
  with pytest.raises(RecordError, match=r"autoencoder='0a1b' \(now 'ffff'\)"):
    open_records(folder, settings=SETTINGS | {"autoencoder": "ffff"})


def test_an_interrupted_writer_leaves_nothing(tmp_path):
  path = tmp_path / "r" / records.shard_name(0, 1)
  writer = RecordWriter(path)

  def write_and_interrupt():
    with writer:
      writer.write(make_record(0))
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_and_interrupt()
  assert list(path.parent.iterdir()) == []
  assert writer.shard is None


def test_a_shard_that_verifies_short_is_not_published(tmp_path, monkeypatch):
  path = tmp_path / records.shard_name(0, 1)
  monkeypatch.setattr(records, "count_records", lambda path: 1)
  with pytest.raises(RecordError, match="1 of 2 records"):
    write_shard(path, 2)
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(RecordError, match="could not be written"),
    RecordWriter(tmp_path / "file" / "a.arrayrecord"),
  ):
    pass


def test_an_empty_folder_of_records_has_length_zero(tmp_path):
  assert len(open_records(write_folder(tmp_path / "r", counts=(0,)))) == 0
  records.write_manifest(tmp_path, [], bucket=BUCKET, settings=SETTINGS)
  assert len(open_records(tmp_path)) == 0


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # any larger file: "File too large"
  try:
    with pytest.raises(RecordError, match="could not be written"):
      write_shard(tmp_path / records.shard_name(0, 1), 1000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
  assert list(tmp_path.iterdir()) == []


def test_provenance_is_kept_with_its_version():
  facts = {"source_id": "ab" * 32, "source": "a/b.mp4", "clip_id": "c", "start": 2.0, "end": 9.5}
  scores = {"motion": 2.5, "camera": "pan left", "text_score": None}
  made = records.Provenance(**facts, scores=scores, scorers={"text": "rapidocr 3.10"})
  record = records.media_record(
    "c", BUCKET, "a caption", 8.0, b"file", {"provenance": made.plain()}
  )
  back = unpack(pack(record))
  assert bytes(back.arrays[records.MEDIA]) == b"file"
  found = records.Provenance.of(back)
  assert dataclasses.replace(found, fails=()) == made and list(found.fails) == []
  newer = dataclasses.replace(record, info={"provenance": made.plain() | {"schema_version": 2}})
  for other in (newer, dataclasses.replace(record, info={})):
    with pytest.raises(RecordError, match=r"record c has provenance of schema version (2|None)"):
      records.Provenance.of(other)


def test_clips_in_records_are_read_like_files(tmp_path):
  shard = tmp_path / BUCKET.name / records.shard_name(0, 1)
  with RecordWriter(shard) as writer:
    for number in range(3):
      writer.write(records.media_record(f"c{number}", BUCKET, "x", 8.0, bytes([number] * 5), {}))
  records.write_manifest(shard.parent, [writer.shard], bucket=BUCKET, settings={})
  clip = ingest.Clip("0" * 16, "clips/c2.mp4", "video", 64, 64, 8.0, 16, 2.0, "x", "train",
                     archive=BUCKET.name, offset=2, bytes=5)  # fmt: skip
  ingest.Index(tmp_path, (clip,), {}).save(tmp_path)
  found = ingest.scan(tmp_path)
  assert bytes(found.clips[0].open(found.folder)) == b"\x02" * 5
  with pytest.raises(media.MediaError, match="cannot be read from its shard"):
    dataclasses.replace(clip, offset=3).open(tmp_path)
