"""Encoders by name: their shapes, and how they read a text.

The names are what experiments and `encoders.load` take. Sources of the shapes: the public configs
of google/ul2, google/byt5, google-t5, MetaCLIP and LLaMA; which of them Movie Gen means follows
from the widths in its figure 8: only ByT5-small is 1472 wide, and a text tower is 1280 wide only
beside a ViT-bigG.
"""

import dataclasses
from typing import Any

from mgen_jax.errors import ConfigError, suggest
from mgen_jax.models.clip import ClipTextConfig, ClipVisionConfig
from mgen_jax.models.llama import LlamaConfig
from mgen_jax.models.t5 import T5Config


@dataclasses.dataclass(frozen=True)
class Size:
  """A named encoder.

  Attributes:
    family: of `families.FAMILIES`.
    config: its shape.
    length: tokens of a text that are read by default (of a T5 nothing limits them).
    vocabulary: which file the tokenizer needs, and whose; None: none (bytes, images).
  """

  family: str
  config: Any
  length: int = 512
  vocabulary: str | None = None


def _byt5(width: int, mlp_width: int, layers: int, heads: int) -> Size:
  config = T5Config(384, width, layers, heads, 64, mlp_width, "gated_gelu")
  return Size("t5", config)


def _text(width: int, layers: int, heads: int, positions: int, owner: str) -> Size:
  config = ClipTextConfig(
    width=width,
    layers=layers,
    heads=heads,
    mlp_width=4 * width,
    max_positions=positions,
    projection=width,
    activation="quick_gelu",
  )
  return Size("clip_text", config, positions, f"tokenizer.json of {owner}")


def _vision(width: int, layers: int, mlp_width: int, projection: int, heads: int = 16) -> Size:
  config = ClipVisionConfig(
    width=width,
    layers=layers,
    heads=heads,
    mlp_width=mlp_width,
    projection=projection,
    activation="quick_gelu",
  )
  return Size("clip_vision", config)


_METACLIP = "facebook/metaclip-{}-fullcc2.5b"
_TOWERS = {
  "l": ((768, 12, 12), (1024, 24, 4096, 768), _METACLIP.format("l14")),
  "h": ((1024, 24, 16), (1280, 32, 5120, 1024), _METACLIP.format("h14")),
  "bigg": ((1280, 32, 20), (1664, 48, 8192, 1280), "facebook/metaclip-bigG-14-fullcc2.5b"),
}
_LLAMA = "tokenizer.json of meta-llama/Meta-Llama-3-{}"
_LLAMA_31 = "tokenizer.json of meta-llama/Llama-3.1-{}"
_LONG = {"max_positions": 131_072, "rope_factor": 8.0}

SIZES: dict[str, Size] = {
  "ul2": Size("t5", T5Config(), vocabulary="spiece.model of google/ul2"),
  "t5-base": Size(
    "t5",
    T5Config(32128, 768, 12, 12, 64, 3072, "relu"),
    vocabulary="spiece.model of google-t5/t5-base",
  ),
  "t5-xxl": Size(
    "t5",
    T5Config(32128, 4096, 24, 64, 64, 10240, "gated_gelu"),
    vocabulary="spiece.model of google/t5-v1_1-xxl",
  ),
  "umt5-xxl": Size(
    "t5",
    T5Config(256384, 4096, 24, 64, 64, 10240, "gated_gelu", shared_bias=False),
    vocabulary="spiece.model of google/umt5-xxl",
  ),
  "byt5-small": _byt5(1472, 3584, 12, 6),
  "byt5-base": _byt5(1536, 3968, 18, 12),
  "byt5-large": _byt5(1536, 3840, 36, 16),
  "byt5-xl": _byt5(2560, 6720, 36, 32),
  "byt5-xxl": _byt5(4672, 12352, 36, 64),
  **{f"metaclip-{n}-text": _text(*text, 77, owner) for n, (text, _, owner) in _TOWERS.items()},
  # Long-prompt MetaCLIP, whose weights are not public: the tower above with its table stretched
  # (convert --positions=256) is where its training starts.
  **{f"metaclip-{n}-text-256": _text(*text, 256, owner) for n, (text, _, owner) in _TOWERS.items()},
  **{f"metaclip-{n}-vision": _vision(*vision) for n, (_, vision, _) in _TOWERS.items()},
  "llama3-8b": Size("llama", LlamaConfig(), 8192, _LLAMA.format("8B")),
  "llama3-70b": Size(
    "llama",
    LlamaConfig(width=8192, layers=80, heads=64, mlp_width=28672),
    8192,
    _LLAMA.format("70B"),
  ),
  "llama3.1-8b": Size("llama", LlamaConfig(**_LONG), 8192, _LLAMA_31.format("8B")),
  "llama3.1-70b": Size(
    "llama",
    LlamaConfig(width=8192, layers=80, heads=64, mlp_width=28672, **_LONG),
    8192,
    _LLAMA_31.format("70B"),
  ),
}


def named(name: str) -> Size:
  """The encoder of a name.

  Raises:
    ConfigError: there is none.
  """
  if name not in SIZES:
    raise ConfigError(f"unknown encoder {name!r}: {suggest(name, list(SIZES))}")
  return SIZES[name]
