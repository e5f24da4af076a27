"""The planted corpus is what its truth says, and the scorecard sees every kind of mistake."""

import json

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import planted, scorecard
from mgen_jax.data import media
from mgen_jax.errors import UserError


def test_the_corpus_has_every_kind_in_many_forms():
  plans = planted.plans()
  assert len(plans) >= 300
  kinds = {kind: sum(plan.kind == kind for plan in plans) for kind in {p.kind for p in plans}}
  assert kinds == planted.COUNTS | planted.COPIES | planted.HARD_COPIES
  clean = [plan for plan in plans if plan.kind == "clean"]
  assert len({plan.codec for plan in clean}) >= 3 and len({plan.suffix for plan in clean}) >= 4
  assert len({plan.size for plan in clean}) >= 4 and len({plan.fps for plan in clean}) >= 3
  assert len({plan.camera for plan in clean}) == 7
  assert len({plan.file for plan in plans}) == len(plans)
  assert all(plans[plan.of].kind == "clean" for plan in plans if plan.of is not None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return planted.write(tmp_path_factory.mktemp("planted") / "corpus", share=0.01)


def test_files_are_what_the_truth_says(corpus):
  truth = planted.read_truth(corpus)
  assert {each["kind"] for each in truth} == {plan.kind for plan in planted.plans()}
  for each in truth:
    path = corpus / each["file"]
    assert path.is_file()
    if each["kind"] == "corrupt":
      with pytest.raises(media.MediaError):
        media.read_video(path)
      continue
    info = media.probe(path)
    if "width" in each:
      assert (info.width, info.height) == (each["width"], each["height"])
      assert info.fps == pytest.approx(each["fps"], rel=0.01)
      assert info.duration == pytest.approx(each["seconds"], abs=0.2)
    if each["kind"] == "hard_cut":
      video = media.read_video(path).astype(int)
      change = np.abs(np.diff(video, axis=0)).mean(axis=(1, 2, 3))
      assert (change.argmax() + 1) / each["fps"] == pytest.approx(each["cuts"][0], abs=0.01)
  captions = (corpus / "captions.jsonl").read_text().splitlines()
  assert [json.loads(line)["file"] for line in captions] == [each["file"] for each in truth]


def test_a_corpus_is_written_once_and_another_is_not_mistaken_for_it(corpus, tmp_path):
  before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
  assert planted.write(corpus, share=0.01) == corpus
  assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
  with pytest.raises(UserError, match="another folder"):
    planted.write(corpus, seed=3, share=0.01)
  plans = planted.plans(0, 0.01)
  for plan in (plans[0], plans[-1]):  # a file depends on its plan alone
    (tmp_path / "more").mkdir(exist_ok=True)
    planted._write_one(tmp_path, plan, planted._origin(plan, plans))
    assert (tmp_path / plan.file).read_bytes() == (corpus / plan.file).read_bytes()


TRUTH = [
  {"file": "a", "kind": "clean", "of": None, "camera": "pan left", "cuts": [], "fps": 10.0},
  {"file": "b", "kind": "clean", "of": None, "camera": "zoom in", "cuts": [], "fps": 10.0},
  {"file": "c", "kind": "encoded", "of": "a", "camera": "pan left", "cuts": [], "fps": 10.0},
  {"file": "d", "kind": "static", "of": None, "camera": "", "cuts": [], "fps": 10.0},
  {"file": "e", "kind": "corrupt", "of": None, "camera": "", "cuts": [], "fps": 10.0},
  {"file": "f", "kind": "hard_cut", "of": None, "camera": "", "cuts": [2.0], "fps": 10.0},
  {"file": "g", "kind": "cropped", "of": "a", "camera": "", "cuts": [], "fps": 10.0},
]


def _item(path, group=None, fails=(), keep=False, **values):
  clip = {"clip_id": path, "error_code": None, "cuts": [], "camera": "", "copy_group": group}
  return {"path": path, "fails": list(fails), "keep": keep} | clip | values


RIGHT = {
  "a": _item("a", "a", keep=True, camera="pan left"),
  "b": _item("b", "b", keep=True, camera="zoom in"),
  "c": _item("c", "a", ["duplicate"], camera="pan left"),
  "d": _item("d", None, ["static", "low_motion"]),
  "e": _item("e", None, clip_id=None, error_code="truncated", cuts=None),
  "f": _item("f", "f", keep=True, cuts=[2.1]),
  "g": _item("g", "a", ["duplicate"]),
}


def _measure(**changes):
  items = {name: item | changes.get(name, {}) for name, item in RIGHT.items()}
  return scorecard.measure(TRUTH, items.values())


def test_a_run_without_a_mistake_is_right_in_everything():
  card = _measure()
  shares = [*card.filters.values(), *card.false_rejections.values(), *card.hard_copies.values()]
  shares += [card.recall, card.precision, card.one_kept, card.cuts, card.cameras]
  assert all(share.value == 1 for share in shares)
  assert set(card.filters) == {"static", "corrupt"} and card.recall.of == 1 and card.cuts.of == 3
  assert "100.0 %" in card.text() and json.loads(json.dumps(card.plain()))["recall"]["right"] == 1


@pytest.mark.parametrize(
  ("changes", "wrong"),
  [
    ({"d": {"fails": ["text"]}}, lambda card: card.filters["static"]),  # for another reason
    ({"d": {"keep": True, "fails": []}}, lambda card: card.filters["static"]),
    ({"e": {"error_code": None}}, lambda card: card.filters["corrupt"]),
    ({"b": {"fails": ["text"], "keep": False}}, lambda card: card.false_rejections["text"]),
    ({"b": {"clip_id": None, "keep": False}}, lambda card: card.false_rejections["no_clip"]),
    ({"c": {"copy_group": "c"}}, lambda card: card.recall),
    ({"b": {"copy_group": "a"}}, lambda card: card.precision),
    ({"c": {"keep": True}}, lambda card: card.one_kept),
    ({"a": {"keep": False}}, lambda card: card.one_kept),
    ({"g": {"copy_group": "g"}}, lambda card: card.hard_copies["cropped"]),
    ({"f": {"cuts": [2.2]}}, lambda card: card.cuts),
    ({"a": {"cuts": [1.0]}}, lambda card: card.cuts),
    ({"a": {"camera": "truck left"}}, lambda card: card.cameras),
  ],
)
def test_every_mistake_is_seen(changes, wrong):
  share = wrong(_measure(**changes))
  assert share.value < 1 and share.wrong


def test_the_command_says_what_is_missing(tmp_path, corpus, capsys):
  assert scorecard.main(["--planted", str(corpus), "--output", str(tmp_path)]) == 2
  assert "run curation first" in capsys.readouterr().err
