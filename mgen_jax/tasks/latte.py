"""Latte as a task: video, alone or jointly with images, by class, by text or without condition.

Learned-variance Gaussian diffusion (see `diffusion/gaussian.py`) of the latents of a frame-wise
autoencoder. Not here: how captions become classes (`class_labels`), or decoding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax import schema
from mgen_jax.data.buckets import Bucket
from mgen_jax.diffusion import gaussian, guidance
from mgen_jax.diffusion.flow_matching import draw_noise
from mgen_jax.encoders import Prompt
from mgen_jax.errors import ConfigError, UserError, check_ranges
from mgen_jax.models import latte
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.models.latte import LatteConfig
from mgen_jax.tasks import draws, text_inputs
from mgen_jax.tasks.base import ArraySpec
from mgen_jax.tasks.class_labels import ClassLabels
from mgen_jax.tasks.text_inputs import FeatureTextConfig
from mgen_jax.weights import latte as latte_weights

# Model keys that an earlier stage may have had otherwise: they shape no parameter.
_FREE = {"max_frames", "position_grid", "position_scale", "time_scale", "context_parallel"}
_FREE |= {"dtype", "remat", "scan_unroll", "norm_eps", "rotary_theta"}

_VIDEO_AXES = ("batch", "frames", "height", "width", "channels")


@dataclasses.dataclass(frozen=True)
class DiffusionSamplerConfig:
  """How samples are drawn; the defaults are those of the released configs."""

  method: Literal["ddpm", "ddim", "dpm_solver++"] = "ddpm"
  num_steps: int = 250
  spacing: Literal["even", "stride", "trailing"] = "even"
  guidance: float = 1.0  # 1: none; 7 for the classes of UCF101
  eta: float = 0.0  # of ddim

  def __post_init__(self):
    check_ranges(self, positive=("num_steps",), natural=("guidance", "eta"))


@dataclasses.dataclass(frozen=True)
class LatteTaskConfig:
  """The model, its condition, and how it is trained."""

  name: str = "latte"
  model: LatteConfig = LatteConfig()
  # The classes, in the order of their numbers; a caption is one of them, or has its words in order.
  class_names: tuple[str, ...] = ()
  text: Any = schema.one_of("kind", lambda: text_inputs.CONFIGS, default="bytes")  # with context
  stride: tuple[int, int, int] = (1, 8, 8)  # pixels per latent: (frames, height, width)
  condition_dropout: float = 0.1  # share of conditions replaced by none, for guidance
  images: int = 0  # drawn at random beside each clip, in joint training (the paper's: 8)
  schedule: Literal["linear", "zero_terminal_snr"] = "linear"
  prediction: Literal["noise", "velocity"] = "noise"
  sampler: DiffusionSamplerConfig = DiffusionSamplerConfig()

  def __post_init__(self):
    check_ranges(self, positive=("stride",), natural=("images",), share=("condition_dropout",))
    if self.model.classes != len(self.class_names):
      raise ConfigError(
        f"model.classes is {self.model.classes} and class_names has {len(self.class_names)} "
        "entries: name every class once."
      )
    if len(set(self.class_names)) != len(self.class_names):
      raise ConfigError("class_names has a name twice.")
    if not self.model.learn_variance:
      raise ConfigError("model.learn_variance is False: this objective learns the variance.")
    if isinstance(self.text, FeatureTextConfig) and self.text.online:
      raise ConfigError("text.online is True: Latte reads features that the encode stage wrote.")
    gaussian.process(None, self.schedule, self.prediction)
    self.check_sampler(self.sampler)

  @property
  def condition(self) -> Literal["class", "text", "none"]:
    """What the model is told besides the time."""
    if self.model.classes:
      return "class"
    return "text" if self.model.context_widths else "none"

  def check_sampler(self, sampler: DiffusionSamplerConfig) -> None:
    """Raises ConfigError for a sampler that cannot be used."""
    if sampler.method not in gaussian.SAMPLERS:
      raise ConfigError(
        f'sampler.method is "{sampler.method}": Latte is sampled by {", ".join(gaussian.SAMPLERS)}.'
      )
    gaussian.spaced_steps(sampler.num_steps, sampler.spacing)
    if sampler.guidance != 1 and self.condition == "none":
      raise ConfigError(
        f"guidance is {sampler.guidance:g}, and this model has no condition to be guided by: set "
        "it to 1."
      )

  def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
    """(F, H, W, C) of the latents of a bucket."""
    t, h, w = self.stride
    return (
      math.ceil(bucket.frames / t),
      bucket.height // h,
      bucket.width // w,
      self.model.in_channels,
    )

  def check_bucket(self, bucket: Bucket) -> None:
    """Raises ConfigError for a bucket that does not fit the strides or the time table."""
    for name, side, stride in zip(
      ("height", "width"), (bucket.height, bucket.width), self.stride[1:], strict=True
    ):
      unit = stride * self.model.patch
      if side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise ConfigError(f"{name} {side} is not a multiple of {unit}: use {nearest}.")
    frames, tube = self.latent_shape(bucket)[0], self.model.frame_stride
    if frames % tube:
      raise ConfigError(
        f"its {frames} latent frames do not divide into tubes of time_stride {tube}: use "
        f"{max(1, round(frames / tube)) * tube}."
      )
    if frames // tube > self.model.max_frames:
      raise ConfigError(
        f"its {frames // tube} frames exceed the time table's {self.model.max_frames}: set "
        f"model.max_frames to {frames // tube} (the table is computed, not learned)."
      )

  def check_latents(self, autoencoder: AutoencoderConfig, path: str) -> None:
    """Raises ConfigError where this model does not fit its text or the latents it reads."""
    if self.condition == "text" and self.model.context_widths != self.text.widths:
      raise ConfigError(
        f"{path}.task.model.context_widths is {self.model.context_widths}: the text has "
        f"{self.text.widths}."
      )
    stride = (autoencoder.time_stride, *autoencoder.space_strides)
    if stride != self.stride:
      raise ConfigError(f"{path}.task.stride is {self.stride}: the autoencoder's is {stride}.")
    if autoencoder.latent_channels != self.model.in_channels:
      raise ConfigError(
        f"{path}.task.model.in_channels is {self.model.in_channels}: the autoencoder has "
        f"{autoencoder.latent_channels}."
      )

  def check_origin(self, origin: "LatteTaskConfig", path: str) -> None:
    """Raises ConfigError where this model cannot start from the parameters of `origin`."""
    for key in (field.name for field in dataclasses.fields(self.model)):
      now, then = getattr(self.model, key), getattr(origin.model, key)
      if key not in _FREE and now != then:
        raise ConfigError(
          f"{path}.task.model.{key} is {now}, and {then} in the stage it starts from: give both "
          "the same."
        )


class Latte:
  """A class, a caption or nothing -> latents of videos."""

  source = "latents"

  def __init__(self, config: LatteTaskConfig):
    self.config = config
    self._model = latte.Latte(config.model)
    self._labels = ClassLabels(config.class_names) if config.class_names else None
    self._text = text_inputs.make(config.text) if config.condition == "text" else None

  # ---- parameters

  def init(self, key: jax.Array) -> Any:
    """Parameters {"latte": ..., "text": ...}, boxed with logical axis names.

    There is no "text" where nothing of a text is trained.
    """
    model, keys = self.config.model, jax.random.split(key)
    latents = jnp.zeros((1, model.frame_stride, model.patch, model.patch, model.in_channels))
    labels = jnp.zeros(1, jnp.int32) if model.classes else None
    context = [jnp.zeros((1, 1, width)) for width in model.context_widths] or None
    inputs = (latents, jnp.zeros(1), labels, context)
    params = {"latte": self._model.init(keys[0], *inputs)["params"]}
    text = None if self._text is None else self._text.init(keys[1])
    return params if text is None else {**params, "text": text}

  def adapt(self, params: Any, fresh: Any) -> Any:
    """Positions are computed: nothing grows from stage to stage."""
    del fresh
    return params

  def from_weights(self, flat: dict[str, np.ndarray], fresh: Any) -> Any:
    """Parameters that start from a DiT, a PixArt or a Latte (see `weights/latte.py`).

    Args:
      flat: arrays by their names there.
      fresh: parameters of this task at its start, a bare tree, for what the file has not.

    Raises:
      WeightsError: they fit neither.
    """
    started = latte_weights.start_from(flat, self.config.model, fresh["latte"])
    return {**fresh, "latte": started}

  # ---- training

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the prediction and bound of the variance, over the clip and its images.

    One step and one draw of dropout for a clip; its images share the step, and are dropped
    together, apart from the clip.
    """
    step_keys, noise_keys, drop_keys, image_keys = jax.vmap(
      lambda key: jax.random.split(key, 4), out_axes=1
    )(keys)
    x0, images = batch["latents"].astype(jnp.float32), 0
    if "images" in batch:
      images = batch["images"].shape[1]
      x0 = jnp.concatenate([x0, batch["images"].astype(jnp.float32)], 1)

    rate = self.config.condition_dropout
    drop = draws.bernoulli(drop_keys, rate)[:, None]  # [B, 1]
    if images:
      still = draws.bernoulli(image_keys, rate)[:, None]
      still = jnp.broadcast_to(still, (drop.shape[0], images))
      drop = jnp.concatenate([drop, still], 1)
    process = gaussian.process(None, self.config.schedule, self.config.prediction)
    index = gaussian.draw_steps(step_keys)
    noise = draw_noise(noise_keys, x0.shape[1:])
    xt = gaussian.add_noise(process, x0, noise, index)
    rows = self._conditions_of(batch, images)
    output = self._apply(self._model, params, xt, index, self._drop(rows, drop), images)
    square, bound = gaussian.losses(process, output, x0, noise, xt, index)
    return (square + bound).mean(), {"mse": square.mean(), "vlb": bound.mean()}

  def time_bins(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The middles of `count` equal parts of [0, 1] (1: all noise), which training draws evenly."""
    edges = np.linspace(0.0, 1.0, count + 1)
    return (edges[:-1] + edges[1:]) / 2, np.full(count, 1.0 / count)

  def losses_at(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array, times: jax.Array
  ) -> jax.Array:
    """The loss of each clip [B] (images beside it are not looked at) at its own share [B] of the
    diffusion's steps, with its condition, noise from its key."""
    noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    x0 = batch["latents"].astype(jnp.float32)
    process = gaussian.process(None, self.config.schedule, self.config.prediction)
    index = jnp.floor(times * gaussian.STEPS).astype(jnp.int32)
    noise = draw_noise(noise_keys, x0.shape[1:])
    xt = gaussian.add_noise(process, x0, noise, index)
    output = self._apply(self._model, params, xt, index, self._conditions_of(batch, 0))
    square, bound = gaussian.losses(process, output, x0, noise, xt, index)
    return square + bound

  def _conditions_of(self, batch: dict[str, jax.Array], images: int) -> dict[str, jax.Array]:
    """The entries of the condition, of the clip and then of its images: [B, 1 + I, ...]."""
    return {
      name: jnp.concatenate(
        [batch[name][:, None], *([batch[f"image_{name}"]] if images else [])], 1
      )
      for name in self._condition_names()
    }

  def _condition_names(self) -> tuple[str, ...]:
    if self._labels is not None:
      return ("labels",)
    return () if self._text is None else tuple(self._text.names)

  def _drop(self, rows: dict[str, jax.Array], drop: jax.Array) -> dict[str, jax.Array]:
    """The conditions [B, T, ...] with none where `drop` [B, T] is True."""
    if self._labels is not None:
      return {"labels": jnp.where(drop, self.config.model.classes, rows["labels"])}
    if self._text is None:
      return rows
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
    dropped = self._text.drop(flat, drop.reshape(-1))
    return {name: x.reshape(*drop.shape, *x.shape[1:]) for name, x in dropped.items()}

  def _apply(
    self,
    model: latte.Latte,
    params: Any,
    x: jax.Array,
    step: jax.Array,
    rows: dict[str, jax.Array],
    images: int = 0,
  ) -> jax.Array:
    """The model's output for conditions [B, 1 + images, ...]."""
    inputs: dict[str, Any] = {}
    if self._labels is not None:
      inputs["labels"] = rows["labels"]
    elif self._text is not None:
      count = 1 + images
      flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in rows.items()}
      features, masks = self._text.context(params.get("text"), flat)
      split = lambda a: a.reshape(-1, count, *a.shape[1:])  # noqa: E731
      inputs["context"] = [split(a) for a in features]
      inputs["context_mask"] = [split(a) for a in masks]
    return model.apply({"params": params["latte"]}, x, step, **inputs, images=images)

  # ---- sampling

  def sample(
    self,
    params: Any,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    bucket: Bucket,
    *,
    sampler: DiffusionSamplerConfig | None = None,
  ) -> jax.Array:
    """Normalised latents [B, F, H, W, C] for the conditions of a batch, noise from `keys` [B]."""
    sampler = self.config.sampler if sampler is None else sampler
    self.config.check_sampler(sampler)
    steps = gaussian.spaced_steps(sampler.num_steps, sampler.spacing)
    process = gaussian.process(steps, self.config.schedule, self.config.prediction)
    start, walk = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = draw_noise(start, self.config.latent_shape(bucket))
    rows = self._conditions_of(batch, 0)
    none = self._drop(rows, jnp.ones((keys.shape[0], 1), bool))
    model = guidance.guided(
      functools.partial(self._apply, self._model, params),
      rows,
      none,
      1 if self.config.condition == "none" else sampler.guidance,
      channels=self.config.model.in_channels,
    )
    return gaussian.sample(model, noise, process, walk, method=sampler.method, eta=sampler.eta)

  def reader(self, mesh: jax.sharding.Mesh) -> Callable[[Sequence[Prompt]], dict[str, np.ndarray]]:
    """A function of prompts, captions or names of classes, to the entries that `sample` reads.

    "" is no condition. The function raises UserError for a class that does not exist (and names
    the nearest), or where the model has no condition.
    """
    return self._classes if self._text is None else self._text.reader(mesh)

  def too_long(self, prompt: Prompt) -> list[str]:
    """What is not read of a prompt, in words."""
    return [] if self._text is None else self._text.too_long(prompt)

  def _classes(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    names = [prompt.text for prompt in prompts]
    if self._labels is not None:
      none = len(self.config.class_names)
      numbers = [none if name == "" else self._labels.number(name) for name in names]
      return {"labels": np.array(numbers, np.int32)}
    for name in filter(None, names):
      raise UserError(
        f"this model was trained without text and classes, and cannot draw {name!r}: leave the "
        "prompt out."
      )
    return {}

  # ---- batches and costs

  def batch_spec(self, bucket: Bucket, examples: int) -> dict[str, ArraySpec]:
    """ "latents" and the condition; for clips in joint training also "images" with theirs."""
    shape = self.config.latent_shape(bucket)
    specs = {"latents": ArraySpec((examples, *shape), np.float32, _VIDEO_AXES)}
    conditions = {}
    if self._labels is not None:
      conditions["labels"] = ArraySpec((examples,), np.int32, ("batch",))
    elif self._text is not None:
      conditions = self._text.batch_spec(examples)
    images = self.images(bucket)
    if images:
      specs["images"] = ArraySpec((examples, images, *shape[1:]), np.float32, _VIDEO_AXES)
      for name, one in conditions.items():
        shape, axes = (examples, images, *one.shape[1:]), (one.axes[0], None, *one.axes[1:])
        specs[f"image_{name}"] = ArraySpec(shape, one.dtype, axes)
    return specs | conditions

  def images(self, bucket: Bucket) -> int:
    """How many images come beside an example of a bucket (the input pipeline asks)."""
    return 0 if bucket.is_image else self.config.images

  def flops(self, bucket: Bucket) -> float:
    """Training FLOPs of one example: three times the forward pass, trained text included."""
    return sum(self.flops_by_part(bucket).values())

  def flops_by_part(self, bucket: Bucket) -> dict[str, float]:
    """`flops`, by part of the model."""
    images = self.images(bucket)
    lengths = self.config.text.lengths if self._text is not None else ()
    shape = self.config.latent_shape(bucket)[:3]
    parts = latte.flops(self.config.model, shape, lengths, images=images)
    trained = {name: 3.0 * part for name, part in parts.items()}
    if self._text is None:
      return trained
    return {**trained, "text_encoder": float((1 + images) * self._text.flops())}

  def tokens(self, bucket: Bucket) -> int:
    """Patches, those of images included."""
    frames, height, width = self.config.latent_shape(bucket)[:3]
    model = self.config.model
    return (frames // model.frame_stride + self.images(bucket)) * (
      (height // model.patch) * (width // model.patch)
    )

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """A record {"latents", "caption", ...}, and perhaps "images" -> one row of the batch."""
    row = {"latents": np.asarray(example["latents"], np.float32), **self._condition(example)}
    if "images" in example:
      still = [self.prepare(image) for image in example["images"]]
      row["images"] = np.concatenate([image["latents"] for image in still])  # [I, H, W, C]
      for name in self._condition_names():
        row[f"image_{name}"] = np.stack([image[name] for image in still])
    return row

  def _condition(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    if self._labels is not None:
      return {"labels": np.int32(self._labels.number(example["caption"]))}
    return {} if self._text is None else self._text.prepare(example)
