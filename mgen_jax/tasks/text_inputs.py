"""Where the text of a generator comes from: bytes, trained along, or frozen encoders' features.

Each way is a config and a class with the same methods; `make` joins them. What they hand to the
backbone is the same: for each text encoder features [B, S, width] and a mask [B, S], True where
there is text. The frozen encoders (UL2, MetaCLIP and ByT5 in the paper) run before training and
leave their features in the records, or in the training step. Not here: the encoders themselves
(`models/text.py`; `mgen_jax/encoders`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.encoders import Prompt, StackConfig, TextStack, sizes
from mgen_jax.encoders.stack import ANY
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import text as text_lib
from mgen_jax.tasks import draws
from mgen_jax.tasks.base import ArraySpec

Rows = dict[str, Any]  # the entries of a batch that are text

_BATCH = 32  # prompts that frozen encoders read at a time


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
class FeatureTextConfig(StackConfig):
  """Features of frozen encoders, read from the records or (`online`) made in the training step.

  A record holds an array "text_NAME" [S, width] for each encoder, S up to the length given here and
  0 where an encoder has nothing to say (ByT5 reads only text in quotation marks). The encode stage
  writes them where its `text` is the same stack. Without `encoders` somebody else has made them:
  then a model cannot be sampled from a prompt.

  The paper gives the widths and MetaCLIP's 256; 300 and 100 are those of mindone's
  re-implementation.
  """

  kind: str = "features"
  names: tuple[str, ...] = ("ul2", "metaclip", "byt5")
  widths: tuple[int, ...] = (4096, 1280, 1472)
  lengths: tuple[int, ...] = (300, 256, 100)
  online: bool = False
  # Share of the captions of which an encoder says nothing, one for each (): never. Beside the
  # caption_dropout of the task, which drops all of them at once.
  dropout: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if not len(self.names) == len(self.widths) == len(self.lengths) > 0:
      raise ConfigError(
        f"names {self.names}, widths {self.widths} and lengths {self.lengths} must have one entry "
        "for each text encoder."
      )
    if self.dropout and len(self.dropout) != len(self.names):
      raise ConfigError(f"dropout is {self.dropout}: give one share for each of {self.names}.")
    if any(not 0 <= share <= 1 for share in self.dropout):
      raise ConfigError(f"dropout is {self.dropout}: shares lie between 0 and 1.")
    if self.online and not self.encoders:
      raise ConfigError("online is True and encoders is empty: name the encoders that shall run.")
    for name, width in zip(self.encoders, self.widths, strict=bool(self.encoders)):
      if name != ANY and sizes.named(name).config.output_width != width:
        raise ConfigError(
          f"widths is {self.widths}: {name} makes features of "
          f"{sizes.named(name).config.output_width}."
        )

  def stack(self) -> StackConfig:
    """What the features depend on, without what is done with them."""
    keys = [field.name for field in dataclasses.fields(StackConfig)]
    return StackConfig(**{key: getattr(self, key) for key in keys})

  def check_encoded(self, encoded: StackConfig, path: str, encode: str) -> None:
    """Raises ConfigError where the encode stage does not write the features that this reads."""
    if self.online or not self.encoders:
      return
    if not encoded.names:
      raise ConfigError(
        f"{path}.task.text reads features, and config.stages.{encode}.text makes none: give that "
        f"the same encoders, or set {path}.task.text.online."
      )
    mine = self.stack()
    differ = [
      field.name
      for field in dataclasses.fields(StackConfig)
      if getattr(mine, field.name) != getattr(encoded, field.name)
    ]
    if differ:
      raise ConfigError(
        f"{path}.task.text and config.stages.{encode}.text differ in {', '.join(differ)}: give "
        f"both the same, or set {path}.task.text.online."
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

  def thin(self, rows: Rows, keys: jax.Array) -> Rows:
    """The rows of training, where single encoders are dropped at random; `keys` is [B]."""

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    """The entries of a batch."""

  def flops(self) -> int:
    """Of training on one text: three forward passes of what is trained, one of what is frozen."""

  def sample_flops(self) -> int:
    """Of one text that is drawn from: a forward pass of what is trained."""

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """The entries of one row, from a record."""

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts as the rows "tokens"; raises UserError where text is not read so."""

  def reader(self, mesh: jax.sharding.Mesh) -> Callable[[Sequence[Prompt]], dict[str, np.ndarray]]:
    """A function of prompts to what `context` reads of them; raises UserError if there is none."""

  def too_long(self, prompt: Prompt) -> list[str]:
    """What is not read of a prompt, in words."""

  # Frozen encoders that run in the training step, if any.

  def frozen_shapes(self, mesh: jax.sharding.Mesh | None) -> Any:
    """Their parameters as shapes with shardings; None: there are none."""

  def load_frozen(self, mesh: jax.sharding.Mesh) -> Any:
    """The parameters themselves."""

  def embed(self, frozen: Any, rows: Rows) -> Rows:
    """The entries that `batch_spec` names -> those that `context` reads."""


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

  def thin(self, rows: Rows, keys: jax.Array) -> Rows:
    del keys  # there is one encoder
    return rows

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    shape = (examples, self.config.max_length)
    return {"tokens": ArraySpec(shape, np.int32, ("batch", "context_tokens"))}

  def flops(self) -> int:
    return 3 * self.sample_flops()

  def sample_flops(self) -> int:
    return sum(text_lib.flops(self.config, self.config.max_length).values())

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"tokens": self.tokenize([example["caption"]])[0]}

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    return text_lib.encode_bytes(prompts, self.config.max_length)

  def reader(self, mesh: jax.sharding.Mesh) -> Callable[[Sequence[Prompt]], dict[str, np.ndarray]]:
    del mesh
    return lambda prompts: {"tokens": self.tokenize([prompt.text for prompt in prompts])}

  def too_long(self, prompt: Prompt) -> list[str]:
    limit = self.config.max_length - 1
    found = len(prompt.text.encode("utf-8", "replace")) > limit
    return [f"the model reads the first {limit} bytes"] if found else []

  def frozen_shapes(self, mesh: jax.sharding.Mesh | None) -> Any:
    del mesh

  def load_frozen(self, mesh: jax.sharding.Mesh) -> Any:
    del mesh

  def embed(self, frozen: Any, rows: Rows) -> Rows:
    del frozen
    return rows


