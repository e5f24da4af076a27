"""Where the text of a generator comes from: bytes encoded on the way, or features made before.

Each way is a config and a class with the same methods; `make` joins them. What they hand to the
backbone is the same: for each text encoder features [B, S, width] and a mask [B, S], True where
there is text. Not here: the encoders themselves (`models/text.py`; those of the paper, UL2,
MetaCLIP and ByT5, run before training and leave their features in the records).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import text as text_lib
from mgen_jax.tasks.base import ArraySpec

Rows = dict[str, Any]  # the entries of a batch that are text


@dataclasses.dataclass(frozen=True)
class ByteTextConfig(text_lib.ByteEncoderConfig):
  """Captions as bytes, through an encoder that is trained with the generator."""

  kind: str = "bytes"

  @property
  def widths(self) -> tuple[int, ...]:
    """Of the features, one for each encoder."""
    return (self.width,)

  @property
  def lengths(self) -> tuple[int, ...]:
    """Features of one text, one for each encoder."""
    return (self.features,)


@dataclasses.dataclass(frozen=True)
class FeatureTextConfig:
  """Features of frozen encoders, made before training and read from the records.

  A record holds an array "text_NAME" [S, width] for each encoder, S up to the length given here and
  0 where an encoder has nothing to say (ByT5 reads only text in quotation marks). The paper gives
  the widths and MetaCLIP's 256; 300 and 100 are those of mindone's re-implementation.
  """

  kind: str = "features"
  names: tuple[str, ...] = ("ul2", "metaclip", "byt5")
  widths: tuple[int, ...] = (4096, 1280, 1472)
  lengths: tuple[int, ...] = (300, 256, 100)

  def __post_init__(self):
    if not len(self.names) == len(self.widths) == len(self.lengths) > 0:
      raise ConfigError(
        f"names {self.names}, widths {self.widths} and lengths {self.lengths} must have one entry "
        "for each text encoder."
      )


CONFIGS = {"bytes": ByteTextConfig, "features": FeatureTextConfig}


class TextInputs(Protocol):
  """What a generator needs of its text."""

  names: tuple[str, ...]  # of the entries of the batch

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with logical axis names; None if nothing is trained."""

  def context(self, params: Any, rows: Rows) -> tuple[list[jax.Array], list[jax.Array]]:
    """Features [B, S, width] and masks [B, S], one for each encoder."""

  def drop(self, rows: Rows, drop: jax.Array) -> Rows:
    """The rows with the empty text where `drop` [B] is True."""

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    """The entries of a batch."""

  def flops(self) -> int:
    """Of one forward pass over one text."""

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """The entries of one row, from a record."""

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts as the rows "tokens"; raises UserError where prompts cannot be read."""


class ByteText:
  """See `ByteTextConfig`."""

  names = ("tokens",)

  def __init__(self, config: ByteTextConfig):
    self.config = config
    self._encoder = text_lib.ByteEncoder(config)

  def init(self, key: jax.Array) -> Any:
    return self._encoder.init(key, jnp.ones((1, 1), jnp.int32))["params"]

  def context(self, params: Any, rows: Rows) -> tuple[list[jax.Array], list[jax.Array]]:
    features, mask = self._encoder.apply({"params": params}, rows["tokens"])
    return [features], [mask]

  def drop(self, rows: Rows, drop: jax.Array) -> Rows:
    return {"tokens": text_lib.drop_captions(rows["tokens"], drop)}

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    shape = (examples, self.config.max_length)
    return {"tokens": ArraySpec(shape, np.int32, ("batch", "context_tokens"))}

  def flops(self) -> int:
    return sum(text_lib.flops(self.config, self.config.max_length).values())

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"tokens": self.tokenize([example["caption"]])[0]}

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    return text_lib.encode_bytes(prompts, self.config.max_length)


class FeatureText:
  """See `FeatureTextConfig`.

  The empty text is one token of zeros for each encoder. The LayerNorm behind each projection turns
  it into its bias, so that the model learns what "no text" is.
  """

  def __init__(self, config: FeatureTextConfig):
    self.config = config
    self._arrays = tuple(f"text_{name}" for name in config.names)
    self.names = (*self._arrays, *(f"{name}_mask" for name in self._arrays))

  def init(self, key: jax.Array) -> Any:
    del key  # the encoders are frozen and not here

  def context(self, params: Any, rows: Rows) -> tuple[list[jax.Array], list[jax.Array]]:
    del params
    masks = [rows[f"{name}_mask"] for name in self._arrays]
    nothing = ~jnp.concatenate(masks, 1).any(1)  # attention needs something to attend to
    rows = self.drop(rows, nothing)
    return [rows[name] for name in self._arrays], [rows[f"{name}_mask"] for name in self._arrays]

  def drop(self, rows: Rows, drop: jax.Array) -> Rows:
    made = {}
    for name in self._arrays:
      features, mask = rows[name], rows[f"{name}_mask"]
      first = jnp.arange(mask.shape[1]) == 0
      made[name] = jnp.where(drop[:, None, None], jnp.zeros((), features.dtype), features)
      made[f"{name}_mask"] = jnp.where(drop[:, None], first, mask)
    return made

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    cfg, specs = self.config, {}
    for name, length, width in zip(self._arrays, cfg.lengths, cfg.widths, strict=True):
      axes = ("batch", "context_tokens", None)
      specs[name] = ArraySpec((examples, length, width), jnp.bfloat16, axes)
      specs[f"{name}_mask"] = ArraySpec((examples, length), np.bool_, axes[:2])
    return specs

  def flops(self) -> int:
    return 0

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    cfg, row = self.config, {}
    for name, length, width in zip(self._arrays, cfg.lengths, cfg.widths, strict=True):
      if name not in example:
        raise UserError(
          f"the records hold no text features {name!r}: write the features of the text encoders "
          'beside the latents, or set task.text to {"kind": "bytes"}.'
        )
      found = np.asarray(example[name])
      if found.ndim != 2 or found.shape[1] != width:
        raise UserError(
          f"the records hold {name!r} of shape {found.shape}: the model takes [length, {width}]."
        )
      count = min(length, found.shape[0])
      row[name] = np.zeros((length, width), jnp.bfloat16)
      row[name][:count] = found[:count]
      row[f"{name}_mask"] = np.arange(length) < count
    return row

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    raise UserError(
      f"this model reads the features of {', '.join(self.config.names)}, which are not part of it: "
      f"it cannot draw from the prompt {prompts[0]!r} itself."
    )


def make(config: ByteTextConfig | FeatureTextConfig) -> TextInputs:
  """The text of a generator, by its config."""
  return ByteText(config) if isinstance(config, ByteTextConfig) else FeatureText(config)
