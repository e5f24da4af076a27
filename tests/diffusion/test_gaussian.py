"""Gaussian diffusion against the formulas in float64, and DPM-Solver++ against diffusers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mgen_jax.diffusion import gaussian, v_prediction
from mgen_jax.errors import ConfigError

TOLERANCE = 1e-5


def _close(made, expected):
  made, expected = np.asarray(made, np.float64), np.asarray(expected, np.float64)
  assert np.linalg.norm(made - expected) <= TOLERANCE * np.linalg.norm(expected)


class Reference:
  """The same process written from the papers (Ho et al., 2020; Nichol and Dhariwal, 2021), float64.

  Independent of the code under test: posteriors from Bayes' rule for Gaussians, not from tables.
  """

  def __init__(self, steps):
    full = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    self.steps = np.asarray(steps)
    self.abar = full[self.steps]
    self.before = np.append(1.0, self.abar[:-1])
    self.beta = 1.0 - self.abar / self.before

  def posterior(self, i, x0, xt):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}."""
    alpha, beta = 1.0 - self.beta[i], self.beta[i]
    if i == 0:
      return x0, None
    prior = 1.0 / (1.0 - self.before[i])  # precision of q(x_{t-1} | x_0)
    seen = alpha / beta  # of q(x_t | x_{t-1}) as a function of x_{t-1}
    variance = 1.0 / (prior + seen)
    mean = variance * (prior * np.sqrt(self.before[i]) * x0 + seen / np.sqrt(alpha) * xt)
    return mean, variance

  def floor(self, i):
    return np.log(self.posterior(max(i, 1), 0.0, 0.0)[1])

  def model(self, i, output, xt):
    """Mean and log-variance of the model's step, and its x_0."""
    e, logits = np.split(output, 2, -1)
    x0 = (xt - np.sqrt(1.0 - self.abar[i]) * e) / np.sqrt(self.abar[i])
    share = (logits + 1) / 2
    log = share * np.log(self.beta[i]) + (1 - share) * self.floor(i)
    return self.posterior(i, x0, xt)[0], log, x0, e

  def losses(self, i, output, x0, e, xt):
    mean, log, _, predicted = self.model(i, output, xt)
    square = np.square(e - predicted).mean()
    if i == 0:
      z = [np.exp(-0.5 * log) * (x0 - mean + s / 255.0) for s in (1, -1)]
      upper, lower = (0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))) for v in z)
      mass = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
      bound = -np.log(np.maximum(mass, 1e-12)).mean()
    else:
      true_mean, true_var = self.posterior(i, x0, xt)
      variance = np.exp(log)
      bound = 0.5 * (
        -1 + log - np.log(true_var) + true_var / variance + (true_mean - mean) ** 2 / variance
      )
      bound = bound.mean()
    return square, bound / np.log(2)

  def ddim(self, i, output, xt):
    _, _, x0, e = self.model(i, output, xt)
    return np.sqrt(self.before[i]) * x0 + np.sqrt(1 - self.before[i]) * e


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  x0, e = rng.standard_normal((2, 6, 2, 3, 3, 4))
  output = rng.standard_normal((6, 2, 3, 3, 8))
  return x0, e, output


