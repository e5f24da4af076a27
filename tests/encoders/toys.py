"""Toy encoders as public files, without torch: random safetensors and a vocabulary made here."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import sentencepiece
from safetensors.numpy import save_file

from mgen_jax.convert import FAMILIES
from mgen_jax.models.clip import ClipTextConfig
from mgen_jax.models.t5 import T5Config
from mgen_jax.weights import rules

T5 = T5Config(300, 24, 2, 2, 8, 40, "gated_silu", dtype="float32")
BYT5 = T5Config(384, 16, 2, 2, 8, 24, "gated_gelu", dtype="float32")
CLIP = ClipTextConfig(97, 16, 2, 2, 24, 77, "quick_gelu", 8, eos=96, dtype="float32")


def tensors(family: str, config: Any, seed: int = 0, dtype: Any = np.float32) -> dict:
  """Random tensors by their public names."""
  rng = np.random.default_rng(seed)
  made = {}
  shapes = rules.boxes(FAMILIES[family], config)
  for rule in FAMILIES[family].rules(config):
    shape = shapes[rule.target].value.shape
    one = rule.their_shape(shape)
    for name in rule.names(shape):
      value = rng.normal(0.0, 0.3, one) + rule.target.endswith("scale")
      made[name] = np.ascontiguousarray(value.astype(dtype))
  return made


def write(
  folder: Path, family: str, config: Any, *, seed: int = 0, dtype: Any = np.float32, shards: int = 1
) -> Path:
  """A folder of safetensors with its config.json, and an index where there are several files."""
  folder.mkdir(parents=True, exist_ok=True)
  made = tensors(family, config, seed, dtype)
  hf = FAMILIES[family].to_hf(config)
  (folder / "config.json").write_text(json.dumps(hf))
  if shards == 1:
    save_file(made, folder / "model.safetensors")
    return folder
  index = {}
  for number in range(shards):
    part = dict(list(made.items())[number::shards])
    name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
    save_file(part, folder / name)
    index |= dict.fromkeys(part, name)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  return folder


def half(family: str, config: Any, seed: int = 0) -> dict:
  """The same in bf16."""
  return tensors(family, config, seed, ml_dtypes.bfloat16)


def vocabulary(folder: Path, texts: Iterable[str], size: int = 300) -> Path:
  """A SentencePiece model of the texts, numbered like T5's: 0 pads, 1 ends, 2 is unknown."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    vocab_size=size,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  path = folder / "spiece.model"
  path.write_bytes(model.getvalue())
  return path
