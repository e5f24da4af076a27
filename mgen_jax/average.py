"""Makes one model of the averaged parameters of several: the average stage, and a command.

  python -m mgen_jax.average --workdir=runs/mine --of=sft_a,sft_b,sft_c
  python -m mgen_jax.average --workdir=runs/mine --of=sft_a,runs/other/sft --weights=2,1
  python -m mgen_jax.average --workdir=runs/mine --of=sft@2000,sft@2500 --name=two_steps
  python -m mgen_jax.average --workdir=runs/mine --of=sft_a,sft_b --method=greedy --validation=sft_a

--of names stages of the run, or with a slash folders of stages of other runs; @STEP picks a
checkpoint, the newest by default. The result is a stage of the run: sample, evaluate and train
(`init_from`) take it by its --name. What has adapters (LoRA) is averaged as it is sampled, merged:
an average of one is how adapters are merged for good.

Checkpoints are read tensor by tensor onto the mesh of all devices: besides the result, one tensor
of one of them is in memory, whatever the method and however many they are.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from mgen_jax import cli, schema, tasks
from mgen_jax.config import AverageStage, TrainStage
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.tasks.base import Task, frozen_shapes
from mgen_jax.training import inputs, loop, lora, parameters, start, validation
from mgen_jax.training import state as state_lib
from mgen_jax.training.checkpoint import Checkpoints
from mgen_jax.workdir import Workdir

STEP = 0  # of the one checkpoint of an average

_MODELS = (TrainStage, AverageStage)  # the stages whose result is a model


class Model(NamedTuple):
  """One of those to be averaged."""

  name: str  # as it was asked for
  folder: Path
  step: int | None  # None: the newest
  task: Task  # with its adapters
  meta: dict[str, Any]
  base: "Model | None" = None  # of adapters whose checkpoint refers to it


def run(work: Workdir, name: str) -> None:
  """Runs the average stage `name`.

  Raises:
    UserError: a model is missing, damaged, or not of the same shape and latents as the others.
  """
  began = time.perf_counter()
  stage = work.experiment.stages[name]
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
  task = tasks.make(stage.task)
  models = [_open(work, entry) for entry in stage.of]
  _check(name, task, models)
  with mesh_lib.use(mesh):
    if stage.method == "greedy":
      params, shares, losses = _greedy(work, stage, task, models, mesh)
    else:
      weights = stage.weights or (1.0,) * len(models)
      shares = [weight / sum(weights) for weight in weights]
      params, losses = _weighted(task, models, shares, mesh), None
    made_of = dict(zip(stage.of, (round(share, 6) for share in shares), strict=True))
    logging.info("stage %s is %s", name, made_of)
    meta = {
      **{key: value for key, value in models[0].meta.items() if key != "base"},
      "experiment": work.experiment.name,
      "stage": name,
      "task": schema.to_plain(stage.task),
      "lora": {},
      "buckets": list(dict.fromkeys(bucket for m in models for bucket in m.meta["buckets"])),
      "average": made_of,
    }
    with Checkpoints(str(work.folder(name) / "checkpoints"), keep=1) as checkpoints:
      checkpoints.save(STEP, {"ema": params}, {}, meta)
  facts = {} if losses is None else {"validation_loss": losses}
  work.finish(name, time.perf_counter() - began, average=made_of, **facts)


def _open(work: Workdir, entry: str) -> Model:
  path, _, step = entry.partition("@")
  if step and not step.isdecimal():
    raise UserError(f'"{entry}" cannot be averaged: after @ stands the step of a checkpoint.')
  if "/" not in path and not isinstance(work.experiment.stages.get(path), _MODELS):
    known = [name for name, stage in work.experiment.stages.items() if isinstance(stage, _MODELS)]
    raise UserError(f'"{path}" is no stage of {work.root} that trains: {suggest(path, known)}')
  folder = Path(path) if "/" in path else work.folder(path)
  return _open_folder(entry, folder, int(step) if step else None)


def _open_folder(name: str, folder: Path, step: int | None) -> Model:
  with Checkpoints(str(folder / "checkpoints"), read_only=True) as checkpoints:
    meta = checkpoints.read_meta(step)
    checkpoints.verify(step)  # once, and not for each of its tensors
  reference, base = meta.get("base"), None
  if reference is not None:
    origin = start.base_folder(folder, reference)
    base = _open_folder(f"the base of {name}", origin, reference["step"])
  return Model(name, folder, step, start.model_of(meta), meta, base)


def _check(name: str, task: Task, models: Sequence[Model]) -> None:
  """Refuses models that are not one and the same network on the same latents."""
  wanted = parameters.flatten(state_lib.param_shapes(task))
  for model in models:
    own = model.task.task if isinstance(model.task, lora.LoraTask) else model.task
    found = parameters.flatten(state_lib.param_shapes(own))
    differ = sorted(
      tensor
      for tensor in wanted.keys() | found.keys()
      if tensor not in found or tensor not in wanted or found[tensor].shape != wanted[tensor].shape
    )
    if differ or own.config.name != task.config.name:
      raise UserError(
        f"stage {name} cannot average {model.name}: its model is another one"
        f"{' (' + differ[0] + ' differs)' if differ else ''}; name models of one task.model."
      )
    before, latents = models[0].meta["latents"], model.meta["latents"]
    if (before is None) != (latents is None):
      raise UserError(f"stage {name} cannot average {model.name}: it has learned other inputs.")
    if before is not None:
      inputs.check_autoencoder(latents, before, f"what {model.name} has learned")
      if any(before[key] != latents[key] for key in ("mean", "std")):
        raise UserError(
          f"stage {name} cannot average {model.name} with {models[0].name}: their latents are "
          "normalised in two ways; start both from one model, whose way they then keep."
        )


def _weighted(
  task: Task, models: Sequence[Model], shares: Sequence[float], mesh: jax.sharding.Mesh
) -> Any:
  """sum of share x parameters, tensor by tensor, in fp32 on the mesh.

  Besides what is made, one tensor of one model is on the devices at any time.
  """
  shapes = state_lib.param_shapes(task)
  wanted = parameters.flatten(state_lib.with_layout(shapes, state_lib.param_shardings(task, mesh)))
  # Shares below 0 come last: so no sum on the way is 0, as the whole is not.
  order = sorted(range(len(models)), key=lambda index: -shares[index])
  made = {}
  with contextlib.ExitStack() as stack:
    readers = [_reader(models[index], mesh, stack) for index in order]
    steps = _steps([shares[index] for index in order])
    for tensor, leaf in wanted.items():
      mean = readers[0](tensor, leaf)
      for reader, step in zip(readers[1:], steps[1:], strict=True):
        mean = parameters.blend(mean, reader(tensor, leaf), step)
      made[tensor] = mean
  return parameters.unflatten(made)


def _steps(shares: Sequence[float]) -> list[float]:
  """How far a running mean goes towards each next model, so that the last one has these shares."""
  return [
    share / so_far for share, so_far in zip(shares, itertools.accumulate(shares), strict=True)
  ]


def _reader(
  model: Model, mesh: jax.sharding.Mesh, stack: contextlib.ExitStack
) -> Callable[[str, jax.ShapeDtypeStruct], jax.Array]:
  """A function of a tensor's name, and its shape and place, to the tensor."""
  folder = str(model.folder / "checkpoints")
  checkpoints = stack.enter_context(Checkpoints(folder, read_only=True))

  def read(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return checkpoints.restore_tensors(wanted, model.step)

  if not isinstance(model.task, lora.LoraTask):
    return lambda tensor, leaf: read({tensor: leaf})[tensor]

  adapters = model.task
  places = parameters.flatten(
    state_lib.with_layout(
      state_lib.param_shapes(adapters), state_lib.param_shardings(adapters, mesh)
    )
  )
  if model.base is None:
    read_base = lambda tensor, leaf: read({f"{lora.BASE}/{tensor}": leaf})[f"{lora.BASE}/{tensor}"]  # noqa: E731
  else:
    read_base = _reader(model.base, mesh, stack)

  def merged(tensor: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    kernel = read_base(tensor, leaf)
    if tensor not in adapters.kernels:
      return kernel
    pair = {name: places[name] for name in (f"{lora.ADAPTERS}/{tensor}/{x}" for x in "ab")}
    return jax.jit(adapters.adapted, out_shardings=leaf.sharding)(kernel, *read(pair).values())

  return merged


def _greedy(
  work: Workdir,
  stage: AverageStage,
  task: Task,
  models: Sequence[Model],
  mesh: jax.sharding.Mesh,
) -> tuple[Any, list[float], dict[str, float]]:
  """The greedy soup: its parameters, the share of each model, and the losses that decided."""
  judge = work.experiment.stages[stage.validation]
  origin = start.origin_latents(work, judge)
  stream, latents = inputs.make_stream(work, stage.validation, task, origin)
  learned = models[0].meta["latents"]
  if latents is not None and any(latents[key] != learned[key] for key in ("mean", "std")):
    raise UserError(
      f"the latents of stage {stage.validation} are normalised in another way than {stage.of[0]} "
      "has learned: name a train stage of the same start as validation."
    )
  frozen = () if frozen_shapes(task, None) is None else (task.load_frozen(mesh),)
  validate = validation.Validator(task, mesh, seed=work.experiment.seed, bins=judge.validate_bins)
  put = loop.putter(task, stream, mesh)

  def loss(params: Any) -> float:
    return validate(params, stream.validation(), put, *frozen)[validation.LOSS]

  by_name = {model.name: model for model in models}

  def load(names: Sequence[str]) -> Any:
    return _weighted(task, [by_name[name] for name in names], [1 / len(names)] * len(names), mesh)

  taken, losses = greedy(list(by_name), lambda names: loss(load(names)))
  return load(taken), [(m.name in taken) / len(taken) for m in models], losses


def greedy(
  names: Sequence[str], loss: Callable[[Sequence[str]], float]
) -> tuple[list[str], dict[str, float]]:
  """The greedy soup (Wortsman et al., 2022, recipe 1).

  Args:
    names: of models.
    loss: of the average of some of them, on held-out data.

  Returns:
    The names it is made of, and the loss of each model and of the "average".

  Raises:
    UserError: not one of the losses is finite.
  """
  losses = {}
  for name in names:
    losses[name] = loss([name])
    logging.info("%s: loss on held-out data %.5f", name, losses[name])
  order = sorted((n for n in names if math.isfinite(losses[n])), key=losses.__getitem__)
  if not order:
    raise UserError(f"no model of {', '.join(names)} has a loss that is finite.")
  taken, best = order[:1], losses[order[0]]
  for name in order[1:]:
    found = loss([*taken, name])
    good = found <= best
    logging.info("with %s: %.5f, so it is %s", name, found, "taken" if good else "left out")
    if good:
      best = found
      taken.append(name)
  return taken, {**losses, "average": best}


# --------------------------------------------------------------------------------------------------
# The command.


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command (not at import: other commands have flags of the same names)."""
  to = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "Folder of the run that gets the average.", **to)
  flags.DEFINE_list("of", [], "Stages of it, or folders of stages; @STEP for a checkpoint.", **to)
  flags.DEFINE_list("weights", [], "Of each; default: all the same.", **to)
  flags.DEFINE_string("name", "average", "Of the stage that is made.", **to)
  flags.DEFINE_enum("method", "weighted", ["weighted", "greedy"], "How (docs/recipes.md).", **to)
  flags.DEFINE_string("validation", None, "Greedy: the train stage of the held-out data.", **to)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds an average stage to a run, and runs it."""
  del argv
  if values.workdir is None or not values.of:
    raise UserError("--workdir and --of are needed: see --help.")
  work = Workdir.open(values.workdir)
  if values.name in work.experiment.stages and not work.is_added(values.name):
    raise UserError(f"--name={values.name} is a stage of {work.root}: choose another name.")
  work = work.with_stage(values.name, _stage_of(values, work))
  if work.is_done(values.name):
    logging.info("it is done already")
  else:
    work.start(values.name)
    run(work, values.name)
  work.keep_stage(values.name)
  if jax.process_index() == 0:
    print(json.dumps(work.done_record(values.name)["average"]))
    print(work.folder(values.name))


def _stage_of(values: flags.FlagValues, work: Workdir) -> AverageStage:
  """The stage that the flags describe; its task is that of the first model."""
  try:
    weights = tuple(float(weight) for weight in values.weights)
  except ValueError as error:
    raise UserError(f"--weights={','.join(values.weights)} has what is no number.") from error
  first = _open(work, values.of[0])
  own = first.task.task if isinstance(first.task, lora.LoraTask) else first.task
  return AverageStage(
    task=own.config,
    of=tuple(values.of),
    weights=weights,
    method=values.method,
    validation=values.validation,
  )


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
