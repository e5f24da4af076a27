"""The whole command on a small planted corpus: real files, every kind of defect, exact truth.

The corpus here is a tenth of the one that `docs/numbers.md` has figures of; on few files the shares
that must be reached mean: all of them.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import planted, scorecard, shards, store
from data_pipelines.curate.stage import ROWS
from mgen_jax import encode
from mgen_jax.data import buckets, ingest, pipeline, records, sources
from tests import untrained

ROOT = Path(__file__).parents[3]
CONFIG = "data_pipelines/curate/configs/marbles.py"


def command(*given: str) -> subprocess.CompletedProcess:
  arguments = [sys.executable, "-m", "data_pipelines.curate", f"--config={CONFIG}", *given]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
  return subprocess.run(
    arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
  )


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
  folder = tmp_path_factory.mktemp("planted")
  corpus = planted.write(folder / "corpus", seed=1, share=0.1, workers=2)
  done = command(f"--input={corpus}", f"--output={folder / 'out'}", "--workers=2")
  assert done.returncode == 0, done.stderr
  return corpus, folder / "out", done.stdout


@pytest.mark.slow
def test_every_filter_is_right(curated):
  corpus, out, _ = curated
  card = scorecard.measure(planted.read_truth(corpus), scorecard.read_items(out))
  wrong = {kind: share.wrong for kind, share in card.filters.items() if share.wrong}
  assert wrong == {}, card.text()
  assert len(card.filters) >= 12
  assert card.false_rejections["any"].wrong == (), card.text()
  assert not card.recall.wrong and not card.precision.wrong and card.recall.of > 0, card.text()
  assert not card.cuts.wrong and card.cameras.value >= 0.9, card.text()


@pytest.mark.slow
def test_the_command_says_what_it_did(curated):
  _, out, said = curated
  assert "no duplicates" in said and "report.html" in said
  report = json.loads((out / "report.json").read_text())
  assert [row["key"] for row in report["funnel"] if row["key"] in ROWS] == list(ROWS)
  assert report["kept"] == len(list((out / "export" / "clips").glob("*.mp4"))) > 0
  assert report["errors"] and report["buckets"] and report["costs"]["frames"] > 0


@pytest.mark.slow
def test_what_if_changes_nothing_and_says_what_would(curated):
  _, out, _ = curated
  before = (out / "selection.parquet").read_bytes()
  done = command(f"--output={out}", "--what-if=aesthetics.min_score=9.9")
  assert done.returncode == 0, done.stderr
  assert "what if" in done.stdout and "nothing was changed" in done.stdout
  assert (out / "selection.parquet").read_bytes() == before


@pytest.mark.slow
def test_verify_names_what_was_altered(curated):
  _, out, _ = curated
  assert command(f"--output={out}", "--action=verify").returncode == 0
  clip = sorted((out / "export" / "clips").glob("*.mp4"))[0]
  data = clip.read_bytes()
  clip.write_bytes(data[:-1])
  done = command(f"--output={out}", "--action=verify")
  clip.write_bytes(data)
  assert done.returncode == 2 and clip.name in done.stdout


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (("--input=videos",), "--output is missing"),
    (("--output=out",), "--input is missing"),
    (("--input=nowhere", "--output=out"), "does not exist"),
    (("--input=.", "--output=out", "--engine=spark"), "spark"),
    (("--input=Makefile", "--output=out", "--checksums=nowhere"), "cannot be read"),
    (("--input=Makefile", "--output=out", "--checksums=sums"), "lists none of the 1 files"),
    (("--output=out", "--what-if=text.max_scroe=1"), "no run of curation"),
  ],
)
def test_bad_flags_are_one_sentence(given, words, tmp_path):
  (tmp_path / "sums").write_text(f"{'0' * 64}  elsewhere.mp4\n")
  places = {"=out": f"={tmp_path / 'out'}", "=sums": f"={tmp_path / 'sums'}"}
  for name, place in places.items():
    given = [flag.replace(name, place) for flag in given]
  done = command(*given)
  assert done.returncode != 0 and words in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_shards_are_the_export_with_its_provenance(curated):
  corpus, out, said = curated
  index, files = ingest.load(out / "shards"), ingest.scan(out / "export")
  assert len(index.clips) > 5 and f"{len(index.clips)} of them in" in said
  assert [clip.content() for clip in index.clips] == [clip.content() for clip in files.clips]
  rows = {row["clip_id"]: row for row in store.read_table(out / "selection.parquet").to_pylist()}
  for clip in index.clips:
    shard = records.open_records(out / "shards" / clip.archive)
    record = shard[clip.offset]
    found = records.Provenance.of(record)
    row = rows[record.id]
    source = hashlib.sha256((corpus / found.source).read_bytes()).hexdigest()
    assert found.source_id == source and (found.start, found.end) == (row["start"], row["end"])
    assert found.first_fail == "" and found.scorers["text"].startswith("rapidocr")
    assert found.scores["vmaf_motion_30"] == row["vmaf_motion_30"]
    assert record.bucket == row["bucket"] and record.caption == row["caption"]
    assert bytes(clip.open(index.folder)) == (out / "export" / clip.path).read_bytes()
  rejected = [row for row in rows.values() if not row["keep"]]
  assert rejected and all(shards.provenance(row, {}).first_fail for row in rejected)
  written = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*/*.arrayrecord")}
  again = command(f"--input={corpus}", f"--output={out}", "--workers=1")
  assert again.returncode == 0 and "scored 0 files and 0 clips" in again.stdout
  assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.slow
def test_encoding_and_the_loader_take_what_was_curated(curated, tmp_path):
  """Both forms of the export give the same latents; the loader draws batches from the shards."""
  _, out, _ = curated
  origin = untrained.make(tmp_path / "run", clips=12)
  made = []
  for form in ("export", "shards"):
    values = flags.FlagValues()
    encode.define_flags(values)
    paths = {"autoencoder": origin.root, "videos": out / form, "out": tmp_path / form}
    given = [f"--{key}={value}" for key, value in paths.items()]
    values(["encode", *given, "--batch=4", "--buckets=1x32x32,8x32x48", "--max_crop=0.5"])
    encode.main(["encode"], values)
    found = records.open_records(tmp_path / form / encode.STAGE / "train" / "8x32x48")
    rows = [found[number] for number in range(len(found))]
    made.append([(row.id, row.caption, row.arrays["mean"].tobytes()) for row in rows])
  assert made[0] == made[1] and len(made[0]) > 5

  bucket = buckets.parse_bucket("8x32x48")
  index = ingest.load(out / "shards")
  drawn, _ = sources.media_sources(index, [bucket], split="train", max_crop=0.5)
  with pipeline.make_stream(drawn, batch_sizes={bucket: 4}, seed=0, workers=2) as stream:
    batches = [rows for _, rows in itertools.islice(stream, 3)]
  assert len(batches) == 3
  for rows in batches:
    assert rows["video"].shape == (4, 8, 32, 48, 3) and rows["video"].std() > 1


@pytest.mark.slow
def test_verify_names_a_shard_that_was_altered(curated):
  _, out, _ = curated
  shard = next((out / "shards").glob("*/*.arrayrecord"))
  data = shard.read_bytes()
  shard.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
  done = command(f"--output={out}", "--action=verify")
  assert done.returncode == 2 and shard.name in done.stdout
  shard.write_bytes(data)
  assert command(f"--output={out}", "--action=verify").returncode == 0
