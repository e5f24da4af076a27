"""A folder becomes an index: what is good is kept in order, what is bad is named and counted."""

import json
import os

import numpy as np
import pytest

from mgen_jax.data import ingest, media
from mgen_jax.errors import UserError


def make_frames(count, height=32, width=48, seed=0):
  ramp = np.arange(width, dtype=np.uint8)[None, None, :, None]
  frames = np.zeros((count, height, width, 3), np.uint8) + ramp
  return frames + np.uint8(seed * 10) + np.arange(count, dtype=np.uint8)[:, None, None, None]


def write_captions(folder, captions):
  lines = [json.dumps({"file": file, "caption": text}) for file, text in captions.items()]
  (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """A user's folder: several containers, sizes, rates, subfolders; both kinds of caption."""
  folder = tmp_path_factory.mktemp("mixed")
  (folder / "sub" / "deep").mkdir(parents=True)
  (folder / ".hidden").mkdir()
  media.write_video(folder / "a.mp4", make_frames(12), 8.0)
  media.write_video(folder / "sub" / "b.webm", make_frames(10, 64, 36), 10.0, codec="libvpx-vp9")
  media.write_video(folder / "sub" / "deep" / "c.avi", make_frames(25, 48, 48), 25.0, codec="mpeg4")
  media.write_video(folder / "d.mkv", make_frames(9, 90, 160), 30.0)
  media.write_image(folder / "e.png", make_frames(1, 50, 70)[0])
  media.write_image(folder / "sub" / "f.jpg", make_frames(1, 33, 44)[0])
  media.write_video(folder / "no_caption.mp4", make_frames(8), 8.0)
  media.write_video(folder / ".hidden" / "x.mp4", make_frames(8), 8.0)
  (folder / "notes.md").write_text("not media")
  (folder / "d.txt").write_text("a  wide\nvideo\n")
  (folder / "sub" / "f.txt").write_text("ein Bild mit Grün", encoding="utf-8")
  (folder / "a.txt").write_text("this text loses against captions.jsonl")
  write_captions(
    folder,
    {
      "a.mp4": "first",
      "sub/b.webm": "tall",
      "./sub/deep/../deep/c.avi": "square",
      "e.png": "a picture",
      "gone.mp4": "its file was deleted",
    },
  )
  return folder


@pytest.fixture
def one_video(tmp_path):
  media.write_video(tmp_path / "a.mp4", make_frames(8), 8.0)
  return tmp_path


def test_a_mixed_folder_is_read_in_order_with_both_kinds_of_caption(mixed):
  index = ingest.scan(mixed)
  assert [(clip.path, clip.caption) for clip in index.clips] == [
    ("a.mp4", "first"),
    ("d.mkv", "a wide video"),
    ("e.png", "a picture"),
    ("sub/b.webm", "tall"),
    ("sub/deep/c.avi", "square"),
    ("sub/f.jpg", "ein Bild mit Grün"),
  ]
  shapes = {clip.path: (clip.frames, clip.height, clip.width, clip.fps) for clip in index.clips}
  assert shapes["a.mp4"] == (12, 32, 48, 8.0)
  assert shapes["sub/b.webm"] == (10, 64, 36, 10.0)
  assert shapes["sub/deep/c.avi"] == (25, 48, 48, 25.0)
  assert shapes["d.mkv"][:3] == (9, 90, 160)
  assert shapes["e.png"][:3] == (1, 50, 70)
  assert len({clip.id for clip in index.clips}) == 6
  summary = index.summary
  assert (summary["files"], summary["clips"], summary["videos"], summary["images"]) == (7, 6, 4, 2)
  assert (summary["without_caption"], summary["unreadable"]) == (1, 0)
  assert summary["listed_but_missing"] == 1
  assert summary["seconds"] == pytest.approx(1.5 + 1.0 + 1.0 + 0.3, abs=0.01)


def test_the_index_is_the_same_for_any_number_of_threads_and_any_place(mixed, tmp_path):
  index = ingest.scan(mixed, threads=1)
  assert ingest.scan(mixed, threads=7) == index
  os.symlink(mixed, tmp_path / "elsewhere")
  assert ingest.scan(tmp_path / "elsewhere").sha256 == index.sha256


def test_the_hash_follows_the_captions(one_video):
  (one_video / "a.txt").write_text("one")
  before = ingest.scan(one_video).sha256
  (one_video / "a.txt").write_text("two")
  assert ingest.scan(one_video).sha256 != before


def test_an_index_loads_back_and_an_altered_one_is_refused(mixed, tmp_path):
  index = ingest.scan(mixed)
  index.save(tmp_path)
  assert ingest.load(tmp_path) == index
  assert json.loads((tmp_path / "summary.json").read_text())["clips"] == 6
  path = tmp_path / "index.jsonl"
  text = path.read_text()
  path.write_text(text.replace("a picture", "a pictury"))
  with pytest.raises(UserError, match="altered"):
    ingest.load(tmp_path)
  for damaged in ("", text[:-30], text.replace('"schema_version": 1', '"schema_version": 7')):
    path.write_text(damaged)
    with pytest.raises(UserError, match=r"index\.jsonl"):
      ingest.load(tmp_path)


def test_bad_files_among_good_ones_are_reported_skipped_and_counted(one_video):
  whole = (one_video / "a.mp4").read_bytes()
  (one_video / "cut.mp4").write_bytes(whole[: len(whole) // 2])
  (one_video / "empty.mp4").write_bytes(b"")
  (one_video / "text.mp4").write_text("not a video")
  media.write_image(one_video / "cut.png", _noise())
  picture = (one_video / "cut.png").read_bytes()
  (one_video / "cut.png").write_bytes(picture[: len(picture) // 2])
  media.write_video(one_video / "latin.mp4", make_frames(8), 8.0)
  (one_video / "latin.txt").write_bytes("grün".encode("latin-1"))
  names = ("a.mp4", "cut.mp4", "cut.png", "empty.mp4", "text.mp4")
  write_captions(one_video, dict.fromkeys(names, "something"))
  index = ingest.scan(one_video)
  assert [clip.path for clip in index.clips] == ["a.mp4"]
  assert index.summary["unreadable"] == 5
  assert index.summary["without_caption"] == 0
  reasons = {bad["file"]: bad["reason"] for bad in index.summary["bad_files"]}
  assert sorted(reasons) == ["cut.mp4", "cut.png", "empty.mp4", "latin.mp4", "text.mp4"]
  assert "UTF-8" in reasons["latin.mp4"]


def test_half_an_emoji_in_a_caption_costs_that_letter_only(one_video, tmp_path):
  line = '{"file": "a.mp4", "caption": "a circle \\ud83d moves"}'
  (one_video / "captions.jsonl").write_text(line)
  index = ingest.scan(one_video)
  index.save(tmp_path)
  assert [clip.caption for clip in ingest.load(tmp_path).clips] == ["a circle ? moves"]


def _noise():
  return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def test_a_link_out_of_the_folder_is_refused_by_name(one_video, tmp_path_factory):
  outside = tmp_path_factory.mktemp("outside") / "secret.mp4"
  media.write_video(outside, make_frames(8), 8.0)
  os.symlink(outside, one_video / "link.mp4")
  write_captions(one_video, {"a.mp4": "x", "link.mp4": "y"})
  index = ingest.scan(one_video)
  assert [clip.path for clip in index.clips] == ["a.mp4"]
  assert "leaves the folder" in index.summary["bad_files"][0]["reason"]


def test_only_the_first_bad_files_are_listed_but_all_are_counted(one_video):
  for i in range(30):
    (one_video / f"bad{i:02d}.mp4").write_bytes(b"x")
    (one_video / f"bad{i:02d}.txt").write_text("bad")
  (one_video / "a.txt").write_text("good")
  summary = ingest.scan(one_video).summary
  assert summary["unreadable"] == 30
  assert [bad["file"] for bad in summary["bad_files"]] == [f"bad{i:02d}.mp4" for i in range(20)]


def test_a_folder_of_nothing_but_bad_files_stops(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"x")
  (tmp_path / "a.txt").write_text("bad")
  with pytest.raises(UserError, match=r"none of the 1 captioned files .*a\.mp4 cannot"):
    ingest.scan(tmp_path)


def test_a_missing_or_empty_folder_stops(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    ingest.scan(tmp_path / "nowhere")
  (tmp_path / "notes.txt").write_text("no media here")
  with pytest.raises(UserError, match=r"no videos or images.*\.mp4"):
    ingest.scan(tmp_path)


def test_a_folder_without_captions_shows_both_forms(one_video):
  with pytest.raises(UserError, match=r'captions\.jsonl.*"file".*"caption".*clip\.txt'):
    ingest.scan(one_video)
  (one_video / "a.txt").write_text("  \n")
  with pytest.raises(UserError, match="has a caption"):
    ingest.scan(one_video)


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("not json", r"line 3 of .*captions\.jsonl is not JSON"),
    ("[1, 2]", "line 3 .*lacks"),
    ('{"file": "a.mp4"}', "line 3 .*lacks"),
    ('{"file": "a.mp4", "caption": 3}', "line 3 .*lacks"),
    ('{"file": "../a.mp4", "caption": "x"}', "line 3 .*inside the folder"),
    ('{"file": "sub/../../a.mp4", "caption": "x"}', "line 3 .*inside the folder"),
    ('{"file": "/etc/a.mp4", "caption": "x"}', "line 3 .*inside the folder"),
    ('{"file": "", "caption": "x"}', "line 3 .*inside the folder"),
    ('{"file": "./a.mp4", "caption": "x"}', "lines 1 and 3 .*both describe 'a.mp4'"),
  ],
)
def test_a_wrong_line_of_captions_is_named_by_its_number(one_video, line, complaint):
  good = '{"file": "a.mp4", "caption": "x"}'
  (one_video / "captions.jsonl").write_text(f"{good}\n\n{line}\n")
  with pytest.raises(UserError, match=complaint):
    ingest.scan(one_video)


def test_captions_that_are_not_utf8_are_a_sentence(one_video):
  (one_video / "captions.jsonl").write_bytes(b'{"file": "a.mp4", "caption": "gr\xfcn"}\n')
  with pytest.raises(UserError, match="UTF-8"):
    ingest.scan(one_video)


def test_a_line_separator_inside_a_caption_does_not_end_the_line(one_video):
  (one_video / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x\u2028y"}\n')
  assert ingest.scan(one_video).clips[0].caption == "x y"


def test_captions_from_an_editor_that_writes_a_mark_and_extra_keys_are_read(one_video):
  line = '\ufeff{"file": "a.mp4", "caption": "x", "score": 3}\r\n'
  (one_video / "captions.jsonl").write_text(line, encoding="utf-8")
  assert ingest.scan(one_video).clips[0].caption == "x"


def test_progress_counts_every_captioned_file(mixed):
  calls = []
  ingest.scan(mixed, progress=lambda done, total: calls.append((done, total)))
  assert calls == [(i, 6) for i in range(1, 7)]


def test_the_split_depends_on_seed_and_path_alone():
  paths = [f"clip_{i:05d}.mp4" for i in range(4000)]
  split = ingest._split(paths, 0, 0.1)
  share = sum(side == "held_out" for side in split.values()) / len(paths)
  assert 0.08 < share < 0.12
  some = ingest._split(paths[::3], 0, 0.1)
  assert some == {path: split[path] for path in paths[::3]}
  assert ingest._split(paths, 1, 0.1) != split


def test_both_sides_of_a_small_split_have_a_clip():
  for seed in range(20):
    for share in (0.01, 0.99):
      assert set(ingest._split(["a", "b", "c"], seed, share).values()) == {"train", "held_out"}
  assert set(ingest._split(["a", "b"], 0, 0.0).values()) == {"train"}
  assert ingest._split(["a"], 0, 0.5)["a"] in ("train", "held_out")
  with pytest.raises(UserError, match="held_out"):
    ingest._split(["a"], 0, 1.0)
