"""The temporal autoencoder as a task: reconstruction, perceptual, KL, outlier, adversarial losses
(Movie Gen, section 3.1.1).

Its parameters are those of the model, "encoder" and "decoder", and beside them "discriminator" and
"perceptual" where the config has such losses; the last is never trained.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from mgen_jax.data.buckets import Bucket
from mgen_jax.diffusion import flow_matching
from mgen_jax.errors import ConfigError, check_ranges
from mgen_jax.models import autoencoder, autoencoder_flops, perceptual
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.models.discriminator import Discriminator, DiscriminatorConfig
from mgen_jax.parallel import sums
from mgen_jax.tasks import autoencoder_losses as losses
from mgen_jax.tasks.base import ArraySpec
from mgen_jax.weights import autoencoder_kl, files, lpips

MODEL = ("encoder", "decoder")  # the parameters that make latents and videos
# How a model may differ from the one it starts from: they hold the same parameters.
_FREE = ("conv_method", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class AutoencoderTaskConfig:
  """The autoencoder and the weights of its losses.

  The paper names the losses without their weights. All terms are means: over pixels and channels
  for the reconstruction, over latents and channels for the KL (`autoencoder_losses`).
  """

  name: str = "autoencoder"
  model: AutoencoderConfig = AutoencoderConfig()
  l1_weight: float = 1.0
  l2_weight: float = 0.0
  kl_weight: float = 1e-6
  perceptual_weight: float = 0.0
  # "lpips" needs `lpips_weights`; "ms_ssim" needs none; "auto" is the first where they are named.
  perceptual: str = "auto"
  lpips_weights: tuple[str, ...] = ()  # safetensors of VGG16 and of LPIPS, or one with both
  outlier_weight: float = 0.0  # beside means: see autoencoder_losses.mean_reduced_weight
  outlier_r: float = 3.0
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  # safetensors of an image autoencoder (diffusers' AutoencoderKL) that training starts from.
  image_weights: str | None = None

  def __post_init__(self):
    weights = [field.name for field in dataclasses.fields(self) if field.name.endswith("_weight")]
    check_ranges(self, natural=(*weights, "outlier_r"))
    self.model.check()
    if self.perceptual not in ("auto", "lpips", "ms_ssim"):
      raise ConfigError(f"unknown perceptual {self.perceptual!r}: use 'auto', 'lpips' or 'ms_ssim'")
    if self.image_weights is not None:
      autoencoder_kl.check_layout(self.model)
    if self.perceptual == "lpips" and not self.lpips_weights:
      raise ConfigError(
        "perceptual is 'lpips' but lpips_weights is empty: name the files, or use 'ms_ssim'"
      )

  @property
  def has_lpips(self) -> bool:
    """Whether the perceptual distance is LPIPS and not multi-scale SSIM."""
    return self.perceptual_weight > 0 and self.perceptual != "ms_ssim" and bool(self.lpips_weights)

  def check_bucket(self, bucket: Bucket) -> None:
    """Raises ConfigError for a bucket that the strides do not divide."""
    self.model.latent_shape(bucket.frames, bucket.height, bucket.width)

  def check_origin(self, origin: "AutoencoderTaskConfig", path: str) -> None:
    """Raises ConfigError where this model cannot start from the parameters of `origin`."""
    free = {key: getattr(self.model, key) for key in _FREE}
    before = dataclasses.replace(origin.model, **free)
    inflated = not before.temporal and before == _frame_wise(self.model)
    if before != self.model and not inflated:
      raise ConfigError(
        f"{path}.task.model differs from that of the stage it starts from, and is not that model "
        "inflated in time either."
      )


class AutoencoderTask:
  """Videos -> latents -> videos."""

  source = "media"
  untrained = ("perceptual",)

  def __init__(self, config: AutoencoderTaskConfig):
    self.config = config
    self._model = autoencoder.Autoencoder(config.model)
    self._discriminator = Discriminator(config.discriminator, config.model.dtype)
    self._lpips = perceptual.Lpips(config.model.dtype)

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with logical axis names."""
    cfg = self.config
    rows, columns = cfg.model.space_strides
    video = jnp.zeros((1, cfg.model.time_stride, rows, columns, 3))
    params = dict(self._model.init(key, video)["params"])
    frame = jnp.zeros((1, 1, 32, 32, 3))
    if cfg.discriminator.weight:
      key = jax.random.fold_in(key, 1)
      params["discriminator"] = self._discriminator.init(key, frame)["params"]
    if cfg.has_lpips:
      params["perceptual"] = self._lpips.init(key, frame, frame)["params"]
    return params

  def adapt(self, params: Any, fresh: Any) -> Any:
    """Inflates an image model in time, and adds the parts that the earlier stage did not have."""
    have, made = traverse_util.flatten_dict(params), {}
    for path, leaf in traverse_util.flatten_dict(fresh).items():
      spatial = tuple("spatial" if name == "volume" else name for name in path)
      made[path] = have.get(path, leaf)
      if path not in have and spatial in have:
        kernel = have[spatial]
        made[path] = (
          kernel if kernel.ndim == 1 else jnp.zeros_like(leaf).at[leaf.shape[0] // 2].set(kernel)
        )
    return traverse_util.unflatten_dict(made)

  def pretrained(self, have: Collection[str]) -> dict[str, np.ndarray]:
    """Parameters that come from files, by name with slashes: what training starts with.

    Args:
      have: the top-level parameters that an earlier stage gives.

    Raises:
      WeightsError: a file that cannot be read or does not fit.
    """
    cfg, made = self.config, {}
    if cfg.image_weights is not None and "encoder" not in have:
      tensors = files.read_tensors(cfg.image_weights)
      made |= autoencoder_kl.import_image(tensors, cfg.model, cfg.image_weights)
      logging.info("the autoencoder starts from the image autoencoder %s", cfg.image_weights)
    if cfg.has_lpips and "perceptual" not in have:
      tensors = {}
      for path in cfg.lpips_weights:
        tensors |= files.read_tensors(path)
      found = lpips.import_lpips(tensors, " with ".join(cfg.lpips_weights))
      made |= {f"perceptual/{name}": value for name, value in found.items()}
    elif cfg.perceptual_weight and not cfg.has_lpips:
      logging.info("the perceptual loss is multi-scale SSIM, which needs no weights (not LPIPS)")
    return made

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of "video" uint8 [B, T, H, W, 3], without the adversarial part; the latent is drawn from its
    posterior with `keys`."""
    loss, metrics, _ = self._reconstruct(params, batch, keys)
    return loss, metrics

  def loss_at(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array, step: jax.Array
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Both players' losses at a step: each has a gradient for its own parameters only."""
    loss, metrics, (made, features) = self._reconstruct(params, batch, keys)
    cfg = self.config.discriminator
    if not cfg.weight:
      return {"autoencoder": loss}, metrics
    video = to_float(batch["video"])
    play = functools.partial(self._adversarial, params, video, made, features)
    rest = lambda: (jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))  # noqa: E731
    player, opponent, weight = jax.lax.cond(step >= cfg.start_step, play, rest)
    metrics = {**metrics, "adversarial_weight": weight}
    return {"autoencoder": loss + player, "discriminator": opponent}, metrics

  def _reconstruct(self, params, batch, keys):
    """Loss and metrics of the autoencoder alone, the video it made, and what its last map saw."""
    cfg = self.config
    video = to_float(batch["video"])
    noise = flow_matching.draw_noise(keys, self._latent_shape(Bucket(*video.shape[1:4])))
    model = {"params": {name: params[name] for name in MODEL}}
    mean, logvar = self._model.apply(model, video, method="encode")
    latents = mean + jnp.exp(0.5 * logvar) * noise
    features = self._model.apply(model, latents, method="decode_features")
    made = self._model.apply(model, features, video.shape[1], method="decode_output")
    l1, l2 = sums.mean(jnp.abs(made - video)), sums.mean(jnp.square(made - video))
    kl = losses.kl(mean, logvar)
    loss = self._rebuild_loss(params, video, made) + cfg.kl_weight * kl
    metrics = {"l1": l1, "kl": kl, "psnr": losses.psnr(l2), "spot": losses.spot_norm(mean)}
    if cfg.outlier_weight:
      metrics["outlier"] = losses.outlier_penalty(latents, cfg.outlier_r)
      loss += cfg.outlier_weight * metrics["outlier"]
    return loss, metrics, (made, features)

  def _rebuild_loss(self, params, video, made):
    """What depends on the pixels made: the part that the adversarial loss is weighed against."""
    cfg, error = self.config, made - video
    loss = cfg.l1_weight * sums.mean(jnp.abs(error)) + cfg.l2_weight * sums.mean(jnp.square(error))
    if not cfg.perceptual_weight:
      return loss
    if cfg.has_lpips:
      weights = {"params": jax.lax.stop_gradient(params["perceptual"])}
      distance = self._lpips.apply(weights, made, video)
    else:
      distance = perceptual.ms_ssim_distance(made, video)
    return loss + cfg.perceptual_weight * distance.mean()

  def _adversarial(self, params, video, made, features):
    """(the autoencoder's loss, the discriminator's, the weight of the first)."""
    cfg = self.config.discriminator
    apply = lambda params, x: self._discriminator.apply({"params": params}, x)  # noqa: E731
    fixed = jax.lax.stop_gradient(params["discriminator"])
    weight = jnp.asarray(cfg.weight)
    if cfg.adaptive:
      model = jax.lax.stop_gradient({name: params[name] for name in MODEL})
      features, path = jax.lax.stop_gradient(features), _last_kernel(self.config.model)
      flat = traverse_util.flatten_dict(model)

      def decode(kernel):
        tree = traverse_util.unflatten_dict({**flat, path: kernel})
        return self._model.apply({"params": tree}, features, video.shape[1], method="decode_output")

      weight *= losses.adaptive_weight(
        lambda kernel: self._rebuild_loss(params, video, decode(kernel)),
        lambda kernel: losses.hinge_generator(apply(fixed, decode(kernel))),
        flat[path],
      )
    player = weight * losses.hinge_generator(apply(fixed, made))
    real = apply(params["discriminator"], video)
    fake = apply(params["discriminator"], jax.lax.stop_gradient(made))
    opponent = losses.hinge_discriminator(real, fake)
    if cfg.r1_weight:
      logits = functools.partial(apply, params["discriminator"])
      opponent += cfg.r1_weight * losses.r1_penalty(logits, video)
    return player, opponent, weight

  def encode(self, params: Any, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 [B, T, H, W, 3] -> mean and log-variance of the latents."""
    return self._apply(params, to_float(video), method="encode")

  def decode(self, params: Any, latents: jax.Array, frames: int) -> jax.Array:
    """Latents -> uint8 [B, frames, H, W, 3]."""
    return to_uint8(self._apply(params, latents, frames, method="decode"))

  def _apply(self, params, *args, method):
    model = {name: params[name] for name in MODEL}
    return self._model.apply({"params": model}, *args, method=method)

  def sample(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array, bucket: Bucket
  ) -> jax.Array:
    """The reconstruction of "video" from the mean of its latents, uint8."""
    del keys
    return self.decode(params, self.encode(params, batch["video"])[0], bucket.frames)

  def batch_spec(self, bucket: Bucket, examples: int) -> dict[str, ArraySpec]:
    """ "video"."""
    shape = (examples, bucket.frames, bucket.height, bucket.width, 3)
    return {"video": ArraySpec(shape, np.uint8, ("batch", "frames", "height", "width", "channels"))}

  def flops(self, bucket: Bucket) -> float:
    """Training FLOPs of one example: three times the autoencoder's forward pass. Discriminator and
    perceptual network are not counted: they are means of training, not the model."""
    return sum(self.flops_by_part(bucket).values())

  def flops_by_part(self, bucket: Bucket) -> dict[str, float]:
    """`flops`, by part of the model."""
    shape = (bucket.frames, bucket.height, bucket.width)
    return {k: 3.0 * v for k, v in autoencoder_flops.flops(self.config.model, shape).items()}

  def tokens(self, bucket: Bucket) -> int:
    """Latent positions."""
    return math.prod(self._latent_shape(bucket)[:3])

  def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """A record {"video", ...} -> one row of the batch."""
    return {"video": example["video"]}

  def _latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
    return self.config.model.latent_shape(bucket.frames, bucket.height, bucket.width)


def _frame_wise(model: AutoencoderConfig) -> AutoencoderConfig:
  """The image model behind an inflated one, whose fields of time count no more."""
  same = AutoencoderConfig()
  return dataclasses.replace(
    autoencoder_kl.frame_wise(model),
    inflation=same.inflation,
    temporal_attention=same.temporal_attention,
    temporal_kernel=same.temporal_kernel,
  )


def _last_kernel(model: AutoencoderConfig) -> tuple[str, ...]:
  """Where the parameters hold the decoder's last kernel."""
  if model.has_patch:
    return ("decoder", "patch_out", "kernel")
  half = "volume" if model.temporal and model.inflation == "3d" else "spatial"
  return ("decoder", "conv_out", half, "kernel")


def to_float(video: jax.Array) -> jax.Array:
  """uint8 0-255 -> fp32 in [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
  """About [-1, 1] -> uint8, clipped and rounded."""
  return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
