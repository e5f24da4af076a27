"""Copies: exact, by hash, by embedding; who wins; and what the hashes cannot see."""

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("faiss", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("pdqhash", reason="needs the extra: pip install mgen_jax[curate]")

import pyarrow as pa

from data_pipelines.curate.planted import remux
from data_pipelines.curate.recipe import passes
from data_pipelines.curate.stages import copies, hashes, packets
from mgen_jax.data import marbles, media
from mgen_jax.errors import ConfigError, UserError
from tests.data_pipelines.curate.looking import show
from tests.data_pipelines.curate.onnx_file import write_mean_colour

FPS = 12.0


def table(count, **columns):
  """Clips of equal looks, unless said otherwise."""
  base = {
    "clip_id": [f"{i:04d}" for i in range(count)],
    "packets_md5": pa.nulls(count, pa.string()),
    "copy_hashes": pa.nulls(count, hashes.Hashes.columns["copy_hashes"]),
    "copy_embedding": pa.nulls(count, pa.list_(pa.float32())),
    "start": [0.0] * count, "end": [5.0] * count,
    "width": [640] * count, "height": [360] * count, "aesthetics": [5.0] * count,
  }  # fmt: skip
  return pa.table(base | columns)


def noise(rng, row, bits):
  """The hashes with some bits of each turned over."""
  out = np.unpackbits(row, axis=1)
  for frame in out:
    places = rng.choice(256, bits, replace=False)
    frame[places] ^= 1
  return np.packbits(out, axis=1)


def stored(row):
  return [frame.tobytes() for frame in row]


def test_packets_are_equal_through_another_container_and_differ_through_another_encoding(tmp_path):
  video = marbles.render(marbles.sample_scene(0, marbles.WorldConfig()), 12, 64, 96, FPS)
  data = media.encode_video(video, FPS, audio=np.zeros(48000, np.float32))
  files = {
    "a.mp4": data, "b.mp4": data, "c.mkv": remux(data, "matroska"),
    "d.mp4": media.encode_video(video, FPS, crf=30), "e.mp4": b"no video",
  }  # fmt: skip
  found = {}
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
    found[name] = packets.Packets().score(str(tmp_path / name))["packets_md5"]
  assert found["a.mp4"] == found["b.mp4"] == found["c.mkv"] != found["d.mp4"]
  assert found["e.mp4"] is None and found["d.mp4"] is not None


def test_equal_packets_and_span_are_one_group_and_the_winner_is_the_best():
  stage = copies.Copies()
  many = table(
    6,
    packets_md5=["x", "x", "x", "y", "x", None],
    end=[5.0, 5.0, 5.0, 5.0, 4.0, 5.0],
    aesthetics=[4.0, 6.0, 5.0, 5.0, 5.0, 5.0],
  )
  found = stage.score(many).to_pylist()
  assert [row["copy_group"] for row in found] == ["0001", "0001", "0001", "0003", "0004", "0005"]
  (rule,) = stage.rules()
  kept = [passes(rule, row["copy_similarity"]) for row in found]
  assert kept == [False, True, False, True, True, True]
  assert [row["copy_of"] for row in found] == ["0001", "", "0001", "", "", ""]


def test_a_group_at_any_threshold_has_one_winner_by_the_stored_score():
  """Union-find over the pairs at that threshold, done anew, keeps the same clips."""
  rng = np.random.default_rng(0)
  ids = [f"{i:03d}" for i in range(60)]
  for _ in range(20):
    ranks = rng.permutation(60).tolist()
    edges = {tuple(sorted(rng.choice(60, 2, replace=False).tolist())) for _ in range(70)}
    pairs = {edge: float(rng.choice([0.91, 0.93, 0.95, 0.97, 1.0])) for edge in edges}
    for least in (0.9, 0.94, 0.96, 0.99):
      made = copies.describe(ids, ranks, pairs, least)
      parts = {i: {i} for i in range(60)}
      for (i, j), similarity in pairs.items():
        if similarity >= least and parts[i] is not parts[j]:
          parts[i] |= parts[j]
          for member in parts[j]:
            parts[member] = parts[i]
      winners = {min(part, key=lambda i: ranks[i]) for part in parts.values()}
      kept = {i for i, similarity in enumerate(made["copy_similarity"]) if similarity < least}
      assert kept == winners
      expected = [ids[min(parts[i], key=lambda i: ranks[i])] for i in range(60)]
      assert made["copy_group"] == expected


def test_the_best_has_most_pixels_then_looks_then_length_then_the_smallest_id():
  ranked = table(
    5,
    width=[640, 1280, 640, 640, 640],
    aesthetics=[5.0, 1.0, 6.0, 5.0, 5.0],
    end=[5.0, 5.0, 5.0, 6.0, 5.0],
  )
  assert copies.rank(ranked) == [3, 0, 1, 2, 4]


def test_shifted_and_noisy_hashes_are_found_and_others_are_not():
  rng = np.random.default_rng(0)
  films = rng.integers(0, 256, (40, 24, 32), np.uint8)
  rows = [
    *films,
    noise(rng, films[3], 12),
    films[7][6:],
    noise(rng, films[7][9:], 10),
    films[9][:4],
  ]
  many = table(len(rows), copy_hashes=[stored(row) for row in rows])
  found = copies.Copies(floor=0.9, grouped_at=0.92).score(many).to_pylist()
  groups = [row["copy_group"] for row in found]
  assert groups[40] == groups[3] and groups[41] == groups[42] == groups[7]
  assert groups[43] == groups[9]  # short, but all of it lies on the other
  assert len(set(groups)) == 40
  assert found[40]["copy_similarity"] == pytest.approx(1 - 12 / 256)
  assert found[3]["copy_similarity"] == 0.0  # to a better one: the copy has the larger id
  empty = table(2, copy_hashes=[[], None])
  assert copies.Copies().score(empty)["copy_similarity"].to_pylist() == [0.0, 0.0]


def test_an_overlap_of_less_than_half_is_no_copy():
  rng = np.random.default_rng(0)
  film = rng.integers(0, 256, (20, 32), np.uint8)
  other = np.concatenate([film[12:], rng.integers(0, 256, (12, 32), np.uint8)])
  assert copies.aligned(film, other) < 0.6
  assert copies.aligned(film, film[8:]) == 1.0
  assert copies.aligned(film, film[:0]) == 0.0


def test_blank_frames_make_no_copies():
  rng = np.random.default_rng(0)
  films = rng.integers(0, 256, (6, 12, 32), np.uint8)
  films[:, :8] = 0  # a long fade in
  assert list(copies.near_hashes([*films], 25, 10**6)) == []
  assert copies.aligned(films[0], films[1]) < 0.7
  assert copies.aligned(films[0], films[0][3:]) == 1.0
  assert copies.aligned(films[0][:8], films[1][:8]) == 0.0
  assert hashes.pdq(np.full((64, 96, 3), 16, np.uint8)) == hashes.BLANK
  assert hashes.pdq(rng.integers(0, 256, (64, 96, 3), np.uint8)) != hashes.BLANK


def test_cells_find_what_comparing_all_finds():
  rng = np.random.default_rng(0)
  films = rng.integers(0, 256, (300, 4, 32), np.uint8)
  frames = [*films, *(noise(rng, film, 10) for film in films[:60])]
  everything = set(copies.near_hashes(frames, 25, 10**6))
  assert {(i, 300 + i) for i in range(60)} == everything
  assert len(everything & set(copies.near_hashes(frames, 25, 100))) >= 55
  rows = rng.normal(size=(400, 32)).astype(np.float32)
  rows[200:250] = rows[:50] + 0.01 * rng.normal(size=(50, 32))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  pairs = {(i, j) for i, j, _ in copies.near_vectors(rows, 0.98, 10**6)}
  assert pairs == {(i, 200 + i) for i in range(50)}
  assert {(i, j) for i, j, _ in copies.near_vectors(rows, 0.98, 100)} == pairs


def test_embeddings_are_compared_by_their_cosine(tmp_path):
  """Movie Gen 3.2.1: a cosine of 0.99 is a copy."""
  angles = np.array([0.0, 0.1, 0.5, 0.55])  # cosines of 0.1 and of 0.05: 0.995 and 0.9988
  rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  stage = copies.Copies(by="embedding", grouped_at=0.99, max_similarity=0.99)
  found = stage.score(table(4, copy_embedding=rows.tolist())).to_pylist()
  assert [row["copy_group"] for row in found] == ["0000", "0000", "0002", "0002"]
  assert found[1]["copy_similarity"] == pytest.approx(np.cos(0.1), abs=1e-6)
  with pytest.raises(UserError, match=r"hashes\.model"):
    stage.score(table(2))
  weights = np.float32(np.random.default_rng(0).normal(size=(3, 128)))
  settings = hashes.Hashes(model=write_mean_colour(tmp_path / "sscd.onnx", weights))
  red = np.broadcast_to(np.uint8([250, 20, 20]), (20, 64, 80, 3))
  row = np.array(show(settings, red)["copy_embedding"])
  assert row.shape == (128,) and np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
  assert "onnx" in settings.scorer()


def test_settings_that_cannot_be():
  with pytest.raises(ConfigError, match="floor"):
    copies.Copies(floor=0.9, max_similarity=0.8)
  with pytest.raises(ConfigError, match="per_second"):
    hashes.Hashes(per_second=9.0)


def test_hashes_withstand_another_encoding_and_brightness_and_not_a_mirror():
  world = marbles.WorldConfig(backgrounds=("noisy",), sizes=("large",), min_objects=2)
  films = [marbles.render(marbles.sample_scene(i, world), 48, 96, 160, FPS) for i in range(4)]

  def hashed(video, **options):
    again = media.read_video(media.encode_video(video, FPS, **options)) if options else video
    row = show(hashes.Hashes(), again, FPS)["copy_hashes"]
    return np.frombuffer(b"".join(row), np.uint8).reshape(-1, 32)

  rows = [hashed(film) for film in films]
  assert len(rows[0]) == 16  # 4 a second
  for film, row in zip(films, rows, strict=True):
    assert copies.aligned(row, hashed(film, crf=32)) > 0.9
    assert copies.aligned(row, hashed(np.minimum(film, 235) + np.uint8(20))) > 0.9
    assert copies.aligned(row, hashed(film[:, :, ::-1])) < 0.67
  for i in range(4):
    for j in range(i):
      assert copies.aligned(rows[i], rows[j]) < 0.67
