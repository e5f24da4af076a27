"""Frozen encoders of texts and images, with public weights: UL2, T5, ByT5, CLIP, LLaMA.

  from mgen_jax import encoders
  features, mask = encoders.load("ul2", "weights/ul2")(["a red circle moves left"])[:2]

The pieces:

  encoder     one encoder and its tokenizer, for a list of prompts or images
  stack       several that a generator reads together, in the training step or before it
  sizes       encoders by name
  tokenizers  SentencePiece, bytes, BPE
  families    what public files call the parameters of each module

Not here: the modules themselves (`mgen_jax/models`), which know nothing of files; how weights come
in and go out (`mgen_jax/weights`); what is put before a caption, and which part of it is read
(`mgen_jax/data/prompts.py`).
"""

from mgen_jax.data.prompts import Prompt
from mgen_jax.encoders.encoder import Embedded, Encoder, load
from mgen_jax.encoders.stack import StackConfig, TextStack

__all__ = ["Embedded", "Encoder", "Prompt", "StackConfig", "TextStack", "load"]
