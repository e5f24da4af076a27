"""The encode command: what it writes, that it goes on, and that it mixes no models."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from mgen_jax import encode
from mgen_jax.data import records
from mgen_jax.data.buckets import parse_bucket
from mgen_jax.errors import UserError
from mgen_jax.training import inputs
from mgen_jax.workdir import Workdir
from tests import untrained

BUCKETS = "1x32x32,8x32x48"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Workdir:
  """A run whose autoencoder is not trained, and its videos."""
  return untrained.make(tmp_path_factory.mktemp("origin") / "run", clips=12)


def arguments(origin, out, *more, videos=None):
  flag = {"autoencoder": origin.root, "videos": videos or origin.root / "videos", "out": out}
  common = ["--batch=4", "--shard_examples=4", "--held_out=0.25", f"--buckets={BUCKETS}"]
  return [*(f"--{k}={v}" for k, v in flag.items()), *common, *more]


def command(origin, out, *more, videos=None):
  values = flags.FlagValues()
  encode.define_flags(values)
  values(["encode", *arguments(origin, out, *more, videos=videos)])
  encode.main(["encode"], values)
  return out / encode.STAGE


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.arrayrecord"))}


@pytest.fixture(scope="module")
def encoded(origin, tmp_path_factory):
  return command(origin, tmp_path_factory.mktemp("encoded") / "out")


def test_manifest_and_statistics_name_the_autoencoder(encoded):
  statistics = json.loads((encoded / inputs.STATISTICS_NAME).read_text())
  source = records.open_records(encoded / "train" / "8x32x48")
  assert source.settings["autoencoder"] == statistics["autoencoder"]
  assert len(statistics["autoencoder"]) == 16
  rows = [source[n].arrays for n in range(len(source))]
  assert rows and all(set(row) == {"mean", "logvar"} for row in rows)
  image = records.open_records(encoded / "train" / "1x32x32")
  values = [s[n].arrays["mean"].reshape(-1, 4) for s in (source, image) for n in range(len(s))]
  values = np.concatenate(values).astype(np.float64)
  np.testing.assert_allclose(statistics["mean"], values.mean(0), rtol=1e-6)
  np.testing.assert_allclose(statistics["std"], values.std(0), rtol=1e-6)


def test_latents_name_the_file_that_they_are_of(origin, encoded):
  lines = (origin.root / "videos" / "captions.jsonl").read_text().splitlines()
  captions = {line["file"]: line["caption"] for line in map(json.loads, lines)}
  sources = [records.open_records(path.parent) for path in encoded.rglob(records.MANIFEST_NAME)]
  made = [source[number] for source in sources for number in range(len(source))]
  assert len({each.info["file"] for each in made}) == len({each.id for each in made}) > 4
  assert all(captions[each.info["file"]] == each.caption for each in made)


def test_the_same_command_again_makes_only_what_is_missing(origin, encoded):
  before = contents(encoded)
  lost, kept = next(iter(before)), list(before)[1]
  written = (encoded / kept).stat().st_mtime_ns
  (encoded / lost).unlink()
  assert command(origin, encoded.parent) == encoded
  assert contents(encoded) == before
  assert (encoded / kept).stat().st_mtime_ns == written
  with pytest.raises(UserError, match="seed: 0 then, 1 now"):
    command(origin, encoded.parent, "--seed=1")


@pytest.mark.slow
def test_two_processes_make_the_same_files_and_go_on_where_one_stopped(origin, encoded, tmp_path):
  expected = contents(encoded)
  made = shutil.copytree(encoded.parent, tmp_path / "out") / encode.STAGE
  kept, *lost = expected  # as if it had been stopped after the first shard
  assert {name.name[:5] for name in lost} >= {"00000", "00001"}  # work for both
  for name in [*lost, *(p.relative_to(made) for p in made.rglob("*.json"))]:
    (made / name).unlink()
  written = (made / kept).stat().st_mtime_ns
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  job = [sys.executable, "-m", "mgen_jax.encode", *arguments(origin, tmp_path / "out")]
  job += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
  processes = [
    subprocess.Popen([*job, f"--process_id={index}"], stderr=subprocess.PIPE, text=True)
    for index in range(2)
  ]
  for process in processes:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
  assert contents(made) == expected and (made / kept).stat().st_mtime_ns == written
  for path in [*encoded.rglob(records.MANIFEST_NAME), encoded / inputs.STATISTICS_NAME]:
    assert (made / path.relative_to(encoded)).read_text() == path.read_text()


def test_records_of_media_give_the_latents_that_their_files_give(origin, encoded, tmp_path):
  videos, media = origin.root / "videos", tmp_path / "media"
  with records.RecordWriter(media / records.shard_name(0, 1)) as writer:
    for line in map(json.loads, (videos / "captions.jsonl").read_text().splitlines()):
      data = {records.MEDIA: np.frombuffer((videos / line["file"]).read_bytes(), np.uint8)}
      writer.write(records.Record("", "", line["caption"], 0.0, 0.0, data))
  records.write_manifest(media, [writer.shard], bucket=parse_bucket("8x32x48"), settings={})
  made = command(origin, tmp_path / "out", videos=media)

  def by_caption(folder):  # of clips as long as their bucket: no window of theirs is drawn
    sources = [records.open_records(path) for path in sorted(folder.glob("*/8x32x48"))]
    rows = [source[number] for source in sources for number in range(len(source))]
    return {row.caption: row.arrays["mean"].astype(np.float32) for row in rows}

  found, expected = by_caption(made), by_caption(encoded)
  assert found.keys() == expected.keys() and found
  for caption, mean in expected.items():  # in other batches, since the split is another
    np.testing.assert_allclose(found[caption], mean, rtol=1e-3, atol=1e-4)


def test_draws_can_be_kept_instead_of_moments(origin, encoded, tmp_path):
  drawn = command(origin, tmp_path / "out", "--keep=sample")
  name = "train/8x32x48"
  moments, draws = records.open_records(encoded / name), records.open_records(drawn / name)
  for number in range(len(draws)):
    assert set(draws[number].arrays) == {"latents"}
    a, b = moments[number].arrays, draws[number].arrays["latents"].astype(np.float32)
    score = (b - a["mean"]) / np.exp(0.5 * a["logvar"].astype(np.float32))
    assert 0.7 < score.std() < 1.3 and abs(score.mean()) < 0.3


def test_a_stage_takes_them_if_they_are_of_its_autoencoder(origin, encoded, tmp_path):
  stage = dataclasses.replace(
    origin.experiment.stages["encode"], folder=str(encoded), buckets=tuple(BUCKETS.split(","))
  )
  stages = {**origin.experiment.stages, "encode": stage}
  work = Workdir(origin.root, dataclasses.replace(origin.experiment, stages=stages))
  encode.run(work, "encode")
  assert (
    work.done_record("encode")["autoencoder"]
    == json.loads((encoded / inputs.STATISTICS_NAME).read_text())["autoencoder"]
  )

  other = untrained.make(tmp_path / "other", clips=12)
  shutil.rmtree(other.folder("autoencoder") / "checkpoints")
  untrained.save(other, "autoencoder", seed=99)
  work = Workdir(other.root, dataclasses.replace(other.experiment, stages=stages))
  with pytest.raises(UserError, match="encode again"):
    encode.run(work, "encode")


def test_mistakes_are_named(origin, tmp_path):
  with pytest.raises(UserError, match="--buckets is missing"):
    command(origin, tmp_path / "a", "--buckets=")
  with pytest.raises(UserError, match="latent_scale is 0"):
    command(origin, tmp_path / "a", "--latent_scale=0")
  with pytest.raises(UserError, match="latent_scale and folder are both set"):
    dataclasses.replace(origin.experiment.stages["encode"], folder="a", latent_scale=0.5)
  with pytest.raises(UserError, match="--stage=t2v is not a stage"):
    command(origin, tmp_path / "a", "--stage=t2v")
  with pytest.raises(UserError, match="height 30 is not divisible"):
    command(origin, tmp_path / "a", "--buckets=1x30x32")
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "precious.txt").write_text("mine")
  with pytest.raises(UserError, match="holds other files"):
    command(origin, tmp_path / "b")
  assert (tmp_path / "b" / "precious.txt").read_text() == "mine"
