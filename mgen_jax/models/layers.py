"""The layers that every model of the project is built from, and nothing about any one model.

All parameters are fp32 and carry logical axis names (`mgen_jax.parallel.rules` maps the names to
mesh axes); `dtype` is the type of the computation. Norms compute in fp32 whatever the `dtype`.
Parameters named None in a dimension are replicated there.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mgen_jax.parallel.linear import linear, multiply

Array = jax.Array
Initializer = Callable[..., Array]

VIDEO_AXES = ("batch", "frames", "height", "width", "channels")

# Truncated normal of variance 1 / fan_in: the scale of the outputs equals that of the inputs.
fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def partitioned(init: Initializer, *names: str | None) -> Initializer:
  """The initializer with logical axis names, one for each dimension of the parameter."""
  return nn.with_logical_partitioning(init, names)


class Dense(nn.Module):
  """A linear map of the last dimension: [..., d_in] -> [..., features].

  Flax's DenseGeneral is not used: with several output axes it fails under `jax.set_mesh`.
  """

  features: int
  axes: tuple[str | None, str | None]  # logical names of the kernel's two dimensions
  use_bias: bool = False
  dtype: str = "float32"
  kernel_init: Initializer = fan_in_init
  # Logical names of [batch, tokens] of an input: its kernel is gathered where it is used.
  inputs: tuple[str, str] | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param(
      "kernel", partitioned(self.kernel_init, *self.axes), (x.shape[-1], self.features)
    )
    bias = None
    if self.use_bias:
      bias = self.param("bias", partitioned(nn.initializers.zeros, self.axes[1]), (self.features,))
    x = x.astype(self.dtype)
    if self.inputs is None:
      return multiply(x, kernel, bias)
    return linear(x, kernel, bias, names=self.inputs, kernel_names=self.axes)


class Norm(nn.Module):
  """RMSNorm (kind "rms") or LayerNorm (kind "layer") over the last dimension, in fp32."""

  kind: str = "rms"
  eps: float = 1e-5
  affine: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.kind not in ("rms", "layer"):
      raise ValueError(f"unknown norm {self.kind!r}: use 'rms' or 'layer'")
    parameters = []
    if self.affine:
      parameters = [self.param("scale", partitioned(nn.initializers.ones, None), (x.shape[-1],))]
      if self.kind == "layer":
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), (x.shape[-1],))
        parameters.append(bias)
    return _normalised(x, *parameters, kind=self.kind, eps=self.eps, dtype=self.dtype)


@functools.partial(jax.jit, static_argnames=("kind", "eps", "dtype"))  # written once in a program
def _normalised(
  x: Array, scale: Array | None = None, bias: Array | None = None, *, kind: str, eps: float, dtype
) -> Array:
  x = x.astype(jnp.float32)
  if kind == "layer":
    x = x - _to_rows(x.mean(-1), x.shape)
  x = x * _to_rows(jax.lax.rsqrt(jnp.mean(x * x, -1) + eps), x.shape)
  x = x if scale is None else x * expand(scale, x.shape)
  x = x if bias is None else x + expand(bias, x.shape)
  return x.astype(dtype)


def expand(x: Array, shape: Sequence[int]) -> Array:
  """`x`, whose dimensions are the last of `shape`, for every place of the first ones.

  What broadcasting does on its own, in one operation each way instead of three.
  """
  return jax.lax.broadcast_in_dim(x, shape, range(len(shape) - x.ndim, len(shape)))


def _to_rows(x: Array, shape: Sequence[int]) -> Array:
  """`x`, whose dimensions are the first of `shape`, for every place of the last one: likewise."""
  return jax.lax.broadcast_in_dim(x, shape, range(x.ndim))


class Affine(nn.Module):
  """Scale and bias [width] of a norm that is computed elsewhere, for several inputs at once."""

  width: int

  @nn.compact
  def __call__(self) -> tuple[Array, Array]:
    scale = self.param("scale", partitioned(nn.initializers.ones, None), (self.width,))
    return scale, self.param("bias", partitioned(nn.initializers.zeros, None), (self.width,))


class GroupNorm(nn.Module):
  """Group normalisation of each frame on its own: [..., height, width, channels].

  The statistics never cross frames, so an inflated image model still equals the image model on
  every frame, and a clip's reconstruction does not depend on its length through the norms.
  """

  groups: int = 32
  eps: float = 1e-6
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    scale = self.param("scale", partitioned(nn.initializers.ones, None), (channels,))
    bias = self.param("bias", partitioned(nn.initializers.zeros, None), (channels,))
    lead = x.shape[:-3]
    x = x.astype(jnp.float32)
    # Channel statistics first, then groups: the large array is read once and written once.
    grouped = (*lead, self.groups, channels // self.groups)
    mean = x.mean((-3, -2)).reshape(grouped).mean(-1, keepdims=True)
    square = jnp.square(x).mean((-3, -2)).reshape(grouped).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.eps)
    spread = lambda s: jnp.broadcast_to(s, grouped).reshape(*lead, 1, 1, channels)  # noqa: E731
    gain = spread(inverse) * scale
    return (x * gain + (bias - spread(mean) * gain)).astype(self.dtype)


class MLP(nn.Module):
  """Feed-forward layer: "swiglu" (gated, three matrices) or "silu" / "gelu" (two matrices)."""

  hidden: int
  activation: str = "swiglu"
  use_bias: bool = False
  dtype: str = "float32"
  activation_axes: tuple[str, ...] = ("batch", "tokens", "act_mlp")
  kernel_init: Initializer = fan_in_init

  @nn.compact
  def __call__(self, x: Array) -> Array:
    functions = {"swiglu": nn.silu, "silu": nn.silu, "gelu": nn.gelu}
    if self.activation not in functions:
      raise ValueError(f"unknown activation {self.activation!r}: use one of {sorted(functions)}")

    def dense(features, axes, name):
      return Dense(
        features,
        axes,
        self.use_bias,
        self.dtype,
        self.kernel_init,
        inputs=self.activation_axes[:2],
        name=name,
      )

    def project(name):
      return checkpoint_name(dense(self.hidden, ("embed", "mlp"), name)(x), "mlp_projection")

    act = functions[self.activation]
    if self.activation == "swiglu":
      hidden = act(project("gate")) * project("up")
    else:
      hidden = act(project("up"))
    hidden = nn.with_logical_constraint(hidden, self.activation_axes)
    return dense(x.shape[-1], ("mlp", "embed"), "down")(hidden)


def mlp_flops(tokens: int, width: int, hidden: int, activation: str) -> int:
  """Matmul FLOPs of one forward pass of `MLP` over `tokens` tokens."""
  return 2 * tokens * width * hidden * (3 if activation == "swiglu" else 2)


def sinusoidal_embedding(values: Array, features: int, scale: float = 1000.0) -> Array:
  """Sines and cosines of `scale * values` at frequencies from 1 to 1e-4: [B] -> [B, features]."""
  half = features // 2
  frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  shape = values.shape[0], half
  angles = _to_rows(scale * values.astype(jnp.float32), shape) * expand(frequencies, shape)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimeEmbedding(nn.Module):
  """The flow time t in [0, 1], one per example, as a vector: [B] -> [B, features]."""

  features: int
  frequencies: int = 256
  use_bias: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, time: Array) -> Array:
    x = sinusoidal_embedding(time, self.frequencies)
    dense = lambda axes, name: Dense(  # noqa: E731
      self.features, axes, use_bias=self.use_bias, dtype=self.dtype, name=name
    )
    return dense(("mlp", "embed"), "out")(nn.silu(dense((None, "mlp"), "in")(x)))


def convolve(
  x: Array, kernel: Array, strides: Sequence[int] = (1, 1), method: str = "direct"
) -> Array:
  """A 2D convolution without padding.

  Args:
    x: [..., height, width, c_in]; leading dimensions are a batch.
    kernel: [k_h, k_w, c_in, c_out].
    strides: over height and width.
    method: "direct" is `lax.conv` (accelerators); "matmul" gathers the patches and multiplies
      once, which makes a training step about 1.7 times faster on a CPU, where XLA's gradients of
      convolutions are slow, at the price of memory. Same values up to rounding.

  Returns:
    [..., height', width', c_out].
  """
  if method not in ("direct", "matmul"):
    raise ValueError(f"unknown convolution method {method!r}: use 'direct' or 'matmul'")
  k_h, k_w = kernel.shape[:2]
  lead, flat = x.shape[:-3], x.reshape(-1, *x.shape[-3:])
  if method == "direct":
    out = jax.lax.conv_general_dilated(
      flat, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out.reshape(*lead, *out.shape[1:])
  rows = (x.shape[-3] - k_h) // strides[0] + 1
  columns = (x.shape[-2] - k_w) // strides[1] + 1
  taps = [
    flat[
      :,
      i : i + (rows - 1) * strides[0] + 1 : strides[0],
      j : j + (columns - 1) * strides[1] + 1 : strides[1],
    ]
    for i in range(k_h)
    for j in range(k_w)
  ]
  patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, -1)
  out = multiply(patches, kernel.reshape(-1, kernel.shape[-1]))
  return out.reshape(*lead, *out.shape[1:])


def replicate_pad(x: Array, before: int, after: int, axis: int) -> Array:
  """Repeats the first slice of `axis` `before` times and the last `after` times."""
  widths = [(0, 0)] * x.ndim
  widths[axis % x.ndim] = (before, after)
  return jnp.pad(x, widths, mode="edge")


class SpatialConv(nn.Module):
  """A 2D convolution of every frame: [..., height, width, c_in] -> [..., height', width', c_out].

  `padding` is zeros on (before, after) of both axes; None keeps the size at stride 1.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None
  dtype: str = "float32"
  method: str = "direct"
  kernel_init: Initializer = fan_in_init

  @nn.compact
  def __call__(self, x: Array) -> Array:
    k = self.kernel
    kernel = self.param(
      "kernel",
      partitioned(self.kernel_init, None, None, "conv_in", "conv_out"),
      (k, k, x.shape[-1], self.features),
    )
    bias = self.param("bias", partitioned(nn.initializers.zeros, "conv_out"), (self.features,))
    pad = self.padding if self.padding is not None else (k // 2, k // 2)
    x = x.astype(self.dtype)
    if any(pad):
      x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [pad, pad, (0, 0)])
    x = convolve(x, kernel.astype(self.dtype), (self.stride, self.stride), self.method)
    return x + bias.astype(self.dtype)


