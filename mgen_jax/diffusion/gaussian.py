"""Gaussian diffusion with a learned variance: the objective and the samplers of Latte (and DiT).

Legend: x_0 data, e ~ N(0, I) noise, t in 0 .. T - 1 the step (T - 1 is the noisiest), abar_t the
product of 1 - beta up to t,
  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e                     the noisy data,
  q(x_{t-1} | x_t, x_0) = N(mu_t(x_0, x_t), betatilde_t)           the posterior,
  log var_t = f log beta_t + (1 - f) log betatilde_t, f = (v + 1) / 2   the learned variance.
The model's output has twice the channels of x: e (or the velocity sqrt(abar) e - sqrt(1 - abar)
x_0), then v. It is told the step of the full process, also when only some steps are walked.

Tables are float64 and cast to fp32 where they are used. The zero-terminal-SNR schedule is that of
`v_prediction`, Movie Gen's ablation arm, which learns no variance.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.diffusion import v_prediction
from mgen_jax.errors import ConfigError
from mgen_jax.parallel import sums

Array = jax.Array
Model = Callable[[Array, Array], Array]  # (x_t [B, ..., C], step int [B]) -> [B, ..., 2C]

STEPS = 1000
SAMPLERS = ("ddpm", "ddim", "dpm_solver++")
SCHEDULES = ("linear", "zero_terminal_snr")
Prediction = Literal["noise", "velocity"]


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
  """A diffusion process over some of the steps: its tables, all float64 [N].

  Attributes:
    steps: of the full process, rising; what the model is told.
    betas: of this process: 1 - abar_i / abar_{i-1}.
    abar: cumulative product of 1 - beta.
    abar_before: that of the step before, 1 for the first.
    prediction: what the first half of the model's output is.
  """

  steps: np.ndarray
  betas: np.ndarray
  abar: np.ndarray
  abar_before: np.ndarray
  prediction: Prediction

  def __len__(self) -> int:
    return len(self.steps)

  @property
  def posterior_variance(self) -> np.ndarray:
    """betatilde."""
    return self.betas * (1.0 - self.abar_before) / (1.0 - self.abar)

  @property
  def posterior_log_variance(self) -> np.ndarray:
    """Its logarithm; that of the first step, which is log 0, is taken from the second."""
    variance = self.posterior_variance
    return np.log(np.append(variance[1:2], variance[1:]))

  @property
  def posterior_weights(self) -> tuple[np.ndarray, np.ndarray]:
    """Of x_0 and of x_t in mu_t."""
    of_data = self.betas * np.sqrt(self.abar_before) / (1.0 - self.abar)
    of_noisy = (1.0 - self.abar_before) * np.sqrt(1.0 - self.betas) / (1.0 - self.abar)
    return of_data, of_noisy


@functools.cache
def process(
  steps: tuple[int, ...] | None = None,
  schedule: str = "linear",
  prediction: Prediction = "noise",
) -> Process:
  """The process that walks `steps` of the full one, from `spaced_steps`; None: all of them.

  Args:
    steps: rising.
    schedule: "linear" (betas from 1e-4 to 0.02) or "zero_terminal_snr" (v_prediction.py).
    prediction: "noise" or "velocity"; a schedule without signal at its end needs the latter, since
      noise alone does not say what the data were.

  Raises:
    ConfigError: an unknown schedule, or one that does not go with the prediction.
  """
  if schedule not in SCHEDULES:
    raise ConfigError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}.")
  if schedule == "zero_terminal_snr" and prediction == "noise":
    raise ConfigError(
      'schedule "zero_terminal_snr" ends in pure noise, from which predicted noise cannot tell the '
      'data: set prediction to "velocity".'
    )
  if schedule == "linear":
    # As a cumulative product, and back: the released code does so too, and its betas differ from
    # evenly spaced ones in their last digits.
    full = np.cumprod(1.0 - np.linspace(1e-4, 0.02, STEPS, dtype=np.float64))
  else:
    full = v_prediction.signal_levels() ** 2
  chosen = np.arange(STEPS) if steps is None else np.asarray(steps)
  betas, last = [], 1.0
  for value in full[chosen]:
    betas.append(1.0 - value / last)
    last = value
  betas = np.array(betas)
  abar = np.cumprod(1.0 - betas)
  return Process(chosen, betas, abar, np.append(1.0, abar[:-1]), prediction)


def spaced_steps(count: int, spacing: str = "even") -> tuple[int, ...]:
  """`count` of the 1000 steps.

  Args:
    count: of steps.
    spacing: "even" has both ends (0, 4, 8, ..., 999 for 250); "stride" is that of DDIM, multiples
      of a whole number from 0 on, which only some counts have; "trailing" ends at the noisiest step
      and is evenly spaced from there, as zero terminal SNR needs.

  Raises:
    ConfigError: that many steps are not there.
  """
  if not 1 <= count <= STEPS:
    raise ConfigError(f"num_steps {count} cannot be used: diffusion has 1 to {STEPS} steps")
  if spacing == "even":
    stride = (STEPS - 1) / (count - 1) if count > 1 else 1.0
    steps, at = [], 0.0
    for _ in range(count):  # summed, as the released code does: its rounding is part of the steps
      steps.append(round(at))
      at += stride
    return tuple(steps)
  if spacing == "stride":
    for stride in range(1, STEPS + 1):
      if len(range(0, STEPS, stride)) == count:
        return tuple(range(0, STEPS, stride))
    near = min(
      (len(range(0, STEPS, stride)) for stride in range(1, STEPS + 1)),
      key=lambda n: abs(n - count),
    )
    raise ConfigError(f"no whole stride gives num_steps {count}: use {near}, or spacing 'even'.")
  if spacing == "trailing":
    return tuple(int(step) for step in v_prediction.sampling_steps(count)[::-1])
  raise ConfigError(f"unknown spacing {spacing!r}: use 'even', 'stride' or 'trailing'.")


# --------------------------------------------------------------------------------------------------
# What the model's output means.


def _at(table: np.ndarray, index: Array, like: Array) -> Array:
  """Entries of a float64 table at indices [B], as fp32 with the rank of `like`."""
  values = jnp.asarray(table.astype(np.float32))[index]
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def add_noise(proc: Process, x0: Array, e: Array, index: Array) -> Array:
  """x_t of data and noise [B, ...] at indices [B] into the process."""
  signal, noise = np.sqrt(proc.abar), np.sqrt(1.0 - proc.abar)
  return _at(signal, index, x0) * x0 + _at(noise, index, x0) * e


def target(proc: Process, x0: Array, e: Array, index: Array) -> Array:
  """What the first half of the output is to be."""
  if proc.prediction == "noise":
    return e
  signal, noise = np.sqrt(proc.abar), np.sqrt(1.0 - proc.abar)
  return _at(signal, index, x0) * e - _at(noise, index, x0) * x0


def data_from(proc: Process, xt: Array, predicted: Array, index: Array) -> Array:
  """The x_0 that a prediction points to."""
  if proc.prediction == "noise":
    a, b = np.sqrt(1.0 / proc.abar), np.sqrt(1.0 / proc.abar - 1.0)
  else:
    a, b = np.sqrt(proc.abar), np.sqrt(1.0 - proc.abar)
  return _at(a, index, xt) * xt - _at(b, index, xt) * predicted


def noise_from(proc: Process, xt: Array, x0: Array, predicted: Array, index: Array) -> Array:
  """The noise that a prediction points to."""
  if proc.prediction == "velocity":
    signal, noise = np.sqrt(proc.abar), np.sqrt(1.0 - proc.abar)
    return _at(noise, index, xt) * xt + _at(signal, index, xt) * predicted
  # From x_0 and back, as the released code does.
  a, b = np.sqrt(1.0 / proc.abar), np.sqrt(1.0 / proc.abar - 1.0)
  return (_at(a, index, xt) * xt - x0) / _at(b, index, xt)


def posterior_mean(proc: Process, x0: Array, xt: Array, index: Array) -> Array:
  """mu_t(x_0, x_t)."""
  of_data, of_noisy = proc.posterior_weights
  return _at(of_data, index, xt) * x0 + _at(of_noisy, index, xt) * xt


def log_variance(proc: Process, logits: Array, index: Array) -> Array:
  """log var_t of the second half of the output."""
  low = _at(proc.posterior_log_variance, index, logits)
  high = _at(np.log(np.maximum(proc.betas, 1e-20)), index, logits)
  share = (logits + 1.0) / 2.0
  return share * high + (1.0 - share) * low


# --------------------------------------------------------------------------------------------------
# Training.


def draw_steps(keys: Array) -> Array:
  """One uniform step for each key: [B] -> int [B]."""
  return jax.vmap(lambda key: jax.random.randint(key, (), 0, STEPS))(keys)


def losses(
  proc: Process, output: Array, x0: Array, e: Array, xt: Array, index: Array
) -> tuple[Array, Array]:
  """The two terms of the loss of each example, fp32 [B].

  Args:
    proc: the process that was trained.
    output: of the model, [B, ..., 2C].
    x0, e, xt: data, noise and noisy data [B, ..., C].
    index: into the process [B].

  Returns:
    The squared error of the prediction, and the variational bound in bits, through which the
    variance learns but not the prediction. Their sum is the loss, without a factor.
  """
  output = output.astype(jnp.float32)
  predicted, logits = jnp.split(output, 2, -1)
  square = jnp.square(target(proc, x0, e, index) - predicted)
  frozen = jax.lax.stop_gradient(predicted)
  mean = posterior_mean(proc, data_from(proc, xt, frozen, index), xt, index)
  model_log = log_variance(proc, logits, index)
  true_mean = posterior_mean(proc, x0, xt, index)
  true_log = _at(proc.posterior_log_variance, index, x0)
  kl = 0.5 * (
    -1.0
    + model_log
    - true_log
    + jnp.exp(true_log - model_log)
    + jnp.square(true_mean - mean) * jnp.exp(-model_log)
  )
  # At the first step data are compared with a Gaussian in steps of 1/255, as if they were pixels:
  # inherited from pixel diffusion, and kept.
  first = (index == 0).reshape(index.shape + (1,) * (x0.ndim - 1))
  # What is not taken must not make the gradient infinite.
  safe_log = jnp.where(first, model_log, 0.0)
  bound = jnp.where(first, -discretised_log_likelihood(x0, mean, 0.5 * safe_log), kl)
  return sums.mean_of_each(square), sums.mean_of_each(bound) / math.log(2.0)


def discretised_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
  """log of the mass that a Gaussian gives the bin of 2/255 around each x in [-1, 1], in nats."""
  inverse = jnp.exp(-log_scale)
  upper = _normal_cdf(inverse * (x - mean + 1.0 / 255.0))
  lower = _normal_cdf(inverse * (x - mean - 1.0 / 255.0))
  log = lambda p: jnp.log(jnp.maximum(p, 1e-12))  # noqa: E731
  inner = jnp.where(x > 0.999, log(1.0 - lower), log(upper - lower))
  return jnp.where(x < -0.999, log(upper), inner)


def _normal_cdf(x: Array) -> Array:
  """The tanh approximation that the released code has."""
  return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


# --------------------------------------------------------------------------------------------------
# Sampling.


def ddpm_step(proc: Process, output: Array, xt: Array, e: Array, index: Array) -> Array:
  """x_{t-1} drawn from the model's Gaussian, with noise `e`; its mean at the first step."""
  predicted, logits = jnp.split(output.astype(jnp.float32), 2, -1)
  mean = posterior_mean(proc, data_from(proc, xt, predicted, index), xt, index)
  later = (index != 0).reshape(index.shape + (1,) * (xt.ndim - 1))
  return mean + later * jnp.exp(0.5 * log_variance(proc, logits, index)) * e


