"""What a change of the mesh, the remat policy or the accumulation would do, without compiling.

Scales the figures of a step that was compiled. The state follows its shardings exactly; the rest
is scaled by the tokens that a device holds and by what a remat policy keeps of a layer. Good to
some tens of per cent: to choose what to compile next, never to sign for.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from mgen_jax import tasks
from mgen_jax.config import Experiment, TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.planning import compile as compile_lib
from mgen_jax.planning.compile import Memory
from mgen_jax.planning.topologies import Topology
from mgen_jax.tasks.base import frozen_shapes
from mgen_jax.training import state as state_lib

# From the policy that keeps most to the one that keeps least on the device.
POLICIES = ("none", "save_dots", "save_projections", "save_attention", "full", "offload")

# Passes over the layers that a step computes, the forward pass being 1: the backward pass counts 2,
# and what is not kept is computed again.
_PASSES = {
  "none": 3.0, "save_dots": 3.1, "save_projections": 3.6, "save_attention": 3.75, "full": 4.0,
  "offload": 4.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a search varies: sizes of the mesh axes, remat policy (None: the model has none) and
  accumulation."""

  mesh: tuple[int, int, int, int]  # replica, fsdp, context, tensor
  remat: str | None
  accumulate: int

  def __str__(self) -> str:
    axes = ", ".join(f"{n}={s}" for n, s in zip(mesh_lib.AXES, self.mesh, strict=True) if s > 1)
    remat = "" if self.remat is None else f", remat={self.remat}"
    return f"{axes or 'one device'}{remat}, accumulate={self.accumulate}"

  def flags(self, name: str, before: "Choice") -> str:
    """The flags that make stage `name` so, where `before` is what it chooses itself."""
    path = f"--config.stages.{name}"
    flags = []
    for axis, new, old in zip(mesh_lib.AXES, self.mesh, before.mesh, strict=True):
      if new != old:
        flags.append(f"{path}.mesh.{axis}={new}")
    if self.remat != before.remat:
      flags.append(f"{path}.task.model.remat={self.remat}")
    if self.accumulate != before.accumulate:
      flags.append(f"{path}.accumulate={self.accumulate}")
    return " ".join(flags) or "none: the stage as it is"


def current(stage: TrainStage, bucket: Bucket, devices: int) -> Choice:
  """What a stage chooses itself, for a bucket."""
  mesh = stage.mesh.sizes(devices)
  batch = stage.batches()[bucket].batch
  return Choice(mesh, _remat(stage), stage.passes(batch, _shards(mesh)))


def apply(experiment: Experiment, name: str, choice: Choice) -> Experiment:
  """The experiment with the choice made in stage `name`."""
  stage = experiment.stages[name]
  task = stage.task
  if choice.remat is not None:
    task = dataclasses.replace(task, model=dataclasses.replace(task.model, remat=choice.remat))
  stage = dataclasses.replace(
    stage, mesh=MeshConfig(*choice.mesh), accumulate=choice.accumulate, task=task
  )
  return dataclasses.replace(experiment, stages={**experiment.stages, name: stage})


def choices(
  stage: TrainStage, bucket: Bucket, topology: Topology, policies: tuple[str, ...] = POLICIES
) -> Iterator[Choice]:
  """Every choice that divides the batch, the heads and the tokens of a bucket evenly."""
  batch = stage.batches()[bucket].batch
  tokens = tasks.make(stage.task).tokens(bucket)
  heads = model_value(stage, "heads", 1)
  remats = (None,) if _remat(stage) is None else policies
  inner = 8 if topology.chip.platform != "gpu" else topology.shape[1]
  for tensor in _powers(min(8, inner, topology.size)):
    for context in _powers(8):
      for replica in _powers(4):
        rest, odd = divmod(topology.size, tensor * context * replica)
        if odd or not rest or heads % tensor or tokens % (context * tensor):
          continue
        for accumulate in _powers(16):
          if batch % (replica * rest * accumulate):
            continue
          for remat in remats:
            yield Choice((replica, rest, context, tensor), remat, accumulate)