def identity_tap_init(key, shape, dtype=jnp.float32) -> Array:
  """Temporal kernel [k, c_in, c_out] that copies its input: the centre tap is the identity."""
  del key
  return jnp.zeros(shape, dtype).at[shape[0] // 2].set(jnp.eye(shape[1], shape[2], dtype=dtype))


class TemporalConv(nn.Module):
  """A 1D convolution over time with symmetric replicate padding, the identity at the start.

  [B, T, H, W, C] -> [B, ceil(T / stride), H, W, C]. Output frame i is centred on input frame
  `stride * i`. Replicate padding is what lets a single frame pass as a video (Movie Gen, 3.1.1).
  """

  kernel: int = 3
  stride: int = 1
  dtype: str = "float32"
  method: str = "direct"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, _, height, width, channels = x.shape
    kernel = self.param(
      "kernel",
      partitioned(identity_tap_init, None, "conv_in", "conv_out"),
      (self.kernel, channels, channels),
    )
    bias = self.param("bias", partitioned(nn.initializers.zeros, "conv_out"), (channels,))
    half = self.kernel // 2
    x = replicate_pad(x.astype(self.dtype), half, half, axis=1)
    x = x.reshape(batch, x.shape[1], height * width, channels)
    x = convolve(x, kernel.astype(self.dtype)[:, None], (self.stride, 1), self.method)
    return x.reshape(batch, x.shape[1], height, width, channels) + bias.astype(self.dtype)


class VolumeConv(nn.Module):
  """A 3D convolution: [B, T, H, W, c_in] -> [B, ceil(T / stride), H', W', features].

  Time is padded by replicating, as in `TemporalConv`; space by zeros, as in `SpatialConv`.
  """

  features: int
  kernel: tuple[int, int, int]  # time, height, width
  strides: tuple[int, int, int] = (1, 1, 1)
  padding: tuple[int, int] | None = None  # of both axes of space; None keeps the size at stride 1
  dtype: str = "float32"
  method: str = "direct"
  kernel_init: Initializer = fan_in_init

  @nn.compact
  def __call__(self, x: Array) -> Array:
    taps, k_h, k_w = self.kernel
    kernel = self.param(
      "kernel",
      partitioned(self.kernel_init, None, None, None, "conv_in", "conv_out"),
      (*self.kernel, x.shape[-1], self.features),
    ).astype(self.dtype)
    bias = self.param("bias", partitioned(nn.initializers.zeros, "conv_out"), (self.features,))
    x = replicate_pad(x.astype(self.dtype), taps // 2, (taps - 1) // 2, axis=1)
    rows, columns = ((self.padding,) * 2) if self.padding else ((k_h // 2,) * 2, (k_w // 2,) * 2)
    x = jnp.pad(x, ((0, 0), (0, 0), rows, columns, (0, 0)))
    # As one 2D convolution of neighbouring frames joined on the channels: XLA takes four times as
    # long to compile a 3D one with its gradients for a TPU.
    frames = (x.shape[1] - taps) // self.strides[0] + 1
    last = (frames - 1) * self.strides[0] + 1
    near = [x[:, i : i + last : self.strides[0]] for i in range(taps)]
    joined = jnp.moveaxis(kernel, 0, 2).reshape(k_h, k_w, -1, self.features)
    x = convolve(jnp.concatenate(near, -1), joined, self.strides[1:], self.method)
    return x + bias.astype(self.dtype)