def test_tables_are_those_of_the_released_code():
  """spec: the tables go through the respacing path even with all 1000 steps."""
  proc = gaussian.process()
  assert proc.betas[0] == 9.999999999998899e-05
  assert proc.abar[0] == pytest.approx(0.9999, abs=1e-15)
  assert proc.abar[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_spacings_are_those_of_the_released_code():
  even = gaussian.spaced_steps
  assert even(250)[:3] == (0, 4, 8) and even(250)[-2:] == (995, 999)
  assert even(50)[:4] == (0, 20, 41, 61) and even(50)[-1] == 999
  assert even(50, "stride") == tuple(range(0, 1000, 20))
  assert even(1) == (0,) and len(set(even(1000))) == 1000


@pytest.mark.parametrize("steps", [None, 250], ids=["all steps", "250 steps"])
def test_losses_and_gradients_are_those_of_the_formulas(arrays, steps):
  chosen = None if steps is None else gaussian.spaced_steps(steps)
  proc = gaussian.process(chosen)
  reference = Reference(range(1000) if chosen is None else chosen)
  index = np.array([0, 1, 30, 120, len(proc) // 2, len(proc) - 1])
  x0, e, output = arrays
  x0[0, 0, 0, 0, :2] = (-1.5, 1.5)  # both tails of the first step's bins
  xt = gaussian.add_noise(proc, *map(jnp.float32, (x0, e)), index)
  _close(xt, np.stack([np.sqrt(reference.abar[i]) * x0[n] + np.sqrt(1 - reference.abar[i]) * e[n]
                       for n, i in enumerate(index)]))  # fmt: skip
  exact = np.asarray(xt, np.float64)
  square, bound = gaussian.losses(proc, *map(jnp.float32, (output, x0, e)), xt, index)
  expected = [reference.losses(i, output[n], x0[n], e[n], exact[n]) for n, i in enumerate(index)]
  for n, (first, second) in enumerate(expected):
    assert square[n] == pytest.approx(first, rel=TOLERANCE)
    assert bound[n] == pytest.approx(second, rel=TOLERANCE * 10)

  def total(output):
    parts = gaussian.losses(proc, output, jnp.float32(x0), jnp.float32(e), xt, index)
    return (parts[0] + parts[1]).sum()

  gradient = np.asarray(jax.grad(total)(jnp.float32(output)))
  assert np.isfinite(gradient).all()
  # The prediction learns from the squared error only.
  _close(gradient[..., :4], 2 * (output[..., :4] - e) / x0[0].size)
  # The variance learns from the bound: differences in one logit, in float64.
  for n, i in enumerate(index):
    for place in ((0, 1, 1, 4), (1, 2, 0, 7)):
      moved = [output[n].copy(), output[n].copy()]
      for each, step in zip(moved, (1e-5, -1e-5), strict=True):
        each[place] += step
      values = [sum(reference.losses(i, m, x0[n], e[n], exact[n])) for m in moved]
      slope = (values[0] - values[1]) / 2e-5
      assert gradient[n][place] == pytest.approx(slope, rel=2e-4, abs=1e-6)


def test_a_silent_model_starts_at_the_loss_of_the_released_code(arrays):
  """spec: measured there with random data: a squared error of about 1, 2.98 in all at t = 0 and
  1.011 at t = 700."""
  rng = np.random.default_rng(1)
  x0, e = rng.standard_normal((2, 2, 16, 32, 32, 4)).astype(np.float32)
  index = np.array([0, 700])
  xt = gaussian.add_noise(gaussian.process(), x0, e, index)
  square, bound = gaussian.losses(
    gaussian.process(), jnp.zeros((2, 16, 32, 32, 8)), x0, e, xt, index
  )
  total = square + bound
  assert square == pytest.approx(1.0, abs=0.02)
  assert total[0] == pytest.approx(2.98, abs=0.05) and total[1] == pytest.approx(1.011, abs=0.02)


@pytest.mark.parametrize("count", [50, 250, 1000])
def test_steps_of_ddpm_and_ddim_are_those_of_the_formulas(arrays, count):
  steps = gaussian.spaced_steps(count)
  proc, reference = gaussian.process(steps), Reference(steps)
  x0, e, output = arrays
  index = np.array([0, 1, 2, count // 2, count - 2, count - 1])
  single = [jnp.float32(a) for a in (output, x0, e)]
  ddpm = gaussian.ddpm_step(proc, *single, index)
  ddim = gaussian.ddim_step(proc, single[0], single[1], index)
  for n, i in enumerate(index):
    mean, log, _, _ = reference.model(i, output[n], x0[n])
    _close(ddpm[n], mean + (np.exp(0.5 * log) * e[n] if i else 0.0))
    _close(ddim[n], reference.ddim(i, output[n], x0[n]))


def _gaussian_model(proc, mean, std):
  """The exact model of data N(mean, std^2): what training would end at."""

  def model(x, step):
    position = jnp.searchsorted(jnp.asarray(proc.steps), step)
    abar = jnp.asarray(proc.abar)[position].reshape(-1, 1, 1).astype(jnp.float32)
    variance = abar * std**2 + 1 - abar
    x0 = mean + jnp.sqrt(abar) * std**2 / variance * (x - jnp.sqrt(abar) * mean)
    if proc.prediction == "noise":
      first = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
    else:
      first = (jnp.sqrt(abar) * x - x0) / jnp.sqrt(1 - abar)
    return jnp.concatenate([first, jnp.ones_like(first)], -1)

  return model


@pytest.mark.parametrize("method", gaussian.SAMPLERS)
@pytest.mark.parametrize(
  ("schedule", "prediction"), [("linear", "noise"), ("zero_terminal_snr", "velocity")]
)
def test_samplers_draw_from_the_distribution_of_the_data(method, schedule, prediction):
  spacing = "even" if schedule == "linear" else "trailing"
  count = 50 if method == "dpm_solver++" else 250
  proc = gaussian.process(gaussian.spaced_steps(count, spacing), schedule, prediction)
  model = _gaussian_model(proc, 1.5, 0.4)
  keys = jax.random.split(jax.random.key(0), 64)
  noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (32, 2)))(keys)
  made = np.asarray(
    jax.jit(lambda n, k: gaussian.sample(model, n, proc, k, method=method))(noise, keys)
  )
  assert made.shape == noise.shape
  assert made.mean() == pytest.approx(1.5, abs=0.03) and made.std() == pytest.approx(0.4, abs=0.03)
  assert stats.kstest((made.ravel() - 1.5) / 0.4, "norm").statistic < 0.05


def test_the_velocity_arm_is_that_of_v_prediction(arrays):
  proc = gaussian.process(None, "zero_terminal_snr", "velocity")
  x0, e, _ = (jnp.float32(a) for a in arrays)
  index = np.array([0, 5, 300, 600, 998, 999])
  _close(gaussian.add_noise(proc, x0, e, index), v_prediction.add_noise(x0, e, index))
  _close(gaussian.target(proc, x0, e, index), v_prediction.velocity(x0, e, index))
  assert proc.abar[-1] == 0 and np.isfinite(proc.betas).all()


@pytest.mark.parametrize("count", [1, 2, 20])
def test_dpm_solver_is_that_of_diffusers(count):
  diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra test")
  torch = pytest.importorskip("torch")
  scheduler = diffusers.DPMSolverMultistepScheduler(
    beta_schedule="linear", beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero",
    lower_order_final=True, euler_at_final=True,
  )  # fmt: skip
  scheduler.set_timesteps(count)
  steps = tuple(sorted(int(t) for t in scheduler.timesteps))
  proc = gaussian.process(steps)
  rng = np.random.default_rng(0)
  noise, weights = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 4)) * 0.3

  def model(x, step, lib=jnp):
    return lib.tanh(x @ lib.asarray(weights, dtype=lib.float32) + step / 1000.0)

  made = gaussian.sample(
    lambda x, step: model(x, step[:, None, None]), jnp.float32(noise), proc, method="dpm_solver++"
  )
  x = torch.tensor(noise, dtype=torch.float32)
  for step in scheduler.timesteps:
    out = model(x, step.float(), torch)
    x = scheduler.step(out, step, x, return_dict=False)[0]
  _close(made, x.numpy())


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: gaussian.spaced_steps(0), "1 to 1000"),
    (lambda: gaussian.spaced_steps(170, "stride"), "use 167"),
    (lambda: gaussian.spaced_steps(10, "cosine"), "unknown spacing"),
    (lambda: gaussian.process(None, "cosine"), "unknown schedule"),
    (lambda: gaussian.process(None, "zero_terminal_snr"), '"velocity"'),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ConfigError, match=message):
    call()


def test_an_unknown_sampler_is_refused():
  with pytest.raises(ConfigError, match=r"dpm_solver\+\+"):
    gaussian.sample(lambda x, t: x, jnp.zeros((1, 2)), gaussian.process((0, 999)), method="pndm")
  assert math.isfinite(gaussian.process((0, 999)).betas.sum())
