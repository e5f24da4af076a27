"""One frozen encoder: its weights on the devices, its tokenizer, and a call for a list of prompts.

  from mgen_jax import encoders
  ul2 = encoders.load("ul2", "weights/ul2")
  features, mask = ul2(["a red circle moves left"])[:2]

Not here: which encoders a generator reads together (`stack.py`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mgen_jax import schema
from mgen_jax.encoders import sizes, tokenizers
from mgen_jax.encoders.families import FAMILIES
from mgen_jax.errors import UserError
from mgen_jax.models import clip
from mgen_jax.models import llama as llama_lib
from mgen_jax.parallel import cpu, rules
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.weights import stored, transfer
from mgen_jax.weights.folders import Source
from mgen_jax.weights.match import match

DTYPES = ("bfloat16", "float32")  # T5 overflows in float16


class Embedded(NamedTuple):
  """What an encoder makes of a list of prompts or images, on the host.

  Attributes:
    features: [N, S, width].
    mask: bool [N, S], True where there is text (images: everywhere).
    pooled: [N, width]; None where the encoder has no such vector (T5, LLaMA).
    projected: [N, projection] fp32, in the space that the towers of a CLIP share; None likewise.
  """

  features: np.ndarray
  mask: np.ndarray
  pooled: np.ndarray | None = None
  projected: np.ndarray | None = None


def apply(family: str, config: Any, params: Any, tokens: Any, mask: Any) -> tuple:
  """(features, pooled, projected) of tokens under a mask, or of images; traceable."""
  module = FAMILIES[family].module(config)
  if family == "t5":
    return module.apply({"params": params}, tokens, mask), None, None
  if family == "llama":
    return module.apply({"params": params}, tokens, mask).hidden, None, None
  if family == "clip_text":
    out = module.apply({"params": params}, tokens, mask)
  else:
    out = module.apply({"params": params}, tokens)
  return out.last, out.pooled, out.projected


def split_layers(params: Any) -> Any:
  """Parameters with a list of layers in place of the stacked ones, which are given up.

  A program for a CPU that scans over stacked layers copies each matrix out of its stack before it
  multiplies: a tenth of the time of a T5-base, and of UL2 the memory of a layer.
  """

  def split(stack: jax.Array) -> list[jax.Array]:
    pieces = list(jnp.unstack(stack))
    stack.delete()  # no more than one parameter is there twice
    return pieces

  leaves, tree = jax.tree.flatten(params["layers"])
  layers = zip(*(split(leaf) for leaf in leaves), strict=True)
  return {**params, "layers": [jax.tree.unflatten(tree, layer) for layer in layers]}


def join_layers(params: Any) -> Any:
  """What `split_layers` split. In a program that unrolls the layers no stack is ever made: XLA
  reads the slice of a stack from where the piece is."""
  return {**params, "layers": jax.tree.map(lambda *layer: jnp.stack(layer), *params["layers"])}


class Encoder:
  """See the module's docstring; made by `load`.

  Attributes:
    name: of the encoder.
    family, config: what it is.
    length: tokens of a text that are read unless a call says otherwise.
  """

  def __init__(
    self,
    name: str,
    family: str,
    config: Any,
    params: Any,
    folder: Path,
    mesh: jax.sharding.Mesh,
    compiler_options: Mapping[str, str | bool] | None = None,
  ):
    """Takes `params`, which lie on `mesh`: nobody else may use them."""
    self.name, self.family, self.config, self.mesh = name, family, config, mesh
    self._split = family == "t5" and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    self._params = split_layers(params) if self._split else params
    size = sizes.SIZES.get(name)
    self.length = _length(family, config, size)
    self._wanted = size and size.vocabulary
    self._folder = folder
    self._batcher: tokenizers.Batcher | None = None
    whole = dataclasses.replace(config, scan_unroll=config.layers) if self._split else config
    chosen = cpu.compiler_options(mesh) if compiler_options is None else compiler_options
    self._options = dict(chosen) if chosen else None
    self._program = jax.jit(
      lambda params, tokens, mask: apply(family, whole, self._joined(params), tokens, mask),
      compiler_options=self._options,
    )

  def _joined(self, params: Any) -> Any:
    return join_layers(params) if self._split else params

  @property
  def params(self) -> Any:
    """The parameters as the module takes them, frozen (on one CPU device, a copy)."""
    return self._joined(self._params)

  @property
  def width(self) -> int:
    """Of a feature."""
    return self.config.output_width

  @property
  def batcher(self) -> tokenizers.Batcher:
    """The tokenizer; raises UserError where its file is missing."""
    if self._batcher is None:
      made = tokenizers.open_tokenizer(self._folder, self.config.vocab, self._wanted)
      self._batcher = tokenizers.Batcher(made, self.name)
    return self._batcher

  def __call__(
    self, prompts: Sequence[str], *, length: int | None = None, batch: int = 32
  ) -> Embedded:
    """Embeds texts.

    Args:
      prompts: any texts; too long ones are cut, which is counted and logged. "" is the end token.
      length: tokens of a text; by default up to the encoder's own limit, as many as the longest
        text needs, rounded up so that few programs are compiled.
      batch: texts at a time.

    Returns:
      Features, masks and (CLIP) pooled vectors.

    Raises:
      UserError: the vocabulary is missing, or what is given are no texts or no length.
    """
    if self.family == "clip_vision":
      raise UserError(f"{self.name} reads images: call embed_images.")
    if isinstance(prompts, str):
      raise UserError("give a list of prompts, not one text: [prompt].")
    if not prompts:
      raise UserError("there are no prompts to embed: give at least one.")
    for prompt in prompts:
      if not isinstance(prompt, str):
        raise UserError(f"{prompt!r} is not a text: a prompt is a string.")
    limited = self.family != "t5"
    if length is not None and (length < 1 or (limited and length > self.length)):
      range_ = f"1 to {self.length}" if limited else "1 or more"
      raise UserError(f"length {length} cannot be used: {self.name} reads {range_}.")
    if length is None:
      longest = max(len(self.batcher.tokenizer.encode(_clean(p))) for p in prompts)
      length = min(self.length, 16 * math.ceil(longest / 16))
    tokens = self.batcher(list(prompts), length)
    return self.embed_tokens(tokens.ids, tokens.mask, batch=batch)

  def embed_tokens(self, ids: np.ndarray, mask: np.ndarray, *, batch: int = 32) -> Embedded:
    """Embeds int32 tokens [N, S] that somebody else has made, under their mask [N, S].

    Raises:
      UserError: this is no encoder of texts.
    """
    if self.family == "clip_vision":
      raise UserError(f"{self.name} reads images: call embed_images.")
    if self.family == "clip_text":
      clip.check_ends(self.config, ids)
    made = self._run(ids, mask, batch)
    return Embedded(made[0], mask, made[1], made[2])

  def embed_images(self, images: Sequence[np.ndarray], *, batch: int = 32) -> Embedded:
    """Embeds uint8 images [H, W, 3] of any size: the short side is resized, the middle is cut out.

    Raises:
      UserError: this is no vision tower, or something is not an image.
    """
    if self.family != "clip_vision":
      raise UserError(f"{self.name} reads texts: call it with a list of prompts.")
    if not len(images):
      raise UserError("there are no images to embed: give at least one.")
    pixels = np.stack([preprocess(image, self.config.image_size) for image in images])
    made = self._run(pixels, np.ones(len(pixels), bool), batch)
    mask = np.ones(made[0].shape[:2], bool)
    return Embedded(made[0], mask, made[1], made[2])

  def generate(
    self,
    prompts: Sequence[str],
    steps: int,
    *,
    end: int = -1,
    temperature: float = 0.0,
    seed: int = 0,
  ) -> np.ndarray:
    """Continues texts with a LLaMA: int32 tokens [N, steps].

    Args:
      prompts: texts.
      steps: how many tokens to add.
      end: the token that ends a text (generation_config.json has it), which then fills what
        follows; -1: none does.
      temperature: 0 takes the likeliest token.
      seed: of the randomness.

    Raises:
      UserError: this is no LLaMA, or its vocabulary is missing.
    """
    if self.family != "llama":
      raise UserError(f"{self.name} is an encoder: only a LLaMA continues a text.")
    tokens = self.batcher(list(prompts), None)
    program = jax.jit(
      lambda params, ids, mask, key: llama_lib.generate(
        self.config,
        params,
        ids,
        mask,
        steps,
        end=end,
        key=key,
        temperature=temperature,
      ),
      compiler_options=self._options,
    )
    with mesh_lib.use(self.mesh):
      return np.asarray(program(self._params, tokens.ids, tokens.mask, jax.random.key(seed)))

  def _run(self, inputs: np.ndarray, mask: np.ndarray, batch: int) -> list[np.ndarray | None]:
    parts = mesh_lib.batch_shards(self.mesh)
    size = math.ceil(min(batch, len(inputs)) / parts) * parts
    made: list[list[np.ndarray]] = [[], [], []]
    for start in range(0, len(inputs), size):
      rows = np.minimum(np.arange(start, start + size), len(inputs) - 1)  # the last batch is filled
      with mesh_lib.use(self.mesh):
        placed = (
          jax.device_put(x[rows], rules.sharding(self.mesh, ("batch",) + (None,) * (x.ndim - 1)))
          for x in (inputs, mask)
        )
        out = jax.device_get(self._program(self._params, *placed))
      for kept, value in zip(made, out, strict=True):
        if value is not None:
          kept.append(value[: len(inputs) - start])
    return [np.concatenate(parts) if parts else None for parts in made]


def _clean(text: str) -> str:
  return text.encode("utf-8", "replace").decode("utf-8")


def _length(family: str, config: Any, size: sizes.Size | None) -> int:
  if family in ("clip_text", "llama"):
    return config.max_positions
  return size.length if size else 512


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
  """uint8 [H, W, 3] -> fp32 [size, size, 3], normalised as the public towers were trained.

  Raises:
    UserError: it is not such an image.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
    raise UserError(f"an image is uint8 [height, width, 3], not {image.dtype} {image.shape}.")
  height, width = image.shape[:2]
  scale = size / min(height, width)
  sides = (max(size, round(width * scale)), max(size, round(height * scale)))
  resized = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC))
  top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
  cut = resized[top : top + size, left : left + size].astype(np.float32) / 255
  return (cut - np.asarray(clip.PIXEL_MEAN, np.float32)) / np.asarray(clip.PIXEL_STD, np.float32)


