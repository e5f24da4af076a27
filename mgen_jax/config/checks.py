"""From an experiment as it was written to the typed one: the checks across its stages."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from mgen_jax import schema, tasks
from mgen_jax.config.stages import (
  EncodeStage,
  EvaluateStage,
  Experiment,
  ReconstructStage,
  TrainStage,
  parse_key,
)
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.errors import ConfigError, UserError


def resolve(values: Mapping[str, Any] | config_dict.ConfigDict) -> Experiment:
  """The typed experiment, checked as far as is possible without devices.

  Raises:
    ConfigError: a key or value that cannot be used, with its path and the fix.
  """
  made = schema.build(Experiment, values)
  if set(made.recipe) != set(made.stages) or len(made.recipe) != len(made.stages):
    raise ConfigError(
      f"config.recipe {made.recipe} must name every stage once: {', '.join(sorted(made.stages))}."
    )
  for index, name in enumerate(made.recipe):
    stage = made.stages[name]
    if isinstance(stage, TrainStage):
      _check_train(made, name, stage, made.recipe[:index])
    elif isinstance(stage, EncodeStage):
      _earlier(made, name, "autoencoder", stage.autoencoder, made.recipe[:index], "train")
    elif isinstance(stage, EvaluateStage):
      _earlier(made, name, "generator", stage.generator, made.recipe[:index], "train")
      generator = made.stages[stage.generator]
      _check_bucket(f"config.stages.{name}.bucket", generator, stage.bucket, parse_bucket)
    elif isinstance(stage, ReconstructStage):
      _check_reconstruct(made, name, stage, made.recipe[:index])
  return made


def check_devices(
  made: Experiment, devices: int, processes: int, stages: Sequence[str] | None = None
) -> None:
  """The checks that need the number of devices and hosts.

  Args:
    made: the experiment.
    devices: of all hosts.
    processes: hosts.
    stages: those that will run on them; None: all. A recipe may need other numbers later on.

  Raises:
    ConfigError: a mesh that does not fit the devices, a batch that does not divide.
  """
  for name in made.recipe if stages is None else stages:
    stage = made.stages[name]
    if not isinstance(stage, TrainStage):
      continue
    path = f"config.stages.{name}"
    try:
      replica, fsdp, *_ = stage.mesh.sizes(devices)
    except ConfigError as error:
      raise ConfigError(f"{path}.mesh: {error}") from error
    for bucket, entry in stage.batches().items():
      passes = max(1, stage.passes(entry.batch, replica * fsdp))
      parts = replica * fsdp * passes
      if entry.batch % parts or entry.batch % processes:
        nearest = max(parts, round(entry.batch / parts) * parts)
        derived = not stage.buckets[f"b{bucket.name}"].batch and stage.tokens_per_step
        fix = f", or batch_multiple to {math.lcm(parts, processes)}" if derived else ""
        raise ConfigError(
          f"{path}.buckets.b{bucket.name}.batch is {entry.batch}, which does not divide into "
          f"{replica * fsdp} batch shards x {passes} accumulation passes on {devices} "
          f"devices: set it to {nearest}{fix}."
        )


def _earlier(
  made: Experiment, stage: str, key: str, target: str, before: tuple[str, ...], kind: str
) -> Any:
  """The stage that a key points to, which must come earlier and be of a kind."""
  path = f"config.stages.{stage}.{key}"
  candidates = [name for name in before if made.stages[name].kind == kind]
  if target not in candidates:
    raise ConfigError(
      f'{path} is "{target}", which is not an earlier stage of kind "{kind}": '
      f"{schema.suggest(target, candidates)}"
    )
  return made.stages[target]


def _check_train(made: Experiment, name: str, stage: TrainStage, before: tuple[str, ...]) -> None:
  path = f"config.stages.{name}"
  if not stage.buckets:
    raise ConfigError(f'{path}.buckets is empty: name at least one, like {{"b16x64x64": ...}}.')
  for bucket, entry in stage.buckets.items():
    if entry.batch < 0 or entry.weight <= 0:
      raise ConfigError(
        f"{path}.buckets.{bucket}: weight must be above 0, and batch too, or 0 for what "
        "tokens_per_step holds."
      )
    _check_bucket(f"{path}.buckets", stage, bucket, parse_key)
  if stage.tokens_per_step and all(entry.batch for entry in stage.buckets.values()):
    raise ConfigError(
      f"{path}.tokens_per_step is {stage.tokens_per_step}, but every bucket says its batch: set it "
      "to 0 where the tokens shall decide."
    )
  try:
    stage.batches()
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  if stage.init_from is not None:
    origin = _earlier(made, name, "init_from", stage.init_from, before, "train")
    if type(origin.task) is not type(stage.task):
      raise ConfigError(
        f'{path}.init_from is "{stage.init_from}", which trains {origin.task.name}: it must train '
        f"{stage.task.name}."
      )
    stage.task.check_origin(origin.task, path)
  if stage.init_weights is not None:
    if stage.init_from is not None:
      raise ConfigError(f"{path}.init_from and {path}.init_weights are both set: unset one.")
    if not hasattr(tasks.TASKS[stage.task.name], "from_weights"):
      raise ConfigError(
        f"{path}.init_weights is set, but {stage.task.name} starts from no weights of others: "
        "unset it."
      )
  source = tasks.TASKS[stage.task.name].source
  if source == "latents":
    if stage.latents is None:
      raise ConfigError(f"{path}.latents is not set: name the encode stage it reads from.")
    encode = _earlier(made, name, "latents", stage.latents, before, "encode")
    wanted = set(stage.batches())
    if stage.task.name == "latte" and stage.task.images:  # beside each clip
      wanted |= {dataclasses.replace(bucket, frames=1) for bucket in wanted}
    missing = {bucket.name for bucket in wanted} - set(encode.buckets)
    if missing:
      raise ConfigError(
        f"{path}.buckets has {', '.join(sorted(missing))}, which stage {stage.latents} does not "
        f"encode: add it to config.stages.{stage.latents}.buckets."
      )
    autoencoder = made.stages[encode.autoencoder].task
    stage.task.check_latents(autoencoder.model, path)
    if hasattr(stage.task, "check_text"):
      stage.task.check_text(encode.text, path, stage.latents)
  elif stage.latents is not None:
    raise ConfigError(f"{path}.latents is set, but {stage.task.name} learns from media: unset it.")


def _check_reconstruct(
  made: Experiment, name: str, stage: ReconstructStage, before: tuple[str, ...]
) -> None:
  path = f"config.stages.{name}"
  if not stage.autoencoders or not stage.buckets:
    raise ConfigError(f"{path}.autoencoders and .buckets must name one or more each.")
  for coder in stage.autoencoders:
    trained = _earlier(made, name, "autoencoders", coder, before, "train")
    if tasks.TASKS[trained.task.name].source != "media":
      raise ConfigError(f"{path}.autoencoders has {coder}, which trains {trained.task.name}.")
    for bucket in stage.buckets:
      _check_bucket(f"{path}.buckets", trained, bucket, parse_bucket)


def _check_bucket(path: str, stage: TrainStage, name: str, parse: Callable[[str], Bucket]) -> None:
  try:
    stage.task.check_bucket(parse(name))
  except UserError as error:
    raise ConfigError(f"{path}: bucket {name}: {error}") from error
