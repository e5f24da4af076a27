"""Stages that know no frame: size, aspect, mixes, buckets, concepts, people."""

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("pyarrow", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("faiss", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")

import pyarrow as pa

from data_pipelines.curate import columns, draws
from data_pipelines.curate.recipe import passes
from data_pipelines.curate.stages import aspect, buckets, concepts, humans, resolution
from mgen_jax.errors import ConfigError, UserError

IDS = [f"clip {i}" for i in range(2000)]


def test_a_draw_depends_on_its_clip_alone():
  draw = draws.uniform(0, "x", IDS)
  assert draws.uniform(0, "x", IDS[::-1]).tolist() == draw[::-1].tolist()
  assert draw.min() >= 0 and draw.max() < 1 and abs(draw.mean() - 0.5) < 0.02
  for other in (draws.uniform(1, "x", IDS), draws.uniform(0, "y", IDS)):
    assert abs(np.corrcoef(draw, other)[0, 1]) < 0.1


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("wide", [100, 1000, 1900])
def test_the_mix_is_reached_by_thinning_the_side_that_is_too_many(share, wide):
  table = pa.table({"clip_id": IDS, "aspect": [1.78] * wide + [0.56] * (2000 - wide)})
  stage = aspect.AspectMix(landscape=share)
  kept = stage.score(table)["in_aspect_mix"].to_numpy()
  landscape = np.arange(2000) < wide
  assert abs(kept[landscape].sum() / kept.sum() - share) < 0.005
  too_many = landscape if wide / 2000 > share else ~landscape
  assert kept[~too_many].all() and not kept[too_many].all()
  order = np.random.default_rng(0).permutation(2000)
  assert stage.score(table.take(order))["in_aspect_mix"].to_numpy().tolist() == kept[order].tolist()


def test_a_mix_of_one_kind_alone_keeps_all():
  table = pa.table({"clip_id": IDS, "aspect": [1.0] * 2000})  # a square is landscape
  assert aspect.AspectMix(landscape=0.6).score(table)["in_aspect_mix"].to_numpy().all()
  with pytest.raises(ConfigError, match="min_aspect=1"):
    aspect.AspectMix(landscape=1.0)


def test_both_sides_must_be_large_enough():
  stage = resolution.Resolution(min_side=768)
  (rule,) = stage.rules()
  for size, right in (((1280, 768), True), ((767, 2000), False), ((768, 768), True)):
    score = stage.score({"width": size[0], "height": size[1]})
    assert passes(rule, score["short_side"]) is right
  assert stage.score({"width": None, "height": None}) == {"short_side": None}


def _row(seconds, fps, width=1280, height=720):
  return {"width": width, "height": height, "fps": fps, "start": 2.0, "end": 2.0 + seconds}


@pytest.mark.parametrize(
  ("seconds", "fps", "bucket", "rate"),
  [
    (10.8, 24.0, "256x576x1024", 24.0),  # the middle 10.67 s
    (10.8, 20.0, "192x576x1024", 17.78),  # too slow for 256 frames
    (16.0, 16.0, "256x576x1024", 16.0),
    (13.0, 24.0, "256x576x1024", 19.69),
    (12.5, 20.0, "", None),  # 256 frames would have to repeat
    (8.0, 30.0, "192x576x1024", 24.0),
    (9.0, 23.976, "192x576x1024", 21.33),
    (4.0, 60.0, "128x576x1024", 32.0),
    (4.0, 30.0, "", None),
    (5.4, 24.0, "128x576x1024", 23.7),
    (3.5, 60.0, "", None),
    (17.0, 60.0, "", None),
  ],
)
def test_the_table_of_lengths_and_rates(seconds, fps, bucket, rate):
  """Movie Gen, Table 2."""
  stage = buckets.Buckets()
  found = stage.score(_row(seconds, fps))
  assert found["bucket"] == bucket
  if not bucket:
    assert found["bucket_frames"] == 0 and found["bucket_fps"] is None
    assert passes(stage.rules()[0], found["bucket_frames"]) is False
    return
  assert found["bucket_fps"] == pytest.approx(rate, abs=0.01)
  assert found["bucket_frames"] / found["bucket_seconds"] == pytest.approx(found["bucket_fps"])
  assert found["bucket_start"] == pytest.approx((seconds - found["bucket_seconds"]) / 2)


def test_an_image_has_the_five_sizes_too():
  row = {"width": 1000, "height": 1010, "fps": 0.0, "start": None, "end": None}
  found = buckets.Buckets().score(row)
  assert found["bucket"] == "1x768x768" and found["bucket_frames"] == 1
  assert found["bucket_fps"] == 0.0 and found["crop_loss"] < 0.01


def test_columns_of_lists_become_arrays():
  rows = [[1.0, 2.0], None, [3.0, 4.0], None]
  there, found = columns.vectors(pa.chunked_array([rows[:1], rows[1:]], pa.list_(pa.float32())))
  assert there.tolist() == [0, 2] and found.tolist() == [[1, 2], [3, 4]]
  hashes = [[b"ab", b"cd"], None, [], [b"ef"]]
  kind = pa.list_(pa.binary(2))
  for column in (
    pa.chunked_array([hashes], kind),
    pa.chunked_array([hashes[:2], hashes[2:]], kind),
    pa.chunked_array([[[b"xx"], *hashes]], kind).slice(1),
  ):
    found = columns.byte_rows(column, 2)
    assert [b"".join(map(bytes, row)) for row in found] == [b"abcd", b"", b"", b"ef"]
  assert columns.byte_rows(pa.chunked_array([], kind), 2) == []


def test_a_clip_goes_to_the_nearest_aspect_and_far_ones_fall_out():
  stage = buckets.Buckets()
  for width, height, size in (
    (1920, 1080, "576x1024"), (1080, 1920, "1024x576"), (800, 800, "768x768"),
    (1024, 768, "672x896"), (768, 1024, "896x672"), (2048, 858, "576x1024"),
  ):  # fmt: skip
    found = stage.score(_row(8.0, 30.0, width, height))
    assert found["bucket"] == f"192x{size}"
  assert found["crop_loss"] == pytest.approx(1 - (1024 / 576) / (2048 / 858))
  assert passes(stage.rules()[1], found["crop_loss"]) is False
  with pytest.raises(ConfigError, match="lengths"):
    buckets.Buckets(lengths=((4.0, 8.0, 128, 5.0),))


def _clusters(sizes, width=16, spread=0.02):
  rng = np.random.default_rng(0)
  centres = np.linalg.qr(rng.normal(size=(width, width)))[0][: len(sizes)]
  truth = np.repeat(np.arange(len(sizes)), sizes)
  rows = centres[truth] + spread * rng.normal(size=(len(truth), width))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return np.float32(rows), truth


def test_clusters_are_found_whatever_the_number_asked_for_and_halves_are_merged():
  rows, truth = _clusters([300, 60, 40])
  found = concepts.cluster(rows, 12, 20, 0.9)
  pairs = {(int(a), int(b)) for a, b in zip(truth, found, strict=True)}
  assert len(pairs) == 3 and len({b for _, b in pairs}) == 3
  assert found[0] == 0  # numbered by first member
  assert concepts.cluster(rows, 12, 20, 0.9).tolist() == found.tolist()


def test_large_clusters_are_thinned_by_the_root_of_their_size():
  sizes = np.array([10_000, 2_500, 100, 1])
  shares = concepts.inverse_root(sizes, 0.5 * sizes.sum())
  assert (shares * sizes).sum() == pytest.approx(0.5 * sizes.sum())
  assert shares[1] / shares[0] == pytest.approx(2.0)  # a quarter of the size
  assert shares[2] == shares[3] == 1
  assert concepts.inverse_root(sizes, 20_000).tolist() == [1, 1, 1, 1]


def test_resampling_keeps_the_share_and_spares_people():
  rows, truth = _clusters([1600, 300, 100])
  human = np.where(np.arange(2000) % 4 == 0, 0.9, 0.0)
  table = pa.table({"clip_id": IDS, "embedding": rows.tolist(), "human": human})
  stage = concepts.Concepts(clusters=6, keep=0.6, spare_humans=0.5)
  kept = stage.score(table)["in_concepts"].to_numpy()
  assert abs(kept.mean() - 0.6) < 0.03
  assert kept[human > 0.5].all()
  free = human < 0.5
  rates = [kept[free & (truth == c)].mean() for c in range(3)]
  assert rates[0] < rates[1] < rates[2] == 1
  table = table.set_column(1, "embedding", pa.nulls(2000, pa.list_(pa.float32())))
  blind = stage.score(table)
  assert set(blind["cluster"].to_pylist()) == {-1} and blind["in_concepts"].to_numpy().all()


def test_people_get_their_share_and_none_of_them_goes():
  human = np.where(np.arange(2000) < 300, 1.0, 0.0)
  table = pa.table({"clip_id": IDS, "human": human})
  kept = humans.HumanShare(share=0.6).score(table)["in_human_share"].to_numpy()
  assert kept[:300].all() and abs(human[kept].mean() - 0.6) < 0.01
  enough = humans.HumanShare(share=0.1).score(table)["in_human_share"].to_numpy()
  assert enough.all()


def test_verbs_find_people_in_the_space_of_the_embedding(tmp_path):
  rng = np.random.default_rng(0)
  verbs = {f"verb {i}": np.float32(rng.normal(size=64)) for i in range(20)}
  save_file(verbs, tmp_path / "verbs.safetensors")
  stage = humans.Humans(verbs=str(tmp_path / "verbs.safetensors"), verb_cosine=0.8)
  clip = verbs["verb 7"] / np.linalg.norm(verbs["verb 7"])
  found = stage.score({"faces": 0.0, "embedding": clip.tolist()})
  assert found["verb"] == "verb 7" and found["human"] == 1.0
  assert found["verb_similarity"] == pytest.approx(1.0, abs=1e-5)
  far = stage.score({"faces": 1 / 3, "embedding": (-clip).tolist()})
  assert 1 / 3 <= far["human"] < 1
  with pytest.raises(UserError, match="one video-text model"):
    stage.score({"faces": 0.0, "embedding": [1.0, 0.0]})
  assert humans.Humans().score({"faces": 2 / 3, "embedding": None})["human"] == 2 / 3
