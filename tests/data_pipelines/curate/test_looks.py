"""Stages that look at a few frames: text, looks, embeddings; and networks from files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

import cv2

from data_pipelines.curate import models
from data_pipelines.curate.recipe import passes
from data_pipelines.curate.stages import aesthetics, embedding, humans, sampling, text
from mgen_jax.data import marbles
from mgen_jax.data.marbles import defects
from mgen_jax.errors import ConfigError, UserError
from tests.data_pipelines.curate.looking import show
from tests.data_pipelines.curate.onnx_file import write_mean_colour

WORLD = marbles.WorldConfig(motions=("moves left", "moves right"), sizes=("large",))


def test_frames_are_taken_in_the_middle_of_equal_parts():
  taker = sampling.Taker(sampling.spread(3, 6.0))
  taken = [time for time in np.arange(0, 6, 0.4) if taker.wants(float(time))]
  assert taken == pytest.approx([1.2, 3.2, 5.2])
  once = sampling.Taker([0.1, 0.2, 5.0])  # one frame for two times, and a time that never comes
  assert [once.wants(t) for t in (0.0, 1.0, 2.0)] == [False, True, False]


class Words:
  """A reader that says what it is told, and keeps what it was asked."""

  def __init__(self, words):
    self.words, self.frames = words, 0

  def read(self, rgb, keep):
    self.frames += 1
    return [word for word in self.words if keep(word.box)]


def word(left, top, right, bottom, said="SALE", detection=0.9, recognition=0.9):
  box = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
  return text.Word(box, said, detection, recognition)


def test_the_score_is_detection_times_recognition_and_coverage_a_union():
  settings, rgb = text.Text(), np.zeros((100, 200, 3), np.uint8)
  words = [word(0, 0, 99, 19, "one", 0.8, 0.7), word(50, 0, 149, 19, "two", 0.5, 0.9)]
  found = text.words(rgb, Words(words), settings)
  assert found == words and text.score(found) == pytest.approx(0.56) and text.score([]) == 0
  assert text.covered(found, 100, 200) == pytest.approx(150 * 20 / 20_000, rel=0.01)
  (rule,) = settings.rules()
  assert passes(rule, 0.6) is False and passes(rule, 0.599) is True


@pytest.mark.parametrize(
  "no_word",
  [
    word(0, 0, 199, 99, "whole"),  # the reader's false find of one sign over the frame
    word(10, 10, 50, 48, "88"),  # a star
    word(10, 10, 90, 30, "一"),
    word(10, 10, 90, 30, "- !"),
  ],
)
def test_what_is_no_word_does_not_count(no_word):
  rgb = np.zeros((100, 200, 3), np.uint8)
  assert text.words(rgb, Words([no_word]), text.Text()) == []


def test_an_overlay_stays_and_what_moves_does_not():
  overlay, moved = word(10, 10, 60, 20), word(100, 50, 150, 60)
  other = word(100, 50, 150, 60, "888")  # in its place, and another sign
  frames = [[overlay, moved], [word(11, 10, 61, 21, "SA1E"), word(140, 80, 190, 90), other], []]
  kept = [[each.box[0].tolist() for each in found] for found in text.lasting(frames, 2)]
  assert kept == [[[10, 10]], [[11, 10]], []]
  assert text.lasting(frames, 1) == frames
  with pytest.raises(ConfigError, match="steady"):
    text.Text(frames=2, steady=3)


def test_a_still_picture_is_read_once(monkeypatch):
  reader = Words([])
  monkeypatch.setitem(text.READERS, "rapidocr", lambda side: reader)
  still = np.zeros((40, 64, 64, 3), np.uint8)
  assert show(text.Text(frames=4), still)["text_frames"] == reader.frames == 1
  changing = np.repeat(np.arange(40, dtype=np.uint8) * 6, 64 * 64 * 3).reshape(still.shape)
  assert show(text.Text(frames=4), changing)["text_frames"] == 4
  assert show(text.Text(steady=2), still)["text_frames"] == 3
  assert show(text.Text(), still[:0])["text_score"] is None  # nothing was seen: no score


def test_rapidocr_reads_overlays_and_leaves_shapes_alone():
  settings = text.Text(frames=1)
  for seed in range(4):
    scene = marbles.sample_scene(seed, WORLD)
    clip = defects.plant("text_overlay", scene, 2, 144, 256, 8.0, seed)
    found = show(settings, clip.frames, fps=8.0)
    assert found["text_score"] > 0.5
    letters = "".join(c for c in clip.details["text"] if c.isalnum())
    assert "".join(c for c in found["text_found"] if c.isalnum()) == letters
    assert found["text_coverage"] > 0.02
    clean = show(settings, marbles.render(scene, 2, 144, 256, 8.0), fps=8.0)
    assert clean["text_score"] < 0.5
  assert settings.scorer().startswith("rapidocr 3.")
  with pytest.raises(ConfigError, match="known: rapidocr"):
    text.Text(reader="tesseract")


def test_without_weights_the_blurred_and_pale_look_worse():
  settings = aesthetics.Aesthetics()
  for seed in range(6):
    video = marbles.render(marbles.sample_scene(seed, WORLD), 3, 96, 160, 2.0)
    blurred = np.stack([cv2.GaussianBlur(f, (0, 0), 6) for f in video])
    pale = (110 + 0.2 * (blurred.astype(np.float32) - 110)).astype(np.uint8)
    good, dim = show(settings, video, 2.0), show(settings, pale, 2.0)
    assert 1 <= dim["aesthetics"] < 3.5 < 5 < good["aesthetics"] <= 10
    assert dim["sharpness"] < good["sharpness"] and dim["contrast"] < good["contrast"]
  assert show(settings, video[:0])["aesthetics"] is None
  assert "sharpness" in settings.scorer()


def test_only_the_middle_frame_is_judged():
  video = np.zeros((20, 32, 32, 3), np.uint8)
  video[10] = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  assert show(aesthetics.Aesthetics(), video)["contrast"] > 40
  assert show(aesthetics.Aesthetics(), np.roll(video, 1, axis=0))["contrast"] == 0


def _clip_and_head(tmp_path, width=128):
  rng = np.random.default_rng(0)
  weights = np.float32(rng.normal(size=(3, width)))
  tower = write_mean_colour(tmp_path / "clip.onnx", weights)
  layers = {}
  for number, (into, out) in {0: (width, 8), 2: (8, 4), 7: (4, 1)}.items():
    layers[f"layers.{number}.weight"] = np.float32(rng.normal(size=(out, into)))
    layers[f"layers.{number}.bias"] = np.float32(rng.normal(size=out))
  save_file(layers, tmp_path / "head.safetensors")
  return weights, layers, tower, str(tmp_path / "head.safetensors")


def test_with_weights_the_predictor_is_clip_and_its_head(tmp_path):
  weights, layers, tower, head = _clip_and_head(tmp_path)
  settings = aesthetics.Aesthetics(clip=tower, head=head)
  colour = np.uint8([200, 30, 90])
  video = np.broadcast_to(colour, (4, 40, 60, 3))
  row = ((colour / 255 - models.CLIP_MEAN) / models.CLIP_STD) @ weights
  row /= np.linalg.norm(row)
  for number in (0, 2, 7):
    row = layers[f"layers.{number}.weight"] @ row + layers[f"layers.{number}.bias"]
  assert show(settings, video)["aesthetics"] == pytest.approx(float(row[0]), abs=1e-3)
  assert settings.scorer() == f"laion {models.fingerprint(tower)} {models.fingerprint(head)}"
  with pytest.raises(ConfigError, match="give both files"):
    aesthetics.Aesthetics(clip=tower)


def test_networks_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
  _, _, tower, head = _clip_and_head(tmp_path)
  small = write_mean_colour(tmp_path / "small.onnx", np.ones((3, 96), np.float32))
  picture = [np.zeros((8, 8, 3), np.uint8)]
  with pytest.raises(UserError, match="not a pair"):
    aesthetics.predict(small, head, picture)
  (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
  (tmp_path / "noise.onnx").write_bytes(bytes(range(256)) * 8)
  for path, said in (
    (tmp_path / "none.onnx", "no file"),
    (tmp_path / "pointer.onnx", "git-lfs"),
    (tmp_path / "noise.onnx", "no ONNX network"),
  ):
    with pytest.raises(UserError, match=said):
      models.ImageModel(str(path), models.CLIP_MEAN, models.CLIP_STD)
  with pytest.raises(UserError, match="YuNet"):
    show(humans.Faces(model=str(tmp_path / "noise.onnx")), np.zeros((2, 64, 64, 3), np.uint8))
  with pytest.raises(UserError, match="no safetensors"):
    models.Head(tower)
  save_file({"layers.0.weight": np.zeros((4, 600), np.float32)}, tmp_path / "odd.safetensors")
  with pytest.raises(UserError, match="chain that ends in 1"):
    models.Head(str(tmp_path / "odd.safetensors"))


def test_embeddings_have_length_one_and_tell_worlds_apart(tmp_path):
  weights = np.float32(np.random.default_rng(0).normal(size=(3, 128)))
  tower = write_mean_colour(tmp_path / "tower.onnx", weights)
  worlds = {
    ground: marbles.WorldConfig(backgrounds=(ground,), motions=("moves left",))
    for ground in ("white", "noisy")
  }
  for settings in (embedding.Embedding(), embedding.Embedding(model=tower)):
    rows = {
      (ground, seed): np.array(
        show(settings, marbles.render(marbles.sample_scene(seed, world), 6, 64, 96, 2.0), 2.0)[
          "embedding"
        ]
      )
      for ground, world in worlds.items()
      for seed in range(3)
    }
    assert all(np.linalg.norm(row) == pytest.approx(1, abs=1e-4) for row in rows.values())
    alike = rows["white", 0] @ rows["white", 1]
    assert alike > rows["white", 0] @ rows["noisy", 0]
  assert embedding.Embedding(model=tower).scorer() != embedding.Embedding().scorer()


def test_no_face_is_found_where_there_is_none():
  video = marbles.render(marbles.sample_scene(1, WORLD), 4, 120, 160, 4.0)
  assert show(humans.Faces(), video, 4.0) == {"faces": 0.0, "face_size": 0.0}
  assert "cascade" in humans.Faces().scorer()