class FeatureText:
  """See `FeatureTextConfig`.

  The empty text is one token of zeros for each encoder. The LayerNorm behind each projection turns
  it into its bias, so that the model learns what "no text" is.
  """

  def __init__(self, config: FeatureTextConfig):
    self.config = config
    self._stack = TextStack(config.stack())
    self._dtype = jnp.dtype(config.dtype)
    self._arrays = self._stack.arrays
    self.names = (*self._arrays, *(f"{name}_mask" for name in self._arrays))

  def init(self, key: jax.Array) -> Any:
    del key  # the encoders are frozen: no parameters of the generator

  def context(self, params: Any, rows: Rows) -> tuple[list[jax.Array], list[jax.Array]]:
    del params
    masks = [rows[f"{name}_mask"] for name in self._arrays]
    nothing = ~jnp.concatenate(masks, 1).any(1)  # attention needs something to attend to
    rows = self.drop(rows, nothing)
    return [rows[name] for name in self._arrays], [rows[f"{name}_mask"] for name in self._arrays]

  def drop(self, rows: Rows, drop: jax.Array) -> Rows:
    made = {}
    for name in self._arrays:
      made[name], made[f"{name}_mask"] = _emptied(rows[name], rows[f"{name}_mask"], drop)
    return made

  def thin(self, rows: Rows, keys: jax.Array) -> Rows:
    made = dict(rows)
    for index, (name, share) in enumerate(zip(self._arrays, self.config.dropout, strict=False)):
      own = jax.vmap(functools.partial(_fold, index=index))(keys)
      silent = draws.bernoulli(own, share)[:, None]
      made[f"{name}_mask"] = rows[f"{name}_mask"] & ~silent
    return made

  def batch_spec(self, examples: int) -> dict[str, ArraySpec]:
    cfg, specs = self.config, {}
    axes = ("batch", "context_tokens", None)
    for name, length, width in zip(cfg.names, cfg.lengths, cfg.widths, strict=True):
      kind = "tokens" if cfg.online else "text"
      if cfg.online:
        specs[f"tokens_{name}"] = ArraySpec((examples, length), np.int32, axes[:2])
      else:
        specs[f"text_{name}"] = ArraySpec((examples, length, width), self._dtype, axes)
      specs[f"{kind}_{name}_mask"] = ArraySpec((examples, length), np.bool_, axes[:2])
    return specs

  def flops(self) -> int:
    return self._stack.flops() if self.config.online else 0

  def sample_flops(self) -> int:
    return 0

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    if self.config.online:
      prompt = Prompt(example["caption"], example.get("fps", 0.0), example.get("camera", ""))
      return {name: array[0] for name, array in self._stack.tokenize([prompt]).items()}
    return self._padded(example)

  def _padded(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """Features [S, width] of a record as rows of full length with masks."""
    cfg, row = self.config, {}
    for name, length, width in zip(self._arrays, cfg.lengths, cfg.widths, strict=True):
      if name not in example:
        raise UserError(
          f"the records hold no text features {name!r}: give the encode stage the same text "
          'encoders, or set task.text.online, or task.text to {"kind": "bytes"}.'
        )
      found = np.asarray(example[name])
      if found.ndim != 2 or found.shape[1] != width:
        raise UserError(
          f"the records hold {name!r} of shape {found.shape}: the model takes [length, {width}]."
        )
      count = min(length, found.shape[0])
      row[name] = np.zeros((length, width), self._dtype)
      row[name][:count] = found[:count]
      row[f"{name}_mask"] = np.arange(length) < count
    return row

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    raise self._unreadable(prompts[0])

  def reader(self, mesh: jax.sharding.Mesh) -> Callable[[Sequence[Prompt]], dict[str, np.ndarray]]:
    if not self.config.encoders:

      def refuse(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        raise self._unreadable(prompts[0].text)

      return refuse
    embed = self._stack.embedder(mesh)

    def read(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
      rows = []
      for start in range(0, len(prompts), _BATCH):
        part = list(prompts[start : start + _BATCH])
        filled = part + part[-1:] * (_BATCH - len(part))  # one program for any number
        rows += [self._padded(found) for found in embed(filled)[: len(part)]]
      return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return read

  def too_long(self, prompt: Prompt) -> list[str]:
    return self._stack.too_long(prompt) if self.config.encoders else []

  def frozen_shapes(self, mesh: jax.sharding.Mesh | None) -> Any:
    return self._stack.shapes(mesh) if self.config.online else None

  def load_frozen(self, mesh: jax.sharding.Mesh) -> Any:
    return self._stack.load(mesh) if self.config.online else None

  def embed(self, frozen: Any, rows: Rows) -> Rows:
    others = {name: x for name, x in rows.items() if name not in self._stack.token_names()}
    return {**others, **self._stack.embed(frozen, rows)}

  def _unreadable(self, prompt: str) -> UserError:
    return UserError(
      f"this model reads the features of {', '.join(self.config.names)}, which are not part of it: "
      f"it cannot draw from the prompt {prompt!r} itself; name them in task.text.encoders."
    )


@jax.jit  # written once in a program for each encoder
def _emptied(features: jax.Array, mask: jax.Array, drop: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Features and mask of the empty text where `drop` [B] is True."""
  zeros, first = jnp.zeros_like(features), np.arange(mask.shape[1]) == 0
  over = functools.partial(jax.lax.broadcast_in_dim, broadcast_dimensions=(0,))
  return (
    jax.lax.select(over(drop, features.shape), zeros, features),
    jax.lax.select(over(drop, mask.shape), jnp.broadcast_to(first, mask.shape), mask),
  )


def _fold(key: jax.Array, index: int) -> jax.Array:
  """A key of its own for each encoder, beside the one that drops the whole caption."""
  return jax.random.fold_in(key, index + 1)


def make(config: ByteTextConfig | FeatureTextConfig) -> TextInputs:
  """The text of a generator, by its config."""
  return ByteText(config) if isinstance(config, ByteTextConfig) else FeatureText(config)
