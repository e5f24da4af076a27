"""Tars, records and Hugging Face folders give the index that a plain folder gives."""

import csv
import dataclasses
import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from mgen_jax.data import ingest, media, records
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.pipeline import make_ordered_stream
from mgen_jax.data.sources import media_sources
from mgen_jax.errors import UserError

BUCKET = Bucket(8, 32, 48)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """Three clips and a picture, with captions."""
  folder = tmp_path_factory.mktemp("plain")
  for i in range(3):
    frames = np.full((8 + i, 32, 48, 3), 40 * i, np.uint8)
    frames[:, :, : 8 * (i + 1)] += 60
    media.write_video(folder / f"{i:03d}.mp4", frames, 8.0)
    (folder / f"{i:03d}.txt").write_text(f"clip  {i}\n")
  media.write_image(folder / "003.jpg", np.full((32, 48, 3), 99, np.uint8))
  (folder / "003.txt").write_text("a picture")
  return folder


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_tar(path, files, **members):
  """A tar of name -> bytes, or of name -> TarInfo."""
  with tarfile.open(path, "w") as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
    for info in members.values():
      tar.addfile(info)


def pixels(index, bucket=BUCKET):
  """Caption -> video of every clip."""
  sources, _ = media_sources(index, [bucket], split="train")
  with make_ordered_stream(sources, batch_sizes={bucket: 1}, threads=2) as stream:
    return {batch["caption"][0]: batch["video"][0] for _, batch in stream}


def assert_same_clips(index, plain):
  expected = ingest.scan(plain, held_out=0.0)
  keys = ("caption", "kind", "width", "height", "fps", "frames")

  def facts(index):
    return sorted(tuple(getattr(clip, key) for key in keys) for clip in index.clips)

  assert facts(index) == facts(expected)
  found, wanted = pixels(index), pixels(expected)
  assert found.keys() == wanted.keys() == {"clip 0", "clip 1", "clip 2"}
  for caption, video in wanted.items():
    np.testing.assert_array_equal(found[caption], video)


def test_tars_are_read_in_place_and_never_extracted(plain, tmp_path):
  files = contents(plain)
  entry = json.dumps({"text": "clip 2", "camera": "pan left", "width": 48}).encode()
  write_tar(tmp_path / "00000.tar", {n: files[n] for n in ("000.mp4", "000.txt", "001.mp4")})
  write_tar(tmp_path / "00001.tar", {
    "../../002.mp4": files["002.mp4"], "../../002.json": entry,
    "/abs/003.jpg": files["003.jpg"], "/abs/003.txt": files["003.txt"],
  })  # fmt: skip
  index = ingest.scan(tmp_path, held_out=0.0)
  assert index.summary["without_caption"] == 1  # its text is in no tar
  write_tar(
    tmp_path / "00000.tar", {n: files[n] for n in ("000.mp4", "000.txt", "001.mp4", "001.txt")}
  )
  before = sorted(tmp_path.parent.rglob("*"))
  index = ingest.scan(tmp_path, held_out=0.0)
  assert_same_clips(index, plain)
  assert sorted(tmp_path.parent.rglob("*")) == before
  (clip,) = [clip for clip in index.clips if clip.caption == "clip 2"]
  assert (clip.archive, clip.camera) == ("00001.tar", "pan left")
  index.save(tmp_path / "index")
  assert ingest.load(tmp_path / "index") == index


