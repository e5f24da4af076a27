"""The whole command on a small planted corpus: real files, every kind of defect, exact truth.

The corpus here is a tenth of the one that `docs/numbers.md` has figures of; on few files the shares
that must be reached mean: all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import planted, scorecard
from data_pipelines.curate.stage import ROWS

ROOT = Path(__file__).parents[3]
CONFIG = "data_pipelines/curate/configs/marbles.py"


def command(*flags: str) -> subprocess.CompletedProcess:
  arguments = [sys.executable, "-m", "data_pipelines.curate", f"--config={CONFIG}", *flags]
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
  ("flags", "words"),
  [
    (("--input=videos",), "--output is missing"),
    (("--output=out",), "--input is missing"),
    (("--input=nowhere", "--output=out"), "does not exist"),
    (("--input=.", "--output=out", "--engine=spark"), "spark"),
    (("--output=out", "--what-if=text.max_scroe=1"), "no run of curation"),
  ],
)
def test_bad_flags_are_one_sentence(flags, words, tmp_path):
  flags = [flag.replace("=out", f"={tmp_path / 'out'}") for flag in flags]
  done = command(*flags)
  assert done.returncode != 0 and words in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()