class Estimator:
  """Scales one compiled step of a stage to other choices."""

  def __init__(
    self,
    experiment: Experiment,
    name: str,
    bucket: Bucket,
    topology: Topology,
    memory: Memory,
    seconds: float | None = None,
  ):
    """`memory` and `seconds` (of the bound) are those of the stage as it stands."""
    self._stage: TrainStage = experiment.stages[name]
    self._bucket, self._topology, self._memory = bucket, topology, memory
    self._task = tasks.make(self._stage.task)
    self._params = state_lib.param_shapes(self._task)
    self._boxed = jax.eval_shape(lambda: self._task.init(jax.random.key(0)))
    self._base = current(self._stage, bucket, topology.size)
    self._seconds = seconds
    self._sizes: dict[tuple, dict[str, int]] = {}

  def memory(self, choice: Choice) -> Memory:
    """The memory of a choice. Host memory is what `offload` would keep there."""
    base, here = self._base, choice
    kept_before = self._kept(base) + self._gradients(base)
    work = max(0.0, self._memory.temp - kept_before)
    scale = self._tokens(here) / self._tokens(base)
    temp = self._kept(here) + self._gradients(here) + work * scale
    batch = self._memory.batch * _shards(base.mesh) / _shards(here.mesh)
    return Memory(
      **self._state(here.mesh),
      batch=int(batch),
      temp=int(temp),
      code=self._memory.code,
      host=int(self._offloaded(here)),
    )

  def seconds(self, choice: Choice) -> float | None:
    """A rough time: compute at three quarters of the peak, plus what the mesh must send."""
    chip = self._topology.chip
    if not chip.flops:
      return None
    passes = _PASSES[_standard(choice.remat)] / 3.0
    batch = self._stage.batches()[self._bucket].batch
    flops = batch * self._task.flops(self._bucket) * passes / self._topology.size
    width, layers = model_value(self._stage, "width", 0), model_value(self._stage, "layers", 1)
    _, fsdp, context, tensor = choice.mesh
    local = self._tokens(choice) * choice.accumulate  # of one step on one device
    weights = sum(s.size for s in jax.tree.leaves(self._params)) * 2 / tensor
    near, far = self._rates(choice)
    # Gathered for each pass over the layers, reduced once: for every accumulation pass.
    sharded = choice.accumulate * weights * (passes * 3 / 1.5) * (fsdp * context > 1)
    activations = local * width * 2 * layers * passes * 3
    network = sharded / far
    network += activations * 4 * (tensor - 1) / tensor / near if tensor > 1 else 0.0
    network += activations * 2 * (context - 1) / tensor / far if context > 1 else 0.0
    return flops / (0.75 * chip.flops) + 0.5 * network

  def _rates(self, choice: Choice) -> tuple[float, float]:
    """Bytes per second to the neighbours of the tensor axis, and to the rest."""
    chip = self._topology.chip
    if chip.platform == "tpu":
      return 2 * chip.link, max(2, 2 * chip.torus - 2) * chip.link
    tensor = choice.mesh[3]
    share = max(1, min(self._topology.shape[1] // tensor, choice.mesh[1]))
    return chip.link, chip.network * share

  def _state(self, mesh: tuple[int, ...]) -> dict[str, int]:
    """Bytes of the state on a mesh: what is not a parameter scales like the parameters."""
    if mesh not in self._sizes:
      axes = (jax.sharding.AxisType.Auto,) * len(mesh_lib.AXES)
      abstract = jax.sharding.AbstractMesh(mesh, mesh_lib.AXES, axis_types=axes)
      layout = rules.tree_shardings(abstract, self._boxed)
      parameters = compile_lib.tree_bytes(state_lib.with_layout(self._params, layout))
      factor = parameters / max(1, self._memory.parameters)
      self._sizes[mesh] = {
        "parameters": parameters,
        "optimizer": int(self._memory.optimizer * factor),
        "ema": int(self._memory.ema * factor),
        "frozen": compile_lib.tree_bytes(frozen_shapes(self._task, abstract)),
      }
    return self._sizes[mesh]

  def _tokens(self, choice: Choice) -> float:
    """Tokens of one accumulation pass on one device."""
    batch = self._stage.batches()[self._bucket].batch
    replica, fsdp, context, _ = choice.mesh
    examples = batch / (replica * fsdp * choice.accumulate)
    return examples * self._task.tokens(self._bucket) / context

  def _kept(self, choice: Choice) -> float:
    """Bytes that the remat policy keeps on the device between the forward and backward pass."""
    return (
      self._tokens(choice) * model_value(self._stage, "layers", 0) * self._kept_of_token(choice)
    )

  def _kept_of_token(self, choice: Choice) -> float:
    d, m = model_value(self._stage, "width", 0), model_value(self._stage, "mlp_width", 0)
    t = choice.mesh[3]
    item = 4 if model_value(self._stage, "dtype", "") == "float32" else 2
    values = {
      "offload": 0.0,
      "full": d,  # the layer's input
      "save_attention": d + 2 * d / t,  # self- and cross-attention
      "save_projections": d + 6 * d / t,  # queries, keys, values; the keys of the text are few
      "save_dots": 5 * d + 4 * d / t + 2 * m / t,
      "none": 12 * d + 8 * d / t + 4 * m / t,  # norms, modulation and sums as well
    }
    return item * values[_standard(choice.remat)]

  def _offloaded(self, choice: Choice) -> float:
    """Bytes of layer inputs in the host's memory."""
    if _standard(choice.remat) != "offload":
      return 0.0
    per_token = self._kept_of_token(dataclasses.replace(choice, remat="full"))
    return self._tokens(choice) * model_value(self._stage, "layers", 0) * per_token

  def _gradients(self, choice: Choice) -> float:
    """fp32, sharded like the parameters; accumulation keeps a sum beside those of the pass."""
    return self._state(choice.mesh)["parameters"] * (2 if choice.accumulate > 1 else 1)


def advice(
  estimator: Estimator, stage: TrainStage, bucket: Bucket, topology: Topology, limit: float
) -> list[tuple[Choice, Memory]]:
  """Changes, as small as possible, after which a step is estimated to fit; best first.

  The fewest keys are changed, and among those the change that costs least time by estimate.
  """
  base = current(stage, bucket, topology.size)
  fitting = []
  for choice in choices(stage, bucket, topology):
    memory = estimator.memory(choice)
    if choice != base and memory.total <= 0.95 * limit:
      changed = (choice.mesh != base.mesh) + (choice.remat != base.remat)
      changed += choice.accumulate != base.accumulate
      fitting.append((changed, estimator.seconds(choice) or memory.total, choice, memory))
  fitting.sort(key=lambda entry: entry[:2])
  seen, found = set(), []
  for _, _, choice, memory in fitting:  # one of each kind of change
    kind = (choice.mesh != base.mesh, choice.remat != base.remat, choice.accumulate)
    if kind not in seen:
      seen.add(kind)
      found.append((choice, memory))
  return found[:4]


def _standard(remat: str | None) -> str:
  """The policy of `POLICIES` that is closest to any policy."""
  if remat is None or remat in POLICIES:
    return remat or "none"
  return "offload" if remat.startswith("offload") else "save_projections"


def _remat(stage: TrainStage) -> str | None:
  return model_value(stage, "remat", None)


def model_value(stage: TrainStage, key: str, missing: Any) -> Any:
  """A size of the stage's model, where it is a transformer; `missing` where it is not."""
  model = getattr(stage.task, "model", None)
  fields = {f.name for f in dataclasses.fields(model)} if dataclasses.is_dataclass(model) else ()
  return getattr(model, key) if "remat" in fields and key in fields else missing


def _shards(mesh: tuple[int, ...]) -> int:
  return mesh[0] * mesh[1]


def _powers(largest: int) -> Iterator[int]:
  """1, 2, 4, ... up to `largest`."""
  size = 1
  while size <= largest:
    yield size
    size *= 2