def test_what_is_unsafe_or_broken_in_a_tar_is_named_and_the_rest_is_used(plain, tmp_path):
  files = contents(plain)
  link = tarfile.TarInfo("link.mp4")
  link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"

  class Evil:
    def __reduce__(self):
      return (print, ("never",))

  write_tar(
    tmp_path / "a.tar",
    {
      "000.mp4": files["000.mp4"], "000.txt": files["000.txt"],
      "000.pyd": pickle.dumps(Evil()), "001.metadata.pickle": b"x",
      "001.mp4": files["001.mp4"], "001.txt": b"\xff\xfe\xfa",
      "002.mp4": b"no video", "002.txt": b"clip 2",
      "003.mp4": files["001.mp4"], "003.json": b"{",
    },
    link=link,
  )  # fmt: skip
  cut = tmp_path / "b.tar"
  write_tar(cut, {"5.mp4": files["001.mp4"], "5.txt": b"five", "6.mp4": files["002.mp4"]})
  with tarfile.open(cut) as tar:
    middle = tar.getmember("6.mp4").offset_data + 100
  cut.write_bytes(cut.read_bytes()[:middle])
  (tmp_path / "c.tar").write_bytes(b"not a tar at all" * 100)
  index = ingest.scan(tmp_path, held_out=0.0)
  assert [clip.caption for clip in index.clips] == ["clip 0", "five"]
  reasons = {entry["file"]: entry["reason"] for entry in index.summary["bad_files"]}
  assert "can run code" in reasons["a.tar/000.pyd"]
  assert "can run code" in reasons["a.tar/001.metadata.pickle"]
  assert "link or device" in reasons["a.tar/link.mp4"]
  assert "caption cannot be read" in reasons["a.tar/001.mp4"]
  assert "caption cannot be read" in reasons["a.tar/003.mp4"]
  assert "a.tar/002.mp4 cannot be opened" in reasons["a.tar/002.mp4"]
  assert "c.tar" in reasons["c.tar"]
  assert any("copy" in reasons[name] for name in reasons if name.startswith("b.tar"))


def test_compressed_tars_and_wrong_keys_are_refused_in_a_sentence(plain, tmp_path):
  write_tar(tmp_path / "a.tar", {"0.mp4": contents(plain)["000.mp4"], "0.json": b'{"txt2": "x"}'})
  with pytest.raises(UserError, match=r"has no 'blurb' .* txt2"):
    ingest.scan(tmp_path, caption_key="blurb")
  with pytest.raises(UserError, match="has a caption"):
    ingest.scan(tmp_path)
  (tmp_path / "b.tar.gz").write_bytes(b"")
  assert ingest.scan(tmp_path, caption_key="txt2").clips[0].caption == "x"
  (tmp_path / "a.tar").unlink()
  with pytest.raises(UserError, match="compressed tar"):
    ingest.scan(tmp_path)


def test_a_folder_with_an_index_of_its_own_is_taken_as_that_says(plain, tmp_path):
  """Its split, its choice of clips; the folder may have moved."""
  for name, data in contents(plain).items():
    (tmp_path / name).write_bytes(data)
  every = ingest.scan(tmp_path, held_out=0.5)
  kept = ingest.Index(tmp_path / "elsewhere", every.clips[:3], {})
  kept.save(tmp_path)
  index = ingest.scan(tmp_path, held_out=0.0)
  assert (index.clips, index.folder) == (kept.clips, tmp_path.resolve())
  assert (index.summary["clips"], index.summary["sha256"]) == (3, kept.sha256)
  outside = dataclasses.replace(every.clips[0], path="/etc/hostname")
  ingest.Index(tmp_path, (outside,), {}).save(tmp_path)
  with pytest.raises(UserError, match="lies outside"):
    ingest.scan(tmp_path)
  kept.save(tmp_path)
  (tmp_path / "001.mp4").unlink()
  with pytest.raises(UserError, match=r"lists 001\.mp4, which is not there"):
    ingest.scan(tmp_path)