def load(
  name: str,
  path: Path | str,
  *,
  dtype: str | None = None,
  devices: Sequence[jax.Device] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  compiler_options: Mapping[str, str | bool] | None = None,
) -> Encoder:
  """Reads an encoder, to embed lists of prompts (or images) with it.

  Args:
    name: like "ul2", "byt5-small", "metaclip-bigg-text" (`sizes.SIZES`), or "any" for whatever the
      folder holds.
    path: a folder made by python -m mgen_jax.convert, or one of safetensors with config.json.
    dtype: of parameters and computation, "bfloat16" or "float32"; None: that of the weights.
    devices: over which the parameters are sharded; all of this host's by default.
    mesh: in place of `devices`.
    compiler_options: XLA's, of the programs; None: on a CPU, oneDNN's products (`parallel.cpu`).

  Raises:
    UserError: there are no such weights there, or they are of another encoder.
  """
  if dtype is not None and dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} cannot be used: use one of {', '.join(DTYPES)}.")
  path = Path(path)
  if mesh is None:
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), devices or jax.local_devices())
  if stored.is_stored(path):
    found = stored.read(path, FAMILIES)
    family, config = found.family.name, found.config
    check_name(name, family, config, path)
    params = stored.restore(found, mesh, dtype)
  else:
    source = Source(path)
    matched = match(source, FAMILIES, None if name == "any" else sizes.named(name).family)
    matched.complain(path)
    family, config = matched.family.name, matched.config
    check_name(name, family, config, path)
    params = transfer.read_params(source, matched, mesh, dtype)
  if dtype is None:
    own = str(jax.tree.leaves(params)[0].dtype)
    dtype = own if own in DTYPES else "float32"
  config = dataclasses.replace(config, dtype=dtype)
  return Encoder(name, family, config, params, path, mesh, compiler_options)


def check_name(name: str, family: str, config: Any, path: Path) -> None:
  """Raises UserError where a folder holds another encoder than the one that is named."""
  if name == "any":
    return
  size = sizes.named(name)
  if size.family != family:
    raise UserError(f"{path} holds an encoder of family {family}, and {name} is of {size.family}.")
  # Keys that shape no parameter; towers of one size differ in more between lineages.
  free = {"dtype", "scan_unroll", "norm_eps"}
  if family.startswith("clip"):
    free |= {"eos", "pooling", "activation", "projection"}
  differ = [
    f"{key} {found} instead of {wanted}"
    for key, found in schema.to_plain(config).items()
    if key not in free and found != (wanted := getattr(size.config, key))
  ]
  if differ:
    raise UserError(
      f"{path} does not hold {name}: {', '.join(differ)}; name the right folder, or load it as "
      '"any".'
    )