def ddim_step(
  proc: Process, output: Array, xt: Array, index: Array, eta: float = 0.0, e: Array | None = None
) -> Array:
  """The step of DDIM (Song et al., 2021); with `eta` > 0 it needs noise `e`."""
  predicted = output.astype(jnp.float32)[..., : xt.shape[-1]]
  x0 = data_from(proc, xt, predicted, index)
  noise = noise_from(proc, xt, x0, predicted, index)
  before = proc.abar_before
  share = np.sqrt((1.0 - before) / (1.0 - proc.abar)) * np.sqrt(1.0 - proc.abar / before)
  sigma = eta * share
  made = _at(np.sqrt(before), index, xt) * x0
  made = made + _at(np.sqrt(np.maximum(1.0 - before - sigma**2, 0.0)), index, xt) * noise
  if eta and e is not None:
    later = (index != 0).reshape(index.shape + (1,) * (xt.ndim - 1))
    made = made + later * _at(sigma, index, xt) * e
  return made


def sample(
  model: Model,
  noise: Array,
  proc: Process,
  keys: Array | None = None,
  *,
  method: str = "ddpm",
  eta: float = 0.0,
) -> Array:
  """Walks the process from its noisiest step to the data, as one scan.

  Args:
    model: (x_t [B, ..., C], step of the full process int [B]) -> [B, ..., 2C] (or C for DDIM and
      DPM-Solver++, which use no variance); guidance included.
    noise: [B, ..., C].
    proc: the steps to walk.
    keys: [B], for the samplers that draw noise on the way.
    method: "ddpm", "ddim" or "dpm_solver++" (second order, multistep).
    eta: of DDIM: 0 is deterministic.

  Returns:
    Data [B, ..., C] in fp32.

  Raises:
    ConfigError: an unknown method.
  """
  if method not in SAMPLERS:
    raise ConfigError(f"unknown sampler {method!r}: use one of {', '.join(SAMPLERS)}")
  noise = noise.astype(jnp.float32)
  if method == "dpm_solver++":
    return _dpm_solver(model, noise, proc)
  draws = method == "ddpm" or eta > 0
  if draws and keys is None:
    raise ValueError(f"{method} with eta {eta} draws noise and needs keys")

  def one_step(x, number):
    index = jnp.full(x.shape[:1], number)
    output = model(x, _at_step(proc, index))
    e = None
    if draws:
      own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
      e = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(own)
    if method == "ddpm":
      return ddpm_step(proc, output, x, e, index), None
    return ddim_step(proc, output, x, index, eta, e), None

  return jax.lax.scan(one_step, noise, jnp.arange(len(proc))[::-1])[0]