def test_a_tar_that_shrinks_later_is_a_damaged_clip(plain, tmp_path):
  files = contents(plain)
  write_tar(tmp_path / "a.tar", {"0.mp4": files["000.mp4"], "0.txt": b"zero"})
  index = ingest.scan(tmp_path, held_out=0.0)
  (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
  with pytest.raises(media.MediaError, match=r"a\.tar is cut short"):
    index.clips[0].open(index.folder)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_the_metadata_files_of_hugging_face_give_captions(plain, tmp_path, form):
  folder = tmp_path / "train"
  folder.mkdir()
  rows = []
  for name, data in contents(plain).items():
    if not name.endswith(".txt"):
      (folder / name).write_bytes(data)
      text = (plain / name).with_suffix(".txt").read_text()
      rows.append({"file_name": name, "text": " ".join(text.split()), "size": "large"})
  if form == "jsonl":
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    with (folder / "metadata.csv").open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  assert_same_clips(ingest.scan(tmp_path, held_out=0.0), plain)
  named = ingest.scan(tmp_path, held_out=0.0, caption_key="size")
  assert {clip.caption for clip in named.clips} == {"large"}
  with pytest.raises(UserError, match=r"has no 'tet' .* file_name, size, text"):
    ingest.scan(tmp_path, caption_key="tet")
  (tmp_path / "metadata.csv").write_text("a,b\n1,2\n")  # something else
  assert len(ingest.scan(tmp_path).clips) == len(rows)
  (folder / "metadata.jsonl").write_text('{"file_name": "../../x.mp4", "text": "a"}')
  with pytest.raises(UserError, match="inside the folder"):
    ingest.scan(tmp_path)


def rows_of(plain):
  """(name, bytes, caption) of each clip."""
  names = [name for name in contents(plain) if not name.endswith(".txt")]
  texts = [" ".join((plain / name).with_suffix(".txt").read_text().split()) for name in names]
  return [(n, (plain / n).read_bytes(), t) for n, t in zip(names, texts, strict=True)]


def parquet(path, columns):
  pa = pytest.importorskip("pyarrow")
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.table(columns)
  if path.suffix == ".parquet":
    pa.parquet.write_table(table, path)
  else:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table)


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("nested", [True, False])
def test_tables_that_hold_clips_are_unpacked_once(plain, tmp_path, name, nested):
  pytest.importorskip("pyarrow.parquet")
  rows, root, out = rows_of(plain), tmp_path / "hf", tmp_path / "out"
  media_column = [{"bytes": d, "path": f"../{n}"} if nested else d for n, d, _ in rows]
  parquet(root / name, {"video": media_column, "caption": [text for *_, text in rows]})
  parquet(
    root / "data" / "test-00000-of-00001.parquet", {"video": media_column[:1], "caption": ["no"]}
  )
  index = ingest.scan(root, held_out=0.0, unpack_to=out)
  assert_same_clips(index, plain)
  assert {path.name for path in out.rglob("*.*") if path.is_file()} == {
    "000000000.mp4", "000000001.mp4", "000000002.mp4", "000000003.jpg",
  }  # fmt: skip
  times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
  assert ingest.scan(root, held_out=0.0, unpack_to=out) == index
  assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_tables_that_name_files_leave_them_where_they_are(plain, tmp_path):
  pytest.importorskip("pyarrow.parquet")
  rows = rows_of(plain)
  for name, data, _ in rows:
    (tmp_path / name).write_bytes(data)
  columns = {"path": [name for name, *_ in rows], "text": [[text] for *_, text in rows]}
  parquet(tmp_path / "meta" / "a.parquet", columns)
  index = ingest.scan(tmp_path, held_out=0.0)
  assert_same_clips(index, plain)
  assert index.folder == tmp_path.resolve()


@pytest.mark.parametrize(
  ("columns", "words"),
  [
    ({"video": [b"x"], "blurb": ["a"]}, "no known column for the caption among video, blurb"),
    ({"clip_bytes": [b"x"], "text": ["a"]}, "no known column for the media among clip_bytes"),
    ({"video": ["http://x/a.mp4"], "text": ["a"]}, "download the files first"),
    ({"video": ["../../a.mp4"], "text": ["a"]}, "inside the folder"),
    ({"video": [3], "text": ["a"]}, "row 0 of .* holds int in 'video'"),
    ({"video": [b"x"], "text": [7]}, "has the caption 7"),
  ],
)
def test_tables_that_are_not_understood_say_what_is_in_them(tmp_path, columns, words):
  pytest.importorskip("pyarrow.parquet")
  parquet(tmp_path / "a.parquet", columns)
  with pytest.raises(UserError, match=words):
    ingest.scan(tmp_path, unpack_to=tmp_path / "out")


