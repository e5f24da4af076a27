"""The text encoders that a generator reads together (Movie Gen 3.1.4): UL2, MetaCLIP and ByT5.

Each reads the whole prompt or what it has in quotation marks, and leaves features of its own width;
the projections to the width of the generator are the generator's (`models/backbone.py`). The stack
is frozen: its parameters are arguments of what is compiled, sharded by the rules table, never
constants. It runs in the training step (online), or before training (`embedder`): the numbers are
the same. Not here: what is left out for guidance (`tasks/text_inputs.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.data import prompts
from mgen_jax.data.prompts import Prompt
from mgen_jax.encoders import encoder as encoder_lib
from mgen_jax.encoders import families, sizes, tokenizers
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models import clip, t5
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.weights import stored

ANY = "any"  # an encoder that is whatever its folder holds
# Families whose features a generator may read.
_TEXT = ("t5", "clip_text")

Rows = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """Which encoders read a prompt, and how; one entry of each tuple for an encoder.

  Movie Gen states neither which UL2 and ByT5, nor how many of their tokens are read; which ones fit
  its widths: see `sizes.py`.
  """

  names: tuple[str, ...] = ()  # of the features, "text_NAME" in records and batches
  encoders: tuple[str, ...] = ()  # names of `sizes.SIZES`, or "any"; (): made by somebody else
  weights: tuple[str, ...] = ()  # folders made by mgen_jax.convert
  reads: tuple[Literal["prompt", "quoted"], ...] = ()  # the whole prompt, or the quoted text in it
  lengths: tuple[int, ...] = ()  # tokens
  fps_prefix: bool = True  # "FPS-16" before the prompt
  # Of the encoders' weights and computation, and of the features.
  dtype: Literal["bfloat16", "float32"] = "bfloat16"

  def __post_init__(self):
    if not self.encoders:
      return
    for key in ("names", "weights", "reads", "lengths"):
      if len(getattr(self, key)) != len(self.encoders):
        raise ConfigError(
          f"{key} is {getattr(self, key)}: it must have one entry for each of the encoders "
          f"{', '.join(self.encoders)}."
        )
    if len(set(self.names)) < len(self.names):
      raise ConfigError(f"names is {self.names}: features of two encoders need two names.")
    for name, length in zip(self.encoders, self.lengths, strict=True):
      if name == ANY:
        continue
      size = sizes.named(name)
      if size.family not in _TEXT:
        raise ConfigError(f"{name} does not make features of a text: use one that does, like ul2.")
      limit = size.config.max_positions if size.family == "clip_text" else math.inf
      if not 0 < length <= limit:
        raise ConfigError(f"{name} reads 1 to {limit} tokens: its length cannot be {length}.")


class TextStack:
  """See the module's docstring. Holds no arrays; files are opened when they are needed."""

  def __init__(self, config: StackConfig):
    self.config = config
    self.arrays = tuple(f"text_{name}" for name in config.names)

  def token_names(self) -> tuple[str, ...]:
    """The entries that `tokenize` makes."""
    return tuple(
      entry for name in self.config.names for entry in (f"tokens_{name}", f"tokens_{name}_mask")
    )

  # On the host.

  def check(self) -> None:
    """Opens every tokenizer and description, so that what is missing is known at once.

    Raises:
      UserError: weights or a vocabulary are missing, or of another encoder.
    """
    for index in range(len(self.config.names)):
      self._batcher(index)

  def tokenize(self, texts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Prompts as "tokens_NAME" int32 [N, S] and "tokens_NAME_mask" for each encoder.

    An encoder without anything to read has no token at all: it says nothing.

    Raises:
      UserError: a vocabulary is missing.
    """
    cfg, rows = self.config, {}
    for index, (name, what, length) in enumerate(
      zip(cfg.names, cfg.reads, cfg.lengths, strict=True)
    ):
      read = [prompts.reads(what, text, fps_prefix=cfg.fps_prefix) for text in texts]
      tokens = self._batcher(index)(read, length)
      said = np.array([bool(text) for text in read])[:, None]
      rows[f"tokens_{name}"] = tokens.ids
      rows[f"tokens_{name}_mask"] = tokens.mask & said
    return rows

  def too_long(self, text: Prompt) -> list[str]:
    """Which encoders read only a part of a prompt, in words."""
    cfg, found = self.config, []
    for index, (name, what, length) in enumerate(
      zip(cfg.names, cfg.reads, cfg.lengths, strict=True)
    ):
      read = prompts.reads(what, text, fps_prefix=cfg.fps_prefix)
      count = len(self._batcher(index).encode(read)[0])
      if count > length:
        found.append(f"{name} reads the first {length} of {count} tokens")
    return found

  def digest(self) -> dict[str, str]:
    """Of the weights, by name: what "the same features" depends on besides the config."""
    cfg = self.config
    return {
      name: stored.read(folder, families.FAMILIES).digest
      for name, folder in zip(cfg.names, cfg.weights, strict=True)
    }

  def _batcher(self, index: int) -> tokenizers.Batcher:
    cfg = self.config
    wanted = None if cfg.encoders[index] == ANY else sizes.named(cfg.encoders[index]).vocabulary
    vocab = self._shapes[index][1].vocab
    return _open_batcher(cfg.weights[index], vocab, wanted, cfg.names[index])

  # On the devices.

  def shapes(self, mesh: jax.sharding.Mesh | None = None) -> Any:
    """The parameters {name: tree} as shapes and dtypes, on a mesh with their shardings."""
    dtype, made = jnp.dtype(self.config.dtype), {}
    for index, name in enumerate(self.config.names):
      boxed = families.boxed_shapes(*self._shapes[index])
      bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(boxed))
      if mesh is not None:
        layout = rules.tree_shardings(mesh, boxed)
        bare = jax.tree.map(
          lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), bare, layout
        )
      made[name] = bare
    return made

  def load(self, mesh: jax.sharding.Mesh) -> Any:
    """The parameters {name: tree} on a mesh.

    Raises:
      UserError: weights are missing, damaged, or of another encoder.
    """
    self.check()
    cfg, made = self.config, {}
    for index, name in enumerate(cfg.names):
      found = stored.read(cfg.weights[index], families.FAMILIES)
      encoder_lib.check_name(cfg.encoders[index], found.family.name, found.config, found.folder)
      made[name] = stored.restore(found, mesh, cfg.dtype)
    return made

  def embed(self, params: Any, rows: Rows) -> Rows:
    """Features of tokens: "text_NAME" [N, S, width], zeros at padding, and "text_NAME_mask"."""
    made = {}
    for index, (name, array) in enumerate(zip(self.config.names, self.arrays, strict=True)):
      family, config = self._shapes[index]
      tokens, mask = rows[f"tokens_{name}"], rows[f"tokens_{name}_mask"]
      features = encoder_lib.apply(family, config, params[name], tokens, mask)[0]
      features = jnp.where(mask[..., None], features, jnp.zeros((), features.dtype))
      made[array] = nn.with_logical_constraint(features, ("batch", "context_tokens", None))
      made[f"{array}_mask"] = mask
    return made

  def embedder(
    self, mesh: jax.sharding.Mesh
  ) -> Callable[[Sequence[Prompt]], list[dict[str, np.ndarray]]]:
    """A function of prompts -> for each {"text_NAME": [tokens, width]}, computed on `mesh`.

    Raises:
      UserError: as `load`.
    """
    params = self.load(mesh)
    program = jax.jit(self.embed)
    parts = mesh_lib.batch_shards(mesh)

    def embed(texts: Sequence[Prompt]) -> list[dict[str, np.ndarray]]:
      count = len(texts)
      rows = self.tokenize([*texts, *[texts[-1]] * (-count % parts)])
      with mesh_lib.use(mesh):
        placed = {
          name: jax.device_put(x, rules.sharding(mesh, ("batch", None))) for name, x in rows.items()
        }
        made = jax.device_get(program(params, placed))
      lengths = {name: made[f"{name}_mask"].sum(1) for name in self.arrays}
      return [
        {name: made[name][row, : lengths[name][row]] for name in self.arrays}
        for row in range(count)
      ]

    return embed

  def flops(self) -> int:
    """Of one forward pass over one prompt of full length."""
    total = 0
    for index, length in enumerate(self.config.lengths):
      family, config = self._shapes[index]
      total += sum({"t5": t5.flops, "clip_text": clip.flops}[family](config, length).values())
    return total

  @functools.cached_property
  def _shapes(self) -> tuple[tuple[str, Any], ...]:
    """(family, config in the stack's dtype) of each encoder; read once, not for every record."""
    cfg = self.config
    found = (_shape(*pair) for pair in zip(cfg.encoders, cfg.weights, strict=True))
    return tuple((family, dataclasses.replace(one, dtype=cfg.dtype)) for family, one in found)


def _shape(name: str, folder: str) -> tuple[str, Any]:
  """(family, config) of an encoder: its folder's, and where there is none yet, its name's.

  The folder also says what a name leaves open (activation, pooling).
  """
  if name != ANY and not stored.is_stored(folder):  # for planning, no weight is needed
    size = sizes.named(name)
    return size.family, size.config
  found = stored.read(folder, families.FAMILIES)
  family = found.family.name
  encoder_lib.check_name(name, family, found.config, found.folder)
  if family not in _TEXT:
    raise UserError(f"{folder} holds a {family}: name weights that read texts.")
  return family, found.config


@functools.lru_cache(maxsize=32)
def _open_batcher(folder: str, vocab: int, wanted: str | None, name: str) -> tokenizers.Batcher:
  """One tokenizer for each folder: reading threads share it."""
  return tokenizers.Batcher(tokenizers.open_tokenizer(Path(folder), vocab, wanted), name)
