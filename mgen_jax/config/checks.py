"""From an experiment as it was written to the typed one: the checks across its stages."""

import dataclasses
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from mgen_jax import schema, tasks
from mgen_jax.config.links import data_of, latents_of, own_models
from mgen_jax.config.stages import (
  AverageStage,
  EncodeStage,
  EvaluateStage,
  Experiment,
  IngestStage,
  ReconstructStage,
  TrainStage,
  parse_key,
)
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.errors import ConfigError, UserError, suggest

MODELS = ("train", "average")  # the kinds of stages whose result is a model


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
  for kind, names in (("stages", made.stages), ("datasets", made.datasets)):
    for name in names:
      if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
          f'config.{kind} has "{name}", which no flag can spell (--config.{kind}.{name}...): use '
          "letters, digits and _, and no word of Python's own."
        )
  for index, name in enumerate(made.recipe):
    stage = made.stages[name]
    if isinstance(stage, TrainStage):
      _check_train(made, name, stage, made.recipe[:index])
    elif isinstance(stage, AverageStage):
      _check_average(made, name, stage, made.recipe[:index])
    elif isinstance(stage, IngestStage):
      if stage.dataset is not None and stage.dataset not in made.datasets:
        raise ConfigError(
          f'config.stages.{name}.dataset is "{stage.dataset}", which is not in config.datasets: '
          f"{suggest(stage.dataset, list(made.datasets))}"
        )
    elif isinstance(stage, EncodeStage):
      coder = _earlier(made, name, "autoencoder", stage.autoencoder, made.recipe[:index], *MODELS)
      for bucket in stage.buckets:
        _check_bucket(f"config.stages.{name}.buckets", coder, bucket, parse_bucket)
      if stage.ingest is not None:
        _earlier(made, name, "ingest", stage.ingest, made.recipe[:index], "ingest")
    elif isinstance(stage, EvaluateStage):
      _earlier(made, name, "generator", stage.generator, made.recipe[:index], *MODELS)
      generator = made.stages[stage.generator]
      latents_of(made, stage.generator)
      _check_bucket(f"config.stages.{name}.bucket", generator, stage.bucket, parse_bucket)
      data = data_of(made, stage.generator)
      if data.videos is not None and not data.held_out:
        raise ConfigError(
          f"config.stages.{name} samples captions of held-out clips, and held_out of their data "
          "is 0: set it to a share, like 0.05."
        )
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
    ConfigError: a mesh that does not fit the devices or the model, a batch that does not divide.
  """
  for name in made.recipe if stages is None else stages:
    stage = made.stages[name]
    if not isinstance(stage, TrainStage):
      continue
    path = f"config.stages.{name}"
    try:
      replica, fsdp, context, tensor = stage.mesh.sizes(devices)
      if hasattr(stage.task, "check_mesh"):
        stage.task.check_mesh(context, tensor)
    except ConfigError as error:
      raise ConfigError(f"{path}.mesh: {error}") from error
    batches = [entry for step in stage.phases() for entry in stage.batches(step).items()]
    for bucket, entry in batches:
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
  made: Experiment, stage: str, key: str, target: str, before: tuple[str, ...], *kinds: str
) -> Any:
  """The stage that a key points to, which must come earlier and be of one of some kinds."""
  path = f"config.stages.{stage}.{key}"
  candidates = [name for name in before if made.stages[name].kind in kinds]
  if target not in candidates:
    listed = '" or "'.join(kinds)
    raise ConfigError(
      f'{path} is "{target}", which is not an earlier stage of kind "{listed}": '
      f"{suggest(target, candidates)}"
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
  _check_start(made, name, stage, before)
  _check_data(made, name, stage, before)


def _check_start(made: Experiment, name: str, stage: TrainStage, before: tuple[str, ...]) -> None:
  """What a train stage starts from."""
  path = f"config.stages.{name}"
  if stage.init_from is not None:
    origin = _earlier(made, name, "init_from", stage.init_from, before, *MODELS)
    if type(origin.task) is not type(stage.task):
      raise ConfigError(
        f'{path}.init_from is "{stage.init_from}", which trains {origin.task.name}: it must train '
        f"{stage.task.name}."
      )
    stage.task.check_origin(origin.task, path)
  if stage.lora.rank and stage.init_from is None and stage.init_weights is None:
    raise ConfigError(
      f"{path}.lora is on, and the stage starts from random parameters: set init_from, as adapters "
      "change a model that has learned."
    )
  if stage.init_weights is not None:
    if stage.init_from is not None:
      raise ConfigError(f"{path}.init_from and {path}.init_weights are both set: unset one.")
    if not hasattr(tasks.TASKS[stage.task.name], "from_weights"):
      raise ConfigError(
        f"{path}.init_weights is set, but {stage.task.name} starts from no weights of others: "
        "unset it."
      )


def _check_data(made: Experiment, name: str, stage: TrainStage, before: tuple[str, ...]) -> None:
  """The sets of data that a train stage reads."""
  path = f"config.stages.{name}"
  parts = stage.parts()
  for step in stage.phases():
    if parts and not any(part.at(step) for part in parts.values()):
      raise ConfigError(f"{path}.mixture leaves no set of data from step {step} on.")
    weighted = {part.weight > 0 for part in parts.values() if part.at(step)}
    if len(weighted) > 1:
      raise ConfigError(
        f"{path}.mixture has weights for some sets of data of step {step} and none (0: their size) "
        "for others: give all of them one, or none."
      )
  if tasks.TASKS[stage.task.name].source == "media":
    if stage.latents is not None:
      raise ConfigError(
        f"{path}.latents is set, but {stage.task.name} learns from media: unset it."
      )
    for part in parts:
      _earlier(made, name, "mixture", part, before, "ingest")
    return
  if not parts:
    raise ConfigError(f"{path}.latents is not set: name the encode stage it reads from.")
  key = "mixture" if stage.mixture else "latents"
  coders = {made.stages[part].autoencoder for part in parts if part in before}
  for part in parts:
    encode = _earlier(made, name, key, part, before, "encode")
    _check_latents(made, path, stage, part, encode)
  if len(coders) > 1:
    raise ConfigError(
      f"{path}.mixture has latents of {' and '.join(sorted(coders))}: to a model they would be two "
      "languages, so encode all with one autoencoder."
    )


def _check_latents(
  made: Experiment, path: str, stage: TrainStage, part: str, encode: EncodeStage
) -> None:
  """A train stage against one of the encode stages that it reads."""
  wanted = set(stage.batches())
  if stage.task.name == "latte" and stage.task.images:  # beside each clip
    wanted |= {dataclasses.replace(bucket, frames=1) for bucket in wanted}
  missing = {bucket.name for bucket in wanted} - set(encode.buckets)
  if stage.mixture:  # a set of data need not fill all buckets, but some
    missing = missing if len(missing) == len(wanted) else set()
  if missing:
    raise ConfigError(
      f"{path}.buckets has {', '.join(sorted(missing))}, which stage {part} does not "
      f"encode: add it to config.stages.{part}.buckets."
    )
  autoencoder = made.stages[encode.autoencoder].task
  stage.task.check_latents(autoencoder.model, path)
  if hasattr(stage.task, "check_text"):
    stage.task.check_text(encode.text, path, part)


def _check_average(
  made: Experiment, name: str, stage: AverageStage, before: tuple[str, ...]
) -> None:
  path = f"config.stages.{name}"
  for entry in own_models(stage):
    origin = _earlier(made, name, "of", entry, before, *MODELS)
    if origin.task.name != stage.task.name or origin.task.model != stage.task.model:
      raise ConfigError(
        f"{path}.of has {entry}, whose model is not that of {path}.task: only equal models can be "
        "averaged."
      )
  if stage.latents is not None:
    _earlier(made, name, "latents", stage.latents, made.recipe, "encode")
  if stage.validation is not None:
    judge = _earlier(made, name, "validation", stage.validation, before, "train")
    if judge.task.name != stage.task.name or judge.task.model != stage.task.model:
      raise ConfigError(f"{path}.validation is {stage.validation}, which trains another model.")


def _check_reconstruct(
  made: Experiment, name: str, stage: ReconstructStage, before: tuple[str, ...]
) -> None:
  path = f"config.stages.{name}"
  if not stage.autoencoders or not stage.buckets:
    raise ConfigError(f"{path}.autoencoders and .buckets must name one or more each.")
  for coder in stage.autoencoders:
    trained = _earlier(made, name, "autoencoders", coder, before, *MODELS)
    if tasks.TASKS[trained.task.name].source != "media":
      raise ConfigError(f"{path}.autoencoders has {coder}, which trains {trained.task.name}.")
    for bucket in stage.buckets:
      _check_bucket(f"{path}.buckets", trained, bucket, parse_bucket)


def _check_bucket(path: str, stage: TrainStage, name: str, parse: Callable[[str], Bucket]) -> None:
  try:
    stage.task.check_bucket(parse(name))
  except UserError as error:
    raise ConfigError(f"{path}: bucket {name}: {error}") from error