def test_a_damaged_table_and_one_for_tests_only_are_refused(tmp_path):
  pytest.importorskip("pyarrow.parquet")
  (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
  with pytest.raises(UserError, match="for tests and validation only"):
    ingest.scan(tmp_path)
  (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
  with pytest.raises(UserError, match=r"a\.parquet cannot be read as a table"):
    ingest.scan(tmp_path, unpack_to=tmp_path / "out")


def write_records(folder, *shards, **arrays):
  """Shards of name -> (caption, bytes), then one record of other arrays, and their manifest."""
  made = []
  for number, files in enumerate(shards):
    with records.RecordWriter(folder / records.shard_name(number, len(shards))) as writer:
      for name, (caption, data) in files.items():
        held = {records.MEDIA: np.frombuffer(data, np.uint8)}
        info = {"file": name, "camera": "pan  left", "blurb": f"a {caption}"}
        writer.write(records.Record(name, BUCKET.name, caption, 0.0, 0.0, held, info))
      for name, array in arrays.items():
        writer.write(records.Record(name, BUCKET.name, "", 0.0, 0.0, {name: array}))
    made.append(writer.shard)
  records.write_manifest(folder, made, bucket=BUCKET, settings={})


@pytest.mark.parametrize("where", ["a/b", "."])
def test_records_of_media_are_read_in_place(plain, tmp_path, where):
  files = contents(plain)
  captions = {
    "000.mp4": "clip  0",
    "001.mp4": "clip 1",
    "002.mp4": "clip 2",
    "003.jpg": "a picture",
  }
  held = {name: (caption, files[name]) for name, caption in captions.items()}
  nameless = {"": held.pop("002.mp4")}  # what it is shows from its bytes
  write_records(tmp_path / where, held, nameless)
  before = sorted(tmp_path.rglob("*"))
  index = ingest.scan(tmp_path, held_out=0.0)
  assert_same_clips(index, plain)
  assert sorted(tmp_path.rglob("*")) == before
  assert {clip.camera for clip in index.clips} == {"pan left"}
  assert ingest.scan(tmp_path, held_out=0.0, caption_key="blurb").clips[0].caption == "a clip 0"
  with pytest.raises(UserError, match=r"'text' for the caption: .* blurb"):
    ingest.scan(tmp_path, caption_key="text")
  index.save(tmp_path)  # the folder's own: it is taken as that says
  assert [clip.id for clip in ingest.scan(tmp_path).clips] == [clip.id for clip in index.clips]


def test_records_that_cannot_be_used_are_named_and_the_rest_is_read(plain, tmp_path):
  data = contents(plain)["000.mp4"]
  write_records(tmp_path / "good", {"0.mp4": ("a clip", data), "1.mp4": ("", data)})
  write_records(tmp_path / "cut", {"1.mp4": ("another", data)})
  cut = tmp_path / "cut" / records.shard_name(0, 1)
  cut.write_bytes(cut.read_bytes()[:-100])
  write_records(tmp_path / "lost", {"1.mp4": ("another", data)}, {"2.mp4": ("another", data)})
  (tmp_path / "lost" / records.shard_name(1, 2)).unlink()
  write_records(tmp_path / "open", {"1.mp4": ("another", data)})
  (tmp_path / "open" / records.MANIFEST_NAME).unlink()
  write_records(tmp_path / "latents", {}, mean=np.zeros(3, np.float16))
  index = ingest.scan(tmp_path, held_out=0.0)
  assert [clip.caption for clip in index.clips] == ["a clip"]
  assert index.summary["files"] == 6 and index.summary["without_caption"] == 1
  reasons = {entry["file"]: entry["reason"] for entry in index.summary["bad_files"]}
  words = {"cut": "truncated", "lost": "is missing", "open": "has no manifest", "latents": 'no "m'}
  assert all(word in reasons[name] for name, word in words.items())
  with pytest.raises(UserError, match="holds mean and no"):
    ingest.scan(tmp_path / "latents")
  (clip,) = index.clips
  shard = tmp_path / "good" / records.shard_name(0, 1)
  with shard.open("r+b") as file:
    file.write(b"\0" * 2000)  # after it was opened
  with pytest.raises(media.MediaError, match="cannot be read from its shard"):
    clip.open(tmp_path)
