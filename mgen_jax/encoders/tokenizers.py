"""Texts to token numbers: SentencePiece, bytes, and the BPE of a tokenizer.json.

Numpy in and out, for the host. Every tokenizer takes any text: what is not Unicode (a half of a
surrogate pair) becomes "?", a NUL is a character like others. An empty text is the token that ends
a text (LLaMA: the one that begins it). A text that is too long is cut, its end token kept, and
counted; the first cut of a tokenizer is logged.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from absl import logging

from mgen_jax.errors import UserError
from mgen_jax.weights.folders import SENTENCEPIECE_FILES, TOKENIZER_FILE


class Tokens(NamedTuple):
  """Texts as numbers."""

  ids: np.ndarray  # int32 [N, length], padded
  mask: np.ndarray  # bool [N, length], True where there is text
  cut: int  # texts that were too long


class Tokenizer(Protocol):
  """One text as numbers."""

  size: int  # of the vocabulary: numbers are below it
  pad: int
  end: int | None  # closes every text

  def encode(self, text: str) -> list[int]:
    """All tokens of a text, however long, the ones that begin and end it included."""


class ByteTokenizer:
  """ByT5's: byte b of UTF-8 is b + 3; 0 pads, 1 ends, 2 is unused, 125 sentinels follow."""

  size, pad, end = 384, 0, 1

  def encode(self, text: str) -> list[int]:
    return [byte + 3 for byte in text.encode("utf-8", "replace")] + [self.end]


class SentencePieceTokenizer:
  """T5's and UL2's: SentencePiece, then the token that ends the text.

  Raises:
    UserError: the file is not a SentencePiece model, or has no end token.
  """

  def __init__(self, path: Path):
    import sentencepiece  # a shared library: loaded where it is used

    self._path = path
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
      raise UserError(f"{path} is not a SentencePiece model: get the file anew.") from error
    self.size = self._model.vocab_size()
    self.pad = max(0, self._model.pad_id())
    self.end = self._model.eos_id()
    if self.end < 0:
      raise UserError(f"{path} has no token that ends a text: it is not the model of a T5.")

  def encode(self, text: str) -> list[int]:
    return [*self._model.encode(text), self.end]


class BpeTokenizer:
  """The tokenizer.json of a Hugging Face folder (CLIP, LLaMA), with the tokens it adds itself.

  Raises:
    UserError: the package `tokenizers` is missing, or the file cannot be used.
  """

  pad = 0

  def __init__(self, path: Path):
    if importlib.util.find_spec("tokenizers") is None:
      raise UserError(f'{path} needs the package tokenizers: pip install "mgen_jax[encoders]".')
    import tokenizers

    try:
      self._model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
      raise UserError(f"{path} is not a tokenizer ({error}): get the file anew.") from error
    self._model.no_truncation()
    self._model.no_padding()
    self.size = self._model.get_vocab_size(with_added_tokens=True)
    empty = self._model.encode("").ids
    closes = bool(empty) and self._model.encode("a").ids[-1] == empty[-1]
    self.end = empty[-1] if closes else None

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text).ids


class Batcher:
  """Texts as arrays of one length; counts what was cut."""

  def __init__(self, tokenizer: Tokenizer, name: str = "text"):
    self.tokenizer, self.name = tokenizer, name
    self.cut = 0  # texts that were too long, so far

  def encode(self, text: str, length: int | None = None) -> tuple[list[int], bool]:
    """The tokens of a text, up to `length`, and whether there were more."""
    ids = self.tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"))
    if length is None or len(ids) <= length:
      return ids, False
    if not self.cut:
      logging.warning(
        "%s: a text of %d tokens was cut to %d; further cuts are counted",
        self.name,
        len(ids),
        length,
      )
    self.cut += 1
    end = self.tokenizer.end
    return (ids[:length] if end is None else [*ids[: length - 1], end]), True

  def __call__(self, texts: Sequence[str], length: int | None = None) -> Tokens:
    """Tokens [N, length]; without a length as long as the longest text."""
    rows = [self.encode(text, length) for text in texts]
    width = max((len(ids) for ids, _ in rows), default=1) if length is None else length
    ids = np.full((len(rows), width), self.tokenizer.pad, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for row, (found, _) in enumerate(rows):
      ids[row, : len(found)] = found
      mask[row, : len(found)] = True
    return Tokens(ids, mask, sum(cut for _, cut in rows))


def kind_of(folder: Path, vocab: int) -> tuple[str, str | None]:
  """Which tokenizer a folder of weights brings: (kind, name of its file).

  Args:
    folder: of the weights.
    vocab: size of the model's; 384 without a file are the bytes of a ByT5.
  """
  for name in SENTENCEPIECE_FILES:
    if (folder / name).is_file():
      return "sentencepiece", name
  if (folder / TOKENIZER_FILE).is_file():
    return "bpe", TOKENIZER_FILE
  return ("bytes", None) if vocab == ByteTokenizer.size else ("missing", None)


def open_tokenizer(folder: Path, vocab: int, wanted: str | None) -> Tokenizer:
  """The tokenizer of a folder.

  Args:
    folder: of the weights.
    vocab: size of the model's vocabulary.
    wanted: which file to get where there is none.

  Raises:
    UserError: there is none, or it is of another model.
  """
  kind, name = kind_of(folder, vocab)
  if kind == "missing":
    file = wanted or f"its {SENTENCEPIECE_FILES[0]} or {TOKENIZER_FILE}"
    raise UserError(f"{folder} has no vocabulary to read texts with: put {file} there.")
  if kind == "bytes":
    return ByteTokenizer()
  path = folder / name
  made = SentencePieceTokenizer(path) if kind == "sentencepiece" else BpeTokenizer(path)
  if made.size > vocab:
    raise UserError(
      f"{path} has {made.size} tokens and the model {vocab}: it belongs to another model."
    )
  return made
