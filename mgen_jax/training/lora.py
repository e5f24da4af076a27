"""Low-rank adapters (Hu et al., 2021) as a transform of parameters: any task, no model knows.

A stage with adapters trains {"base": the model's parameters, held, "lora": {kernel: {"a", "b"}}}.
The model sees W + (alpha / rank) A B in each chosen kernel; B starts at zero, so the first step
sees the base. A kernel [..., out] gets A [..., rank] and B [rank, out], one pair for each layer of
a stack. Merged, it is a model like any other. A checkpoint holds the adapters, and of a base that
is another stage's model only which one that is, with its checksum (`lora.save_base`: the base too).

Moments and averages exist for the adapters only. Gradients of the chosen kernels are computed on
the way to their adapters': the memory of activations and gradients is that of full training.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgen_jax.config import LoraConfig
from mgen_jax.errors import UserError
from mgen_jax.tasks.base import Task
from mgen_jax.training import parameters
from mgen_jax.training import state as state_lib

BASE, ADAPTERS = "base", "lora"


class LoraTask:
  """A task whose parameters are its own, held, and adapters of some of their kernels.

  What it does not change is the task's own.
  """

  untrained = (BASE,)

  def __init__(self, task: Task, config: LoraConfig):
    """Raises UserError where `config` names no kernel of the task, or something else."""
    self.task, self.lora = task, config
    shapes = parameters.flatten(state_lib.param_shapes(task))
    self.kernels = tuple(sorted(parameters.matching(config.kernels, list(shapes), "lora.kernels")))
    for name in self.kernels:
      if name.split("/")[-1] != "kernel" or len(shapes[name].shape) < 2:
        raise UserError(f'lora.kernels takes in "{name}", which is no matrix: name kernels only.')

  def __getattr__(self, name: str) -> Any:
    if name in ("task", "lora", "kernels"):  # not yet set: while it is copied
      raise AttributeError(name)
    return getattr(self.task, name)

  def init(self, key: jax.Array) -> Any:
    """Parameters of both, boxed."""
    base = self.task.init(key)
    boxed = parameters.flatten(base)  # boxes are leaves: they are no dicts
    adapters = {}
    for index, name in enumerate(self.kernels):
      adapters[name] = self._init_pair(boxed[name], jax.random.fold_in(key, index))
    return {BASE: base, ADAPTERS: parameters.unflatten(adapters)}

  def _init_pair(self, box: Any, key: jax.Array) -> dict[str, Any]:
    kernel = nn.unbox(box)
    names = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * kernel.ndim
    stack = kernel.shape[:1] if names[0] == "layers" else ()
    inputs = np.prod(kernel.shape[len(stack) : -1])
    rank, layers = self.lora.rank, names[: len(stack)]
    a = jax.random.normal(key, (*kernel.shape[:-1], rank), jnp.float32) / np.sqrt(inputs)
    b = jnp.zeros((*stack, rank, kernel.shape[-1]), jnp.float32)
    return {
      "a": nn.LogicallyPartitioned(a, (*names[:-1], None)),
      "b": nn.LogicallyPartitioned(b, (*layers, None, names[-1])),
    }

  def merged(self, params: Any) -> Any:
    """The model's own parameters with the adapters added to their kernels."""
    base = parameters.flatten(params[BASE])
    pairs = parameters.flatten(params[ADAPTERS])
    for name in self.kernels:
      base[name] = self.adapted(base[name], pairs[f"{name}/a"], pairs[f"{name}/b"])
    return parameters.unflatten(base)

  def adapted(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W + (alpha / rank) A B of one kernel."""
    scale = (self.lora.rank if self.lora.alpha is None else self.lora.alpha) / self.lora.rank
    # [L, ..., r] x [L, r, out] or [..., r] x [r, out]
    product = jnp.einsum("l...r,lro->l...o", a, b) if b.ndim == 3 else a @ b
    return kernel + scale * product

  def _held(self, params: Any) -> Any:
    return self.merged({**params, BASE: jax.lax.stop_gradient(params[BASE])})

  def loss(self, params: Any, batch: Any, keys: jax.Array) -> Any:
    """That of the merged model; its gradient is the adapters'."""
    return self.task.loss(self._held(params), batch, keys)

  def losses_at(self, params: Any, *args: Any) -> jax.Array:
    """Likewise, at given times."""
    return self.task.losses_at(self._held(params), *args)

  def loss_at(self, params: Any, *args: Any) -> Any:
    """Likewise, of several players."""
    return self.task.loss_at(self._held(params), *args)


class _SinglePlayer(LoraTask):
  """Of a task that has no `loss_at`: training asks whether there is one."""

  loss_at = property()  # not there: AttributeError


def wrap(task: Task, config: LoraConfig) -> Task:
  """The task to train: `task` itself where there are no adapters."""
  if not config.rank or isinstance(task, LoraTask):
    return task
  return (LoraTask if hasattr(task, "loss_at") else _SinglePlayer)(task, config)


def merged(task: Task, params: Any) -> Any:
  """The parameters of the model itself, of a task with or without adapters."""
  return task.merged(params) if isinstance(task, LoraTask) else params


def without_base(state: state_lib.TrainState) -> state_lib.TrainState:
  """What a checkpoint holds that refers to its base; of shapes and shardings likewise."""
  return state.replace(params={ADAPTERS: state.params[ADAPTERS]})


def with_base(state: state_lib.TrainState, base: Any) -> state_lib.TrainState:
  """The state again."""
  return state.replace(params={BASE: base, **state.params})


def starting(
  task: Task, load: Callable[[Any, Any], Any] | None, seed: int
) -> Callable[[Any, Any], Any] | None:
  """(shapes, layout) -> parameters of a task with adapters: the base from `load`, new adapters."""
  if not isinstance(task, LoraTask) or load is None:
    return load

  def both(shapes: Any, layout: Any) -> Any:
    base = load(shapes[BASE], layout[BASE])
    key = state_lib.stream_key(seed, "init", 0)
    adapters = jax.jit(
      lambda: state_lib.init_params(task, key)[ADAPTERS], out_shardings=layout[ADAPTERS]
    )()
    return {BASE: base, ADAPTERS: adapters}

  return both
