"""Texts become numbers whatever they hold; prompts are put together as the paper says."""

import dataclasses
import logging

import numpy as np
import pytest

from mgen_jax import encoders
from mgen_jax.data import prompts
from mgen_jax.data.prompts import Prompt
from mgen_jax.encoders import tokenizers
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import clip
from tests.encoders import toys

HARD = [
  "",
  " ",
  "a" * 100_000,
  "word " * 20_000,
  "🎬 a 👩‍👩‍👧 family",
  "دائرة حمراء تتحرك",
  'an "unpaired quote',
  "a\0b",
  "half a pair: \ud83d",
  "\u202e turned",
]
CAPTIONS = [f"a {c} {s} moves {d}" for c in ("red", "blue") for s in ("circle", "star") for d in
            ("left", "right", "up", "down")]  # fmt: skip


def bpe(folder):
  """A tokenizer.json like CLIP's, trained here."""
  library = pytest.importorskip("tokenizers")
  made = library.Tokenizer(library.models.BPE(unk_token="<|end|>"))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = library.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=["<|start|>", "<|end|>"],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(CAPTIONS, trainer)
  made.post_processor = library.processors.TemplateProcessing(
    single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 0), ("<|end|>", 1)]
  )
  made.save(str(folder / "tokenizer.json"))
  return tokenizers.BpeTokenizer(folder / "tokenizer.json")


@pytest.fixture(params=["bytes", "sentencepiece", "bpe"])
def tokenizer(request, tmp_path):
  if request.param == "bytes":
    return tokenizers.ByteTokenizer()
  if request.param == "bpe":
    return bpe(tmp_path)
  return tokenizers.SentencePieceTokenizer(toys.vocabulary(tmp_path, CAPTIONS, 60))


@pytest.mark.parametrize("text", HARD, ids=[f"{text[:8]!r}" for text in HARD])
def test_every_text_becomes_tokens_that_the_model_has(tokenizer, text):
  batcher = tokenizers.Batcher(tokenizer)
  tokens = batcher([text, "a red circle"], 24)
  assert tokens.ids.shape == tokens.mask.shape == (2, 24)
  assert tokens.ids.dtype == np.int32
  assert tokens.ids.min() >= 0 and tokens.ids.max() < tokenizer.size
  assert tokens.mask[0].any()
  last = tokens.ids[0][tokens.mask[0]][-1]
  assert last == tokenizer.end  # however the text was cut
  assert (tokens.ids[~tokens.mask] == tokenizer.pad).all()


def test_what_is_cut_is_counted_and_said_once(tokenizer, caplog):
  caplog.set_level(logging.WARNING)
  batcher = tokenizers.Batcher(tokenizer, "toy")
  long = "a blue star moves up " * 20
  assert batcher([long, "", long], 8).cut == 2
  batcher([long], 8)
  assert batcher.cut == 3
  assert caplog.text.count("toy: a text of") == 1


def test_bytes_are_those_of_byt5():
  batcher = tokenizers.Batcher(tokenizers.ByteTokenizer())
  tokens = batcher(["", "hé"], 6)
  assert tokens.ids.tolist() == [[1, 0, 0, 0, 0, 0], [107, 198, 172, 1, 0, 0]]
  assert tokens.mask.sum(1).tolist() == [1, 4]


def test_bytes_equal_the_public_tokenizer():
  transformers = pytest.importorskip("transformers")
  theirs = transformers.ByT5Tokenizer()
  mine = tokenizers.ByteTokenizer()
  for text in ("", "a red circle", "émoji 🎬", "دائرة"):
    assert mine.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('a sign says "OPEN" and "24 h"', "OPEN 24 h"),
    ("a sign says “OPEN”", "OPEN"),
    ("un panneau «OUVERT»", "OUVERT"),
    ("它说「开」", "开"),
    ('an "unpaired quote', ""),
    ('two "pairs" and "one', "pairs"),
    ("it's the dog's", ""),
    ('""', ""),
    ("", ""),
  ],
)
def test_byt5_reads_what_is_quoted(text, said):
  assert prompts.quoted(text) == said


def test_what_stands_before_a_caption():
  compose = prompts.compose
  assert compose(Prompt("a cat", 16.0), fps_prefix=True) == "FPS-16 a cat"
  assert compose(Prompt("a cat", 23.976, "zoom in"), fps_prefix=True) == "FPS-24 zoom in. a cat"
  assert compose(Prompt("a cat", 0.0), fps_prefix=True) == "a cat"  # an image
  assert compose(Prompt("a cat", 16.0, "pan left"), fps_prefix=False) == "pan left. a cat"
  assert compose(Prompt("  ", 16.0, "pan left"), fps_prefix=True) == ""  # no condition
  assert prompts.reads("quoted", Prompt('a "b"', 16.0), fps_prefix=True) == "b"


