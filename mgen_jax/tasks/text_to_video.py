"""Text to video and to image (a video of one frame), by flow matching (Movie Gen, section 3.1).

Learns from latents that the encode stage has normalised to mean 0 and std 1 for each channel, so
this file knows no autoencoder: decoding is the business of whoever samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax import schema
from mgen_jax.data.buckets import Bucket
from mgen_jax.diffusion import flow_matching, guidance, samplers, time_grids, v_prediction
from mgen_jax.encoders import Prompt, StackConfig
from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import backbone
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.tasks import draws, text_inputs
from mgen_jax.tasks.base import ArraySpec

# Model keys that an earlier stage may have had otherwise: they shape no parameter, or can grow.
_FREE = {"max_positions", "position_growth", "position_std", "context_parallel", "dtype", "remat"}
_FREE |= {"scan_unroll", "cross_zero_init", "in_channels"}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How samples are drawn; the defaults are the paper's (section 3.4.2)."""

  method: Literal["euler", "midpoint", "heun", "ddim"] = "euler"  # ddim: of v-prediction only
  grid: Literal["linear", "quadratic", "linear_quadratic"] = "linear_quadratic"  # not of ddim
  num_steps: int = 50
  linear_steps: int = 250  # that the linear-quadratic grid stands for
  guidance: float = 7.5
  # The two branches of guidance: "batch" evaluates them as one batch of twice the size; "mesh"
  # gives each to one half of the devices (mesh axis replica), for few samples on many devices.
  guidance_split: Literal["batch", "mesh"] = "batch"
  # Of the model's computation; "bfloat16" keeps the layers' weights in it too. The state of the
  # solver stays fp32.
  dtype: Literal["model", "float32", "bfloat16"] = "model"

  def __post_init__(self):
    check_ranges(self, positive=("num_steps", "linear_steps"), natural=("guidance",))