def _at_step(proc: Process, index: Array) -> Array:
  return jnp.asarray(proc.steps.astype(np.int32))[index]


def _dpm_solver(model: Model, noise: Array, proc: Process) -> Array:
  """DPM-Solver++(2M) (Lu et al., 2022) over the steps of a process.

  With lambda = log(alpha / sigma), h the step in lambda, and D the data predicted:
    x' = (sigma' / sigma) x - alpha' (exp(-h) - 1) D_bar,
    D_bar = D + h / (2 h_before) (D - D_before),  D_bar = D in the first and the last step.
  The last step goes to the data itself.
  """
  alpha, sigma = np.sqrt(proc.abar)[::-1], np.sqrt(1.0 - proc.abar)[::-1]
  # Without signal (zero terminal SNR) lambda is infinite, but every factor has a limit.
  level = np.log(np.maximum(alpha, 1e-10)) - np.log(sigma)
  after_alpha, after_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
  steps_in_level = np.diff(level)
  ratio = after_sigma / sigma
  # alpha' (exp(-h) - 1) with exp(-h) = alpha sigma' / (alpha' sigma).
  of_data = after_alpha - alpha * after_sigma / sigma
  mix = np.zeros(len(proc))
  if len(proc) > 2:
    mix[1:-1] = steps_in_level[1:] / (2.0 * steps_in_level[:-1])
  table = np.stack([ratio, of_data, mix], -1).astype(np.float32)

  def one_step(carry, inputs):
    x, before = carry
    number, (ratio, weight, mix) = inputs
    index = jnp.full(x.shape[:1], number)
    predicted = model(x, _at_step(proc, index)).astype(jnp.float32)[..., : x.shape[-1]]
    data = data_from(proc, x, predicted, index)
    bar = data + mix * (data - before)
    return (ratio * x + weight * bar, data), None

  numbers = jnp.arange(len(proc))[::-1]
  start = (noise, jnp.zeros_like(noise))
  return jax.lax.scan(one_step, start, (numbers, jnp.asarray(table)))[0][0]