# One line for a list of prompts.


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
  folder = toys.write(tmp_path_factory.mktemp("t5"), "t5", toys.T5)
  toys.vocabulary(folder, CAPTIONS, 60)
  return encoders.load("any", folder)


def test_a_motion_of_the_camera_is_one_of_the_classes_of_curation():
  assert prompts.camera_motion(" Pan  LEFT", "--camera") == "pan left"
  with pytest.raises(UserError, match=r"--camera=zoom inn .*: did you mean zoom in or zoom out"):
    prompts.camera_motion("zoom inn", "--camera")
  with pytest.raises(UserError, match=r"known: arc shot, .*zoom out"):
    prompts.camera_motion("xyz", "--camera")
  camera = pytest.importorskip("data_pipelines.curate.stages.camera", exc_type=ImportError)
  assert prompts.CAMERA_MOTIONS == camera.CLASSES


def test_a_list_of_prompts_is_embedded_in_one_line(t5):
  made = t5(CAPTIONS[:5])
  length = made.mask.shape[1]
  assert length % 16 == 0 and made.features.shape == (5, length, 24)
  assert made.mask.sum(1).max() > length - 16
  alone = t5(CAPTIONS[1:2], length=48)
  count = made.mask[1].sum()
  np.testing.assert_allclose(alone.features[0, :count], made.features[1, :count], atol=1e-5)
  assert made.pooled is None


def test_tokens_that_are_there_already_are_embedded_as_the_texts_are(t5):
  made = t5(CAPTIONS[:3], length=32)
  tokens = t5.batcher(CAPTIONS[:3], 32)
  again = t5.embed_tokens(tokens.ids, tokens.mask, batch=2)
  np.testing.assert_allclose(again.features[tokens.mask], made.features[tokens.mask], atol=1e-5)


def test_hard_prompts_give_finite_features(t5):
  made = t5(HARD, length=16)
  assert np.isfinite(made.features).all() and made.mask.any(1).all()


def test_a_text_tower_gives_pooled_vectors(tmp_path):
  tokenizer = bpe(tmp_path)
  config = dataclasses.replace(toys.CLIP, vocab=tokenizer.size, eos=1)
  encoder = encoders.load("any", toys.write(tmp_path, "clip_text", config))
  made = encoder(["a red circle", "a blue star moves up " * 50])
  assert made.features.shape[0] == 2 and made.features.shape[1] <= 77
  assert made.pooled.shape == (2, 16) and made.projected.shape == (2, 8)
  with pytest.raises(UserError, match="reads 1 to 77"):
    encoder(["x"], length=78)
  with pytest.raises(ConfigError, match="does not hold the token 1"):
    clip.check_ends(encoder.config, np.array([[1, 2], [3, 4]]))


def test_images_of_any_size_are_embedded(tmp_path):
  config = clip.ClipVisionConfig(28, 7, 16, 2, 2, 24, projection=8, dtype="float32")
  encoder = encoders.load("any", toys.write(tmp_path, "clip_vision", config))
  image = np.zeros((40, 60, 3), np.uint8)
  image[:, 30:] = 200
  made = encoder.embed_images([image, image[:30, ::-1]])
  assert made.projected.shape == (2, 8) and np.isfinite(made.features).all()
  for wrong in (image[..., 0], image.astype(np.float32)):
    with pytest.raises(UserError, match="uint8"):
      encoder.embed_images([wrong])
  with pytest.raises(UserError, match="embed_images"):
    encoder(["a text"])


def test_what_cannot_be_embedded_is_said(t5, tmp_path):
  for call, words in (
    (lambda: t5("a text"), "a list of prompts"),
    (lambda: t5([]), "no prompts"),
    (lambda: t5(["a", None]), "None is not a text"),
    (lambda: t5(["a"], length=0), "length 0 cannot be used: .* reads 1 or more"),
    (lambda: t5.embed_images([]), "reads texts"),
    (lambda: t5.generate(["a"], 3), "only a LLaMA"),
    (lambda: encoders.load("any", tmp_path / "none"), "is not a folder"),
    (lambda: encoders.load("any", tmp_path, dtype="float16"), "dtype 'float16'"),
  ):
    with pytest.raises(UserError, match=words):
      call()


def test_a_missing_vocabulary_names_the_file_to_get(tmp_path):
  toys.write(tmp_path, "t5", toys.T5)
  with pytest.raises(UserError, match=r"put spiece\.model of google/ul2 there"):
    tokenizers.open_tokenizer(tmp_path, 300, "spiece.model of google/ul2")
  toys.vocabulary(tmp_path, CAPTIONS, 60)
  with pytest.raises(UserError, match="belongs to another model"):
    tokenizers.open_tokenizer(tmp_path, 20, None)
  (tmp_path / "spiece.model").write_bytes(b"nonsense")
  with pytest.raises(UserError, match="is not a SentencePiece model"):
    tokenizers.open_tokenizer(tmp_path, 300, None)
