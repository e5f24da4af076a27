"""A run: what is computed once, taken up again, decided by a query, and never lost."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import checksums, select
from data_pipelines.curate import run as running
from data_pipelines.curate.engines.local import Local
from data_pipelines.curate.recipe import Recipe
from data_pipelines.curate.stages.sidecar import Sidecar
from mgen_jax.data.files import sha256_file
from mgen_jax.errors import ConfigError, UserError
from tests.data_pipelines.curate import small


def curate(recipe, videos: Path, output: Path, engine=None, name: str = "small", sums=None):
  made = running.create(name, recipe, str(videos), str(output))
  engine = engine or Here()
  with running.only_one(made[0].store.root):
    totals = running.score(*made, engine, limits=small.LIMITS, checksums=sums)
    table = running.decide(made[0])
    running.save_selection(made[0], table)
  engine.close()
  return made[0], totals, table


class Here:
  """An engine that runs everything in this process (its decoder is a child all the same)."""

  def run(self, function, tasks):
    yield from map(function, tasks)

  def close(self):
    pass


def files(root: Path) -> dict[str, bytes]:
  """What must not depend on who computed it: everything but the commits, which tell the time."""
  return {
    path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.parquet"))
  }


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
  return small.write_videos(tmp_path_factory.mktemp("curate") / "videos", 14)


@pytest.fixture(scope="module")
def first(videos, tmp_path_factory):
  return curate(small.recipe(), videos, tmp_path_factory.mktemp("curate") / "out")


def test_every_file_is_kept_or_rejected_with_a_reason(first):
  _, totals, table = first
  rows = table.to_pylist()
  assert (totals["sources"], totals["clips"]) == (14, 24)
  assert {row["path"] for row in rows} == {f"clip{n:03d}.mp4" for n in range(14)}
  assert sum(row["clip_id"] is not None for row in rows) == 24  # two of each that is a video
  assert all(row["keep"] == (row["first_fail"] is None) for row in rows)
  broken = [row for row in rows if row["error_code"]]
  assert [row["path"] for row in sorted(broken, key=lambda r: r["path"])] == [
    "clip006.mp4",
    "clip013.mp4",
  ]
  assert all(row["error_code"] == "probe_failed" and row["error"] for row in broken)
  dark = [row for row in rows if row["clip_id"] and row["light"] < 40]
  assert dark and all(row["first_fail"] == "dark" for row in dark)
  assert all(row["contrast"] is None and row["twin"] is None for row in dark)  # not worth it
  twins = [row for row in rows if row["first_fail"] == "twin"]
  assert twins and all(row["caption"] is None for row in twins)
  kept = [row for row in rows if row["keep"]]
  assert kept and all(row["caption"].startswith("light") for row in kept)
  assert all(row["shout"] == (row["caption"] and row["caption"].upper()) for row in rows)
  assert len({row["twin"] for row in kept}) == len(kept)
  assert all(row["frames_seen"] == 4 for row in rows if row["clip_id"])


def test_a_second_run_computes_nothing_and_changes_no_byte(first, videos):
  run, _, _ = first
  before = files(run.store.root)
  _, totals, _ = curate(run.recipe, videos, run.store.root)
  assert totals["units"] == totals["sources"] == totals["clips"] == 0
  assert files(run.store.root) == before


def test_two_workers_write_the_same_bytes(first, videos, tmp_path):
  curate(small.recipe(), videos, tmp_path / "out", Local(2))
  assert files(tmp_path / "out") == files(first[0].store.root)


def test_a_threshold_is_a_query(first, monkeypatch):
  """Nothing is decoded for another threshold, and its clips are those that the scores say."""
  run, _, table = first
  stricter = dataclasses.replace(run, recipe=small.recipe(light=small.Light(darkest=120.0)))
  monkeypatch.setattr(running.work, "run_task", None)
  decided = running.decide(stricter).to_pylist()
  light = [row for row in table.to_pylist() if row["clip_id"] and row["light"] >= 120]
  assert {r["clip_id"] for r in decided if r["twin"] is not None} == {r["clip_id"] for r in light}
  assert stricter.recipe.versions == run.recipe.versions


def test_a_looser_threshold_names_what_was_not_scored_and_a_run_scores_it(first, videos, tmp_path):
  run, _, table = first
  looser = small.recipe(light=small.Light(darkest=0.0))
  decided = running.decide(dataclasses.replace(run, recipe=looser)).to_pylist()
  dark = {r["clip_id"] for r in table.to_pylist() if r["first_fail"] == "dark"}
  waiting = {r["clip_id"] for r in decided if r["first_fail"] == select.NOT_SCORED}
  assert waiting and waiting <= dark
  out = tmp_path / "out"
  curate(small.recipe(), videos, out)
  _, totals, again = curate(looser, videos, out)
  assert totals["clips"] >= len(dark)
  assert select.NOT_SCORED not in again["first_fail"].to_pylist()
  assert all(row["shout"] for row in again.to_pylist() if row["keep"])
  light = {r["clip_id"]: r["light"] for r in table.to_pylist()}
  assert {r["clip_id"]: r["light"] for r in again.to_pylist()} == light


def test_new_files_are_the_only_ones_that_are_scored(videos, tmp_path):
  growing = tmp_path / "videos"
  small.write_videos(growing, 3)
  curate(small.recipe(), growing, tmp_path / "out")
  small.write_videos(growing, 2, first=3)
  _, totals, table = curate(small.recipe(), growing, tmp_path / "out")
  assert totals["sources"] == 2
  assert table.num_rows == 10
  small.write_videos(tmp_path / "fresh", 3)
  small.write_videos(tmp_path / "fresh", 2, first=3)
  _, _, fresh = curate(small.recipe(), tmp_path / "fresh", tmp_path / "out2")
  assert table.equals(fresh)  # history leaves no trace


def test_a_text_that_came_later_is_read(tmp_path):
  videos = small.write_videos(tmp_path / "videos", 3)
  _, _, before = curate(small.recipe(), videos, tmp_path / "out")
  assert all(row["shout"].startswith("LIGHT") for row in before.to_pylist() if row["keep"])
  (videos / "clip000.txt").write_text("!!")
  _, totals, after = curate(small.recipe(), videos, tmp_path / "out")
  assert totals["units"] > 0
  changed = [r for r in after.to_pylist() if r["keep"] and r["shout"].endswith("!!")]
  assert {row["path"] for row in changed} == {"clip000.mp4"}
  same = [r for r in before.to_pylist() if r["path"] != "clip000.mp4"]
  assert same == [r for r in after.to_pylist() if r["path"] != "clip000.mp4"]
  _, totals, _ = curate(small.recipe(), videos, tmp_path / "out")
  assert totals["units"] == 0


def test_captions_that_are_not_utf8_are_named_before_anything_is_decoded(tmp_path):
  folder = small.write_videos(tmp_path / "videos", 3)
  for name in ("clip000.txt", "clip001.txt"):
    (folder / name).write_bytes("schön".encode("latin-1"))

  class Nobody:
    def run(self, function, tasks):
      raise AssertionError("work was given out")

    close = None

  stages = (small.Header(), Sidecar(), small.Halves(), small.Light())
  recipe = Recipe(stages, seed=0, partitions=8, gated=())
  with pytest.raises(UserError, match=r"\.txt is not UTF-8 \(byte 3\); .* \(and 1 more texts"):
    curate(recipe, folder, tmp_path / "out", engine=Nobody())
  (folder / "clip000.txt").unlink()
  (folder / "clip001.txt").write_text("schön", encoding="utf-8")
  _, _, table = curate(recipe, folder, tmp_path / "out")
  captions = {row["path"]: row["source_caption"] for row in table.to_pylist()}
  assert captions == {"clip000.mp4": "", "clip001.mp4": "schön", "clip002.mp4": ""}


def test_another_setting_scores_that_stage_and_what_reads_it(first, videos, tmp_path):
  run, _, _ = first
  other = small.recipe(light=small.Light(gain=2.0))
  same = {name for name in run.recipe.versions if run.recipe.versions[name] == other.versions[name]}
  assert same == {"header", "note", "halves", "dear"}
  out = tmp_path / "out"
  curate(small.recipe(), videos, out)
  before = files(out)
  _, _, table = curate(other, videos, out)
  after = files(out)
  assert all(after[name] == before[name] for name in before if name.startswith("halves"))
  lights = {r["clip_id"]: r["light"] for r in first[2].to_pylist() if r["clip_id"]}
  for row in table.to_pylist():
    if row["clip_id"]:
      assert row["light"] == 2 * lights[row["clip_id"]]


def test_a_damaged_part_is_found_and_made_again(videos, tmp_path):
  out = tmp_path / "out"
  run, _, _ = curate(small.recipe(), videos, out)
  before = files(out)
  part = sorted(out.glob("light@*/part-*.parquet"))[0]
  data = bytearray(part.read_bytes())
  data[len(data) // 2] ^= 1
  part.write_bytes(data)
  assert [fault for fault in run.store.faults() if part.name in fault]
  part.write_bytes(data[:-10])  # a size that is wrong is seen without reading it all
  curate(small.recipe(), videos, out)
  assert files(out) == before and run.store.faults() == []


def test_scores_without_a_column_are_named_and_made_again(tmp_path):
  videos, out = small.write_videos(tmp_path / "videos", 3), tmp_path / "out"
  run, _, table = curate(small.recipe(), videos, out)
  version = run.recipe.versions["light"]
  for partition in range(run.recipe.partitions):
    commit = run.store.commit_of("light", version, partition)
    if commit is not None:
      part = run.store.read("light", version, partition).drop_columns(["frames_seen"])
      counters = commit.counters
      run.store.write("light", version, partition, part, inputs=commit.inputs, counters=counters)
  with pytest.raises(UserError, match=f"light@{version} lack a column.*delete that folder"):
    running.decide(run)
  shutil.rmtree(out / f"light@{version}")
  assert curate(small.recipe(), videos, out)[2].equals(table)


def test_exact_copies_are_sources_of_their_own(tmp_path):
  small.write_videos(tmp_path / "videos", 1)
  data = (tmp_path / "videos" / "clip000.mp4").read_bytes()
  (tmp_path / "videos" / "zcopy.mp4").write_bytes(data)
  _, _, table = curate(small.recipe(), tmp_path / "videos", tmp_path / "out")
  rows = table.to_pylist()
  assert [row["copy"] for row in rows] == [0, 0, 1, 1]
  assert len({row["source_id"] for row in rows}) == 1
  assert len({row["clip_id"] for row in rows}) == 4


def test_moved_videos_keep_their_ids(first, videos, tmp_path):
  for number, path in enumerate(sorted(videos.iterdir())[:3]):
    (tmp_path / "moved" / str(number)).mkdir(parents=True)
    (tmp_path / "moved" / str(number) / "x.mp4").write_bytes(path.read_bytes())
  _, _, table = curate(small.recipe(), tmp_path / "moved", tmp_path / "out")
  assert set(table["clip_id"].to_pylist()) <= set(first[2]["clip_id"].to_pylist())


def test_links_and_what_cannot_be_opened_are_listed(tmp_path):
  small.write_videos(tmp_path / "videos", 1)
  secret = tmp_path / "outside.mp4"
  secret.write_bytes(b"x")
  (tmp_path / "videos" / "leads_out.mp4").symlink_to(secret)
  (tmp_path / "videos" / "leads_nowhere.mp4").symlink_to(tmp_path / "videos" / "gone.mp4")
  (tmp_path / "videos" / "empty.mp4").touch()
  _, _, table = curate(small.recipe(), tmp_path / "videos", tmp_path / "out")
  codes = {row["path"]: row["error_code"] for row in table.to_pylist()}
  assert codes["leads_out.mp4"] == "linked_outside"
  assert codes["leads_nowhere.mp4"] == "cannot_open"
  assert codes["empty.mp4"] == "probe_failed"
  assert codes["clip000.mp4"] is None


def test_a_file_that_is_not_what_its_checksum_says_is_rejected_until_it_is(tmp_path):
  folder = small.write_videos(tmp_path / "videos", 4)
  names = sorted(path.name for path in folder.iterdir())
  lines = [f"{sha256_file(folder / name)} *{name}\n" for name in names[:3]]
  (tmp_path / "sums").write_text("".join([*lines, f"{'0' * 64}  gone.mp4\n"]))
  sums = checksums.read(str(tmp_path / "sums"), folder)
  assert sorted(sums) == [*names[:3], "gone.mp4"]

  rotten = folder / names[1]
  whole, stat = rotten.read_bytes(), rotten.stat()

  def run(given):
    _, totals, table = curate(small.recipe(), folder, tmp_path / "out", sums=given)
    codes = {row["path"]: row["error_code"] for row in table.to_pylist()}
    return totals["sources"], {name for name in codes if codes[name] == "checksum"}

  assert run(sums) == (4, set())
  # As a disk does it: neither its size nor its time tells.
  rotten.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  os.utime(rotten, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert run(sums) == (1, {names[1]})
  assert run(sums) == (0, {names[1]})
  rotten.write_bytes(whole)
  assert run(sums)[1] == set()


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("nonsense\n", "line 1: 'nonsense' is not a SHA-256"),
    (f"{'a' * 64}  x.mp4\n{'b' * 64}  ./x.mp4\n", "line 2: ./x.mp4 has another hash"),
    (b"\xff", "is not UTF-8"),
    (None, "cannot be read"),
  ],
)
def test_a_list_of_checksums_that_cannot_be_used_is_one_sentence(tmp_path, text, words):
  file = tmp_path / "sums"
  if text is not None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError, match=words):
    checksums.read(str(file), tmp_path)


def test_checksums_of_names_that_had_to_be_escaped(tmp_path):
  file = tmp_path / "sums"
  file.write_text("\\" + "A" * 64 + "  a\\\\b\\nc.mp4\n")
  assert checksums.read(str(file), tmp_path) == {"a\\b\nc.mp4": "a" * 64}


def test_the_selection_says_who_decided(first):
  run, _, table = first
  stored = running.read_selection(run)
  assert stored.replace_schema_metadata(None).equals(table)
  recipe = json.loads(stored.schema.metadata[b"recipe"])
  assert recipe["stages"]["light"]["thresholds"] == {"darkest": 40.0}
  assert recipe["stages"]["light"]["version"] == run.recipe.versions["light"]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"seed": 5}, "was made with seed=0"),
    ({"partitions": 4}, "was made with partitions=8"),
  ],
)
def test_a_folder_of_another_config_is_refused(first, videos, changes, words):
  with pytest.raises(UserError, match=words):
    running.create("small", small.recipe(**changes), str(videos), str(first[0].store.root))
  with pytest.raises(UserError, match=words):
    running.reopen("small", small.recipe(**changes), str(first[0].store.root))


def test_what_cannot_be_run_is_refused_before_anything_is_written(videos, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").touch()
  out = tmp_path / "out"
  for pattern, output, words in [
    (str(tmp_path / "none"), out, "does not exist"),
    (str(tmp_path / "*.mp4"), out, "holds no videos"),
    (str(videos), tmp_path / "full", "holds something else"),
    (str(videos), videos / "out", "lies in --input"),
    (str(videos), tmp_path / "full" / "thesis.tex" / "out", "could not be written"),
  ]:
    with pytest.raises(UserError, match=words):
      running.create("small", small.recipe(), pattern, str(output))
  assert not out.exists()
  with pytest.raises(UserError, match="no run of curation"):
    running.reopen("small", small.recipe(), str(out))


def test_two_runs_do_not_share_a_folder(tmp_path):
  with running.only_one(tmp_path):
    second = running.only_one(tmp_path)
    with pytest.raises(UserError, match="another curation"):
      second.__enter__()


def test_a_full_disk_leaves_nothing_half_written(videos, tmp_path, monkeypatch):
  import collections

  from data_pipelines.curate import store

  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(10, 10, 0))
  with pytest.raises(UserError, match="no space is left"):
    curate(small.recipe(), videos, tmp_path / "out")
  assert list((tmp_path / "out").rglob("*.parquet")) == []
  assert list((tmp_path / "out").rglob("*.part")) == []


def test_a_recipe_that_does_not_fit_together_is_refused():
  for changes, words in [
    ({"gated": ("lihgt",)}, 'did you mean "light"'),
    ({"gated": ("header",)}, "only clip stages"),
    ({"dear": small.Light(), "gated": ()}, "both write"),
    ({"twins": small.Header(), "gated": ()}, "which no stage|both write"),
    ({"halves": small.Header(), "gated": ()}, "exactly one stage splits"),
  ]:
    with pytest.raises(ConfigError, match=words):
      small.recipe(**changes)
