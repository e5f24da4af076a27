"""The benchmark of curation runs, at the smallest size; times are not looked at."""

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

from benchmarks import curation


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