@dataclasses.dataclass(frozen=True)
class TextToVideoConfig:
  """The generator: backbone, text and objective.

  The papers do not state the caption dropout; 10 % is what the field uses.
  """

  name: str = "text_to_video"
  model: backbone.BackboneConfig = backbone.BackboneConfig()
  text: Any = schema.one_of("kind", lambda: text_inputs.CONFIGS, default="bytes")
  stride: tuple[int, int, int] = (8, 8, 8)  # pixels per latent: (frames, height, width)
  caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
  # "v_prediction": diffusion with zero terminal SNR, the paper's ablation (section 3.6.2).
  objective: Literal["flow_matching", "v_prediction"] = "flow_matching"
  time_mean: float = 0.0  # of the logit of t, in flow matching
  time_std: float = 1.0
  sampler: SamplerConfig = SamplerConfig()

  def __post_init__(self):
    check_ranges(self, positive=("stride",), natural=("time_std",), share=("caption_dropout",))
    self.check_sampler(self.sampler)

  def check_sampler(self, sampler: SamplerConfig) -> None:
    """Raises ConfigError for a sampler of the other objective."""
    if (sampler.method == "ddim") != (self.objective == "v_prediction"):
      known = "ddim" if self.objective == "v_prediction" else ", ".join(samplers.SOLVERS)
      raise ConfigError(
        f'sampler.method is "{sampler.method}": a model of objective "{self.objective}" is sampled '
        f"by {known}."
      )

  def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the latents of a bucket."""
    t, h, w = self.stride
    return (
      math.ceil(bucket.frames / t),
      bucket.height // h,
      bucket.width // w,
      self.model.out_channels,
    )

  def check_bucket(self, bucket: Bucket) -> None:
    """Raises ConfigError for a bucket that does not fit the strides or the position tables."""
    latents = self.latent_shape(bucket)[:3]
    names = ("frames", "height", "width")
    for axis, side in ((1, bucket.height), (2, bucket.width)):
      unit = self.stride[axis] * self.model.patch[axis]
      if side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise ConfigError(f"{names[axis]} {side} is not a multiple of {unit}: use {nearest}.")
    for axis, size in enumerate(latents):
      limit = self.model.max_positions[axis] * self.model.patch[axis]
      if self.model.positions == "rotary":
        limit = size
      if size > limit or size % self.model.patch[axis]:
        raise ConfigError(
          f"its latent {names[axis]} is {size}, and the model takes multiples of "
          f"{self.model.patch[axis]} up to {limit}: set model.max_positions[{axis}] to "
          f"{math.ceil(size / self.model.patch[axis])} or choose another bucket."
        )

  def check_mesh(self, context: int, tensor: int) -> None:
    """Raises ConfigError for axes of a mesh that the heads of the model do not divide over."""
    heads = self.model.heads
    if heads % tensor:
      raise ConfigError(
        f"tensor={tensor} does not divide the {heads} heads of the model: set it to "
        f"{math.gcd(heads, tensor)}."
      )
    if self.model.context_parallel == "ulysses" and heads % (tensor * context):
      raise ConfigError(
        f"tensor={tensor} x context={context} does not divide the {heads} heads, which "
        "context_parallel='ulysses' splits over both: set context to "
        f"{math.gcd(heads // tensor, context)}, or use 'all_gather' or 'ring'."
      )

  def check_latents(self, autoencoder: AutoencoderConfig, path: str) -> None:
    """Raises ConfigError where this model does not fit its text or the latents it reads."""
    if self.model.context_widths != self.text.widths:
      raise ConfigError(
        f"{path}.task.model.context_widths is {self.model.context_widths}: the text has "
        f"{self.text.widths}."
      )
    stride = (autoencoder.time_stride, *autoencoder.space_strides)
    if stride != self.stride:
      raise ConfigError(f"{path}.task.stride is {self.stride}: the autoencoder's is {stride}.")
    channels = autoencoder.latent_channels
    for key in ("in_channels", "out_channels"):
      if getattr(self.model, key) != channels:
        raise ConfigError(
          f"{path}.task.model.{key} is {getattr(self.model, key)}: the autoencoder has {channels}."
        )

  def check_text(self, encoded: StackConfig, path: str, encode: str) -> None:
    """Raises ConfigError where stage `encode` does not write the text features that this reads."""
    if isinstance(self.text, text_inputs.FeatureTextConfig):
      self.text.check_encoded(encoded, path, encode)

  def check_origin(self, origin: "TextToVideoConfig", path: str) -> None:
    """Raises ConfigError where this model cannot start from the parameters of `origin`."""
    for key in (field.name for field in dataclasses.fields(self.model)):
      now, then = getattr(self.model, key), getattr(origin.model, key)
      if key == "max_positions" and any(a < b for a, b in zip(now, then, strict=True)):
        raise ConfigError(
          f"{path}.task.model.max_positions is {now}, and {then} in the stage it starts from: "
          "position tables grow and never shrink."
        )
      if key == "in_channels" and now < then:
        raise ConfigError(
          f"{path}.task.model.in_channels is {now}, and {then} in the stage it starts from: input "
          "channels are added and never taken away."
        )
      if key not in _FREE and now != then:
        raise ConfigError(
          f"{path}.task.model.{key} is {now}, and {then} in the stage it starts from: give both "
          "the same."
        )


class TextToVideo:
  """Captions -> latents of videos."""

  source = "latents"

  def __init__(self, config: TextToVideoConfig):
    self.config = config
    self._backbone = backbone.Backbone(config.model)
    self._text = text_inputs.make(config.text)

  def init(self, key: jax.Array) -> Any:
    """Parameters {"backbone": ..., "text": ...}, boxed with logical axis names.

    There is no "text" where nothing of the text is trained.
    """
    keys = jax.random.split(key)
    latents = jnp.zeros((1, *self.config.model.patch, self.config.model.in_channels))
    context = [jnp.zeros((1, 1, width)) for width in self.config.model.context_widths]
    mask = [jnp.ones((1, 1), bool) for _ in context]
    params = {
      "backbone": self._backbone.init(keys[0], latents, jnp.zeros((1,)), context, mask)["params"]
    }
    text = self._text.init(keys[1])
    return params if text is None else {**params, "text": text}

  def adapt(self, params: Any, fresh: Any) -> Any:
    """A model that grew: position tables as `model.position_growth` says, further input channels
    from zero, so that they say nothing yet, and tables and a text that the earlier one had not."""
    model = self.config.model
    have = backbone.grow_channels(params["backbone"], fresh["backbone"], model.patch)
    grown = backbone.grow_positions(have, fresh["backbone"], model.position_growth)
    if "text" not in fresh:  # features of frozen encoders: nothing of the text is trained
      return {"backbone": grown}
    return {"text": fresh["text"], **params, "backbone": grown}

  def velocity(
    self, params: Any, x: jax.Array, t: jax.Array, text: dict[str, jax.Array]
  ) -> jax.Array:
    """u(X_t, t, text) of x [B, T, H, W, C], t [B] and the text entries of a batch: fp32, like x.

    With objective v_prediction it is v.
    """
    return self._velocity(self._backbone, params, x, t, text)

  def _velocity(self, model, params, x, t, text):
    features, masks = self._text.context(params.get("text"), text)
    return model.apply({"params": params["backbone"]}, x, t, features, masks)

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the velocity of "latents" [B, T, H, W, C] given the batch's text."""
    pair_keys, drop_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    drop = draws.bernoulli(drop_keys, self.config.caption_dropout)
    text = self._text.drop(self._text.thin(self._text_of(batch), drop_keys), drop)
    if self.config.objective == "v_prediction":
      x, t, target = v_prediction.training_pair(pair_keys, batch["latents"])
    else:
      x, t, target = flow_matching.training_pair(
        pair_keys, batch["latents"], mean=self.config.time_mean, std=self.config.time_std
      )
    prediction = self.velocity(params, x, t, text)
    return flow_matching.loss(prediction, target).mean(), {}

  def time_bins(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The middles of `count` equal parts of [0, 1], and the share of training times in each."""
    edges = np.linspace(0.0, 1.0, count + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    if self.config.objective == "v_prediction":  # draws its steps evenly
      return middles, np.full(count, 1.0 / count)
    below = flow_matching.share_below(edges, self.config.time_mean, self.config.time_std)
    return middles, np.diff(below)

  def losses_at(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array, times: jax.Array
  ) -> jax.Array:
    """The loss of each example [B] at its own t [B], with its caption, noise from its key."""
    noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    x1 = batch["latents"].astype(jnp.float32)
    x0 = flow_matching.draw_noise(noise_keys, x1.shape[1:])
    if self.config.objective == "v_prediction":
      step = v_prediction.step_of(times)
      x, target = v_prediction.add_noise(x1, x0, step), v_prediction.velocity(x1, x0, step)
      times = v_prediction.time_of(step)
    else:
      x, target = flow_matching.interpolate(x1, x0, times), flow_matching.velocity(x1, x0)
    prediction = self.velocity(params, x, times, self._text_of(batch))
    return flow_matching.loss(prediction, target)

  def sample(
    self,
    params: Any,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    bucket: Bucket,
    *,
    sampler: SamplerConfig | None = None,
  ) -> jax.Array:
    """Normalised latents [B, T, H, W, C] for the text of a batch, noise from `keys` [B]."""
    sampler = self.config.sampler if sampler is None else sampler
    self.config.check_sampler(sampler)
    noise = flow_matching.draw_noise(keys, self.config.latent_shape(bucket))
    text = self._text_of(batch)
    empty = self._text.drop(text, jnp.ones(keys.shape[0], bool))
    model, params = self._for_sampling(params, sampler)
    gather, spread = _placement(sampler)
    u = guidance.guided(
      functools.partial(self._velocity, model, params),
      text,
      empty,
      sampler.guidance,
      gather=gather,
      spread=spread,
    )
    if sampler.method == "ddim":
      return v_prediction.ddim(u, noise, sampler.num_steps)
    grid = time_grids.time_grid(sampler.grid, sampler.num_steps, sampler.linear_steps)
    return samplers.sample(u, noise, grid, sampler.method)

  def _for_sampling(self, params: Any, sampler: SamplerConfig) -> tuple[nn.Module, Any]:
    """The model in the sampler's dtype; in bf16 the layers' matrices are cast once, not in each
    step, and halve what a step reads from memory."""
    model = self.config.model
    if sampler.dtype == "model":
      return self._backbone, params
    model = dataclasses.replace(model, dtype=sampler.dtype)
    if sampler.dtype == "bfloat16":
      layers = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == "kernel" else x,
        params["backbone"]["layers"],
      )
      params = {**params, "backbone": {**params["backbone"], "layers": layers}}
    return backbone.Backbone(model), params

  def _text_of(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: batch[name] for name in self._text.names}

  def batch_spec(self, bucket: Bucket, examples: int) -> dict[str, ArraySpec]:
    """ "latents" and the entries of the text."""
    return {
      "latents": ArraySpec(
        (examples, *self.config.latent_shape(bucket)),
        np.float32,
        ("batch", "frames", "height", "width", "channels"),
      ),
      **self._text.batch_spec(examples),
    }

  def flops(self, bucket: Bucket) -> float:
    """Training FLOPs of one example: three forward passes, and one of encoders that are frozen."""
    return sum(self.flops_by_part(bucket).values())

  def flops_by_part(self, bucket: Bucket) -> dict[str, float]:
    """`flops`, by part of the model."""
    shape = self.config.latent_shape(bucket)[:3]
    parts = backbone.flops(self.config.model, shape, self.config.text.lengths)
    trained = {name: 3.0 * part for name, part in parts.items()}
    return {**trained, "text_encoder": float(self._text.flops())}

  def sample_flops_by_part(
    self, bucket: Bucket, sampler: SamplerConfig | None = None
  ) -> dict[str, float]:
    """FLOPs of drawing one sample: forward passes of all steps and both branches of guidance."""
    sampler = self.config.sampler if sampler is None else sampler
    branches = 1 if sampler.guidance == 1 else 2
    passes = branches * evaluations(sampler)
    shape = self.config.latent_shape(bucket)[:3]
    parts = backbone.flops(self.config.model, shape, self.config.text.lengths)
    made = {name: float(passes * part) for name, part in parts.items()}
    return {**made, "text_encoder": float(branches * self._text.sample_flops())}

  def tokens(self, bucket: Bucket) -> int:
    """Patches of latents."""
    latents = self.config.latent_shape(bucket)[:3]
    return math.prod(size // p for size, p in zip(latents, self.config.model.patch, strict=True))

  def tokenize(self, prompts: list[str]) -> np.ndarray:
    """Captions -> int32 tokens [B, S]; raises UserError where the model reads features."""
    return self._text.tokenize(prompts)

  def reader(self, mesh: jax.sharding.Mesh) -> Callable[[Sequence[Prompt]], dict[str, np.ndarray]]:
    """A function of prompts to the entries that `sample` reads; loads text encoders on the mesh.

    Raises UserError where they are missing, the function where the model has none.
    """
    return self._text.reader(mesh)

  def too_long(self, prompt: Prompt) -> list[str]:
    """What is not read of a prompt, in words."""
    return self._text.too_long(prompt)

  def frozen_shapes(self, mesh: jax.sharding.Mesh | None) -> Any:
    """Parameters of text encoders that run in the training step, as shapes; None: none do."""
    return self._text.frozen_shapes(mesh)

  def load_frozen(self, mesh: jax.sharding.Mesh) -> Any:
    """Those parameters; raises UserError where weights or a vocabulary are missing."""
    return self._text.load_frozen(mesh)

  def embed(self, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with the features of its tokens."""
    return self._text.embed(frozen, batch)

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """A record {"latents", "caption", ...} -> one row of the batch."""
    return {
      "latents": np.asarray(example["latents"], np.float32),
      **self._text.prepare(example),
    }


def evaluations(sampler: SamplerConfig) -> int:
  """Of the velocity, for one sample; guidance evaluates the model twice in each."""
  return sampler.num_steps * samplers.EVALUATIONS.get(sampler.method, 1)


def sampling_mesh(sampler: Any, devices: int) -> MeshConfig:
  """The mesh that samples are drawn on where none is asked for: each device draws its own, and
  with the branches of guidance on halves of the devices, two replicas of the model are needed."""
  asked = isinstance(sampler, SamplerConfig) and sampler.guidance_split == "mesh"
  split = asked and devices % 2 == 0
  return MeshConfig(replica=2 if split else 1)


def sample_axis(mesh: jax.sharding.Mesh) -> str:
  """The logical axis of samples: not split over replicas, which share them for guidance."""
  return "batch" if mesh.shape["replica"] == 1 else "samples"


def _placement(sampler: SamplerConfig) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
  """Where samples lie on the mesh, and where the joint batch of the two branches of guidance."""
  if sampler.guidance_split == "batch":
    return (lambda x: x), (lambda x: x)

  def along(axis):
    return lambda x: nn.with_logical_constraint(x, (axis,) + (None,) * (x.ndim - 1))

  # Split over (replica, fsdp) in this order, the first half of the joint batch, the conditional
  # one, is on the first half of the replicas.
  return along("samples"), along("batch")
