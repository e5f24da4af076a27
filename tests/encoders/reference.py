"""Tiny models of `transformers` with every parameter perturbed, saved as users find them.

Initial norms of one, biases of zero and the like would hide a wrong name. Not a test: skip with
`pytest.importorskip` where torch and transformers are missing.
"""

import os
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

T5 = {
  "vocab_size": 61, "d_model": 36, "d_kv": 8, "d_ff": 50, "num_layers": 3, "num_heads": 3,
}  # fmt: skip
CLIP_TEXT = {
  "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
  "num_attention_heads": 4, "max_position_embeddings": 20, "projection_dim": 24,
  "bos_token_id": 95, "eos_token_id": 96, "pad_token_id": 0,
}  # fmt: skip
CLIP_VISION = {
  "image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 48,
  "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 24,
}  # fmt: skip
LLAMA = {
  "vocab_size": 83, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
  "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip

# Name -> (class of the model, class of its config, keys).
CASES = {
  "t5_v1.0": ("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "relu"}),
  "t5_v1.1": ("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
  "ul2": ("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-silu", "d_kv": 16}),
  "byt5": (
    "T5EncoderModel",
    "T5Config",
    {**T5, "vocab_size": 384, "feed_forward_proj": "gated-gelu"},
  ),
  "umt5": ("UMT5EncoderModel", "UMT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
  "clip_text_quick_gelu": (
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    {**CLIP_TEXT, "hidden_act": "quick_gelu"},
  ),
  "clip_text_gelu": (
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    {**CLIP_TEXT, "hidden_act": "gelu"},
  ),
  "clip_text_bare": ("CLIPTextModel", "CLIPTextConfig", {**CLIP_TEXT, "hidden_act": "gelu"}),
  "clip_vision": (
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    {**CLIP_VISION, "hidden_act": "gelu"},
  ),
  "clip_vision_bare": (
    "CLIPVisionModel",
    "CLIPVisionConfig",
    {**CLIP_VISION, "hidden_act": "quick_gelu"},
  ),
  "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
  # Of its pairs some are slowed, some are not, and some lie between.
  "llama3.1": (
    "LlamaForCausalLM",
    "LlamaConfig",
    {
      **LLAMA,
      "hidden_size": 64,
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
      },
    },
  ),
  "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
}


def make(name: str, **changes):
  """A model of `CASES` in evaluation mode, with random parameters."""
  import torch
  import transformers

  torch.manual_seed(0)
  model, config, keys = CASES[name]
  return perturbed(getattr(transformers, model)(getattr(transformers, config)(**keys, **changes)))


def perturbed(model):
  import torch

  for parameter in model.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
  return model.eval()


def save(model, folder: Path, **options) -> Path:
  """The model's folder, as `save_pretrained` lays it out."""
  model.save_pretrained(folder, **options)
  return folder


def tokens(vocab: int, lengths, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Random ids [N, max(lengths)] with padding on the right, and their mask."""
  rng = np.random.default_rng(seed)
  mask = np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]
  ids = rng.integers(2, vocab, mask.shape) * mask
  return ids.astype(np.int32), mask
