"""The temporal autoencoder as a task: reconstruction and KL (Movie Gen, section 3.1.1)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.data.buckets import Bucket
from mgen_jax.diffusion import flow_matching
from mgen_jax.errors import ConfigError
from mgen_jax.models import autoencoder, autoencoder_flops
from mgen_jax.models.autoencoder import AutoencoderConfig
from mgen_jax.tasks.base import ArraySpec


@dataclasses.dataclass(frozen=True)
class AutoencoderTaskConfig:
  """The autoencoder and the weights of its losses.

  The paper names the losses without their weights. All terms are means: over pixels and channels
  for the reconstruction, over latents and channels for the KL.
  """

  name: str = "autoencoder"
  model: AutoencoderConfig = AutoencoderConfig()
  l1_weight: float = 1.0
  l2_weight: float = 0.0
  kl_weight: float = 1e-6

  def check_bucket(self, bucket: Bucket) -> None:
    """Raises ConfigError for a bucket that the strides do not divide."""
    self.model.latent_shape(bucket.frames, bucket.height, bucket.width)

  def check_origin(self, origin: "AutoencoderTaskConfig", path: str) -> None:
    """Raises ConfigError where this model cannot start from the parameters of `origin`."""
    free = {key: getattr(self.model, key) for key in ("conv_method", "dtype")}
    if dataclasses.replace(origin.model, **free) != self.model:
      raise ConfigError(f"{path}.task.model differs from that of the stage it starts from.")


class AutoencoderTask:
  """Videos -> latents -> videos."""

  source = "media"

  def __init__(self, config: AutoencoderTaskConfig):
    self.config = config
    self._model = autoencoder.Autoencoder(config.model)

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with logical axis names."""
    rows, columns = self.config.model.space_strides
    video = jnp.zeros((1, self.config.model.time_stride, rows, columns, 3))
    return self._model.init(key, video)["params"]

  def adapt(self, params: Any, fresh: Any) -> Any:
    """Nothing of an autoencoder grows from stage to stage."""
    del fresh
    return params

  def loss(
    self, params: Any, batch: dict[str, jax.Array], keys: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of "video" uint8 [B, T, H, W, 3]; the latent is drawn from its posterior with `keys`."""
    video = to_float(batch["video"])
    bucket = Bucket(*video.shape[1:4])
    noise = flow_matching.draw_noise(keys, self._latent_shape(bucket))
    made, mean, logvar = self._model.apply({"params": params}, video, noise)
    error = made.astype(jnp.float32) - video
    l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
    # KL(N(mean, var) || N(0, 1)), averaged over all latent values.
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    cfg = self.config
    loss = cfg.l1_weight * l1 + cfg.l2_weight * l2 + cfg.kl_weight * kl
    # The range of pixels is 2, so its square is 4.
    psnr = 10.0 * jnp.log10(4.0 / jnp.maximum(l2, 1e-10))
    return loss, {"l1": l1, "kl": kl, "psnr": psnr}

  def encode(self, params: Any, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 [B, T, H, W, 3] -> mean and log-variance of the latents."""
    return self._model.apply({"params": params}, to_float(video), method="encode")

  def decode(self, params: Any, latents: jax.Array, frames: int) -> jax.Array:
    """Latents -> uint8 [B, frames, H, W, 3]."""
    return to_uint8(self._model.apply({"params": params}, latents, frames, method="decode"))

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
    """Training FLOPs of one example: three times the forward pass."""
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


def to_float(video: jax.Array) -> jax.Array:
  """uint8 0-255 -> fp32 in [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
  """About [-1, 1] -> uint8, clipped and rounded."""
  return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
