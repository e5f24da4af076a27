"""The benchmark of curation runs, at the smallest size; times are not looked at."""

import sys

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

from benchmarks import curation, curation_memory


@pytest.mark.slow
def test_the_same_frames_are_decoded_and_curated(tmp_path):
  curation.write_film(tmp_path / "films" / "film.mp4", 0, 72, 128, 7.0)
  flags = [f"--input={tmp_path / 'films'}", "--processes=1", f"--out={tmp_path / 'a.json'}"]
  record = curation.main(flags)
  assert [row["frames"] for row in record["rows"]] == [210]
  assert record["cpu_by_stage"]["decode"] > 0 and record["cpu_by_stage"]["motion"] > 0
  assert (tmp_path / "a.json").is_file()


def test_a_film_under_another_hash_is_the_same_film(tmp_path):
  curation.write_film(tmp_path / "films" / "film.mp4", 0, 32, 48, 0.5)
  (tmp_path / "more").mkdir()
  curation.repeat(tmp_path / "more", tmp_path / "films", 3)
  paths = sorted((tmp_path / "more").iterdir())
  assert len({path.read_bytes() for path in paths}) == 3
  assert {curation.decode(str(path)) for path in paths} == {15}


@pytest.mark.slow
def test_the_memory_of_all_processes_is_added_up(tmp_path):
  """Of a command with a child: both are seen, and the sum is no less than the largest."""
  script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
  child = "x = b'1' * (100 << 20); import time; time.sleep(1)"
  found = curation_memory.watched([sys.executable, "-c", script, child])
  assert 100 < found["worker_mib"] < 400 and 0 < found["driver_mib"] < 100
  assert found["decoder_mib"] == 0 and found["peak_mib"] >= found["worker_mib"]
  curation_memory.write_film(tmp_path / "f" / "film.mp4", 1, 48, 64)
  assert curation.decode(str(tmp_path / "f" / "film.mp4")) == 30
