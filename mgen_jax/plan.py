"""Plans a stage on hardware that is not here: does it fit, what does it send, how long is a step.

  python -m mgen_jax.plan --config=experiments/t2v_30b.py --stage=t2v_768_cp2 --topology=v5p:8x8x8
  python -m mgen_jax.plan ... --topology=h100:768x8 --out=plans/h100.json
  python -m mgen_jax.plan ... --topology=v6e:16x16 --search --config.stages.t2v.accumulate=2
  python -m mgen_jax.plan ... --topology=h100:1x8 --what=sample --bucket=256x768x768 --search
  python -m mgen_jax.plan ... --topology=v5p:8x8x8 --compare=plans/h100.json
  python -m mgen_jax.plan --compare=plans/a.json,plans/b.json

The step that training would run (or, with --what=sample, the denoising of a batch of samples with
guidance) is compiled for that hardware, from shapes alone; neither a TPU nor a GPU is needed, but
their compiler is: pip install -e .[tpu] or .[cuda]. Of an average stage it is said what a device
holds. A stage whose batches change is planned where they are largest (--at_step). Topologies: chips
along the torus (v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4), nodes x GPUs (h100:768x8, h200:16x8,
b200:16x8), or devices simulated on the CPU (cpu:8). See docs/planning.md.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
from absl import flags, logging
from ml_collections import config_flags

from mgen_jax import cli
from mgen_jax import config as config_lib
from mgen_jax.config import AverageStage, Experiment, TrainStage
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.data.files import make_folder, write_text_atomic
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.planning import apart, averaging, planner, report, sampling, topologies
from mgen_jax.planning import search as search_lib

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment.")
_STAGE = flags.DEFINE_string(
  "stage", None, "Train or average stage; may be left out if one trains."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, f"Hardware, one of or like: {', '.join(topologies.EXAMPLES.values())}."
)
_BUCKET = flags.DEFINE_string(
  "bucket", None, "Like 256x768x768; by default that with the most tokens in its batch."
)
_ALL_BUCKETS = flags.DEFINE_bool("all_buckets", False, "Plan every bucket of the stage.")
_AT_STEP = flags.DEFINE_integer(
  "at_step", None, "Of a stage with batch_changes: plan the batches of this step.", 0
)
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and accumulations.")
_TRIES = flags.DEFINE_integer("tries", 6, "With --search: how many choices to compile.", 1)
_TRY_SECONDS = flags.DEFINE_float(
  "try_seconds", 900, "With --search or --all_buckets: the most that one program may take.", 1
)
_COMPARE = flags.DEFINE_string(
  "compare", None, "A saved plan to compare with; two, with a comma, are compared as they are."
)
_WHAT = flags.DEFINE_enum(
  "what", "train", ["train", "sample"], "The train step, or drawing samples with the model."
)
_MESH = flags.DEFINE_string(
  "mesh", None, "With --what=sample: like context=4,tensor=2; default: a sample a device."
)
_SAMPLES = flags.DEFINE_integer(
  "samples", None, "With --what=sample: drawn at a time; default: as few as the mesh divides."
)
_OUT = flags.DEFINE_string("out", None, "Save FILE.json, FILE.txt and FILE.png here.")


def main(argv: Sequence[str]) -> None:
  """Makes the plans that the flags ask for, shows and saves them."""
  del argv
  console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
  others = [read_plan(path) for path in (_COMPARE.value or "").split(",") if path]
  if len(others) == 2 and _CONFIG.value is None:
    report.show_comparison(*others, console)
    return
  if len(others) > 1:
    raise UserError("--compare takes one plan beside --config, or two plans without --config.")
  if _CONFIG.value is None:
    raise UserError("--config is missing: name an experiment, like experiments/quickstart.py.")
  if _TOPOLOGY.value is None:
    known = ", ".join(topologies.EXAMPLES.values())
    raise UserError(f"--topology is missing: name the hardware, like one of {known}.")
  wanted = _sampling()
  topology = topologies.parse(_TOPOLOGY.value)
  if _OUT.value:
    make_folder(_stem(_OUT.value).parent, f"--out={_OUT.value}")
  experiment = config_lib.resolve(_CONFIG.value)
  name = pick_stage(experiment, _STAGE.value)
  if isinstance(experiment.stages[name], AverageStage):
    _plan_average(experiment, name, topology, console)
    return
  experiment, phase = at_step(experiment, name, _AT_STEP.value)
  if phase is not None:
    logging.info("%s", phase)
  if wanted is None:
    buckets = pick_buckets(experiment, name, _BUCKET.value, _ALL_BUCKETS.value)
  else:
    buckets = pick_sample_buckets(experiment, name, _BUCKET.value, _ALL_BUCKETS.value)

  # The host itself only traces; it must not look for accelerators, nor give old compile times.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  devices = topologies.devices(topology)
  where = (experiment, name, buckets[0], topology, devices)
  logging.info(
    "compiling %s of stage %s, bucket %s, for %s",
    *("the sampler" if wanted else "the step", name, buckets[0].name, topology.name),
  )
  if wanted is None:
    first = planner.make_plan(*where)
  else:
    first = planner.make_sample_plan(*where, wanted)
  if phase is not None and wanted is None:
    first.record["notes"].append(phase)
  record = first.record
  if len(buckets) > 1:
    record = plan_buckets(first, buckets)
  if _SEARCH.value:
    _search(where, first, wanted, record)

  def draw(to: rich.console.Console) -> None:
    report.show_all(record, to)
    for other in others:
      report.show_comparison(other, record, to)

  draw(console)
  if _OUT.value:
    shown = list(record.get("buckets", {"": record}).values())
    save(_OUT.value, record, report.as_text(draw), shown)


def _sampling() -> sampling.Sampling | None:
  """What to plan of drawing samples; None: the train step is planned."""
  if _WHAT.value == "sample":
    mesh = None if _MESH.value is None else mesh_lib.parse(_MESH.value)
    return sampling.Sampling(mesh, _SAMPLES.value)
  if _MESH.value is not None or _SAMPLES.value is not None:
    raise UserError(
      "--mesh and --samples are of --what=sample: a stage's own are --config.stages.NAME.mesh.AXIS "
      "and --config.stages.NAME.buckets.BUCKET.batch."
    )
  return None


def _search(
  where: tuple, first: planner.Plan, wanted: sampling.Sampling | None, record: dict[str, Any]
) -> None:
  """Tries other choices than those of `first`, and puts them into `record` as they are made."""
  bucket = where[2].name

  def one(changes: str) -> planner.Plan:
    flags = [*own_flags(sys.argv, ["mesh"]), f"--bucket={bucket}", *changes.split()]
    return apart.plan(flags, _TRY_SECONDS.value)

  def keep(trials: list[search_lib.Trial]) -> None:
    record["search"] = [trial.record() for trial in trials]
    save_record(record)

  how = {"apart": one, "after_each": keep}
  if wanted is None:
    trials = search_lib.search(*where, first, _TRIES.value, **how)
  else:
    trials = search_lib.search_sampling(*where, first, wanted, _TRIES.value, **how)
  record["search"] = [trial.record() for trial in trials]


def plan_buckets(first: planner.Plan, buckets: Sequence[Bucket]) -> dict[str, Any]:
  """The plan of the bucket that needs most memory, with all of them under "buckets".

  Each is made in a process of its own. A bucket that is another one on its side is the same
  program but for the order of its axes, and takes its figures.
  """
  plans = {buckets[0].name: first.record}
  record = dict(first.record)
  for number, bucket in enumerate(buckets[1:], start=2):
    twin = Bucket(bucket.frames, bucket.width, bucket.height).name
    if twin in plans:
      plans[bucket.name] = {**plans[twin], "bucket": bucket.name, "same_as": twin}
    else:
      where = f"bucket {bucket.name} ({number} of {len(buckets)})"
      logging.info("compiling %s", where)
      began = time.perf_counter()
      try:
        plan = apart.plan([*own_flags(sys.argv), f"--bucket={bucket.name}"], _TRY_SECONDS.value)
      except UserError as error:
        raise UserError(f"{where} could not be planned: {error}") from error
      logging.info("%s: %s, in %.0f s", where, plan.brief(), time.perf_counter() - began)
      plans[bucket.name] = plan.record
    record = dict(max(plans.values(), key=lambda plan: plan["memory_gib"]["total"]))
    record["buckets"] = plans
    record["fits"] = all(plan["fits"] for plan in plans.values())
    save_record(record)
  return record


# Flags that are of this process, not of a plan that it has made in another.
_OWN = ("tries", "try_seconds", "bucket", "compare", "out")
_SWITCHES = ("search", "all_buckets")


def own_flags(argv: Sequence[str], without: Sequence[str] = ()) -> list[str]:
  """The flags of a command line, but for those of `_OWN` and `without`."""
  kept, value_follows = [], False
  for part in argv[1:]:
    name, equals, _ = part.lstrip("-").partition("=")
    if value_follows and not part.startswith("-"):
      value_follows = False
      continue
    value_follows = False
    if part.startswith("-") and name.removeprefix("no") in _SWITCHES:
      continue
    if part.startswith("-") and name in (*_OWN, *without):
      value_follows = not equals
      continue
    kept.append(part)
  return kept


def _plan_average(
  experiment: Experiment, name: str, topology: topologies.Topology, console: rich.console.Console
) -> None:
  """Makes, shows and saves the plan of an average stage."""
  if _SEARCH.value or _COMPARE.value or _ALL_BUCKETS.value or _WHAT.value != "train":
    raise UserError(
      f"stage {name} is an average: it takes neither --what, --search, --compare nor --all_buckets."
    )
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  record = averaging.make_plan(experiment, name, topology, topologies.devices(topology))
  averaging.show(record, console)
  save_record(record)


def pick_stage(experiment: Experiment, name: str | None) -> str:
  """The train (or, if it is named, average) stage to plan.

  Raises:
    UserError: there is no such stage, or it makes no model.
  """
  if isinstance(experiment.stages.get(name), AverageStage):
    return name
  known = [n for n in experiment.recipe if isinstance(experiment.stages[n], TrainStage)]
  if name is None and len(known) == 1:
    return known[0]
  if name is None:
    raise UserError(
      f'--stage is missing, and "{experiment.name}" trains {len(known)} stages: name one of '
      f"{', '.join(known)}."
    )
  if name not in known:
    what = "does not train" if name in experiment.stages else f'is not in "{experiment.name}"'
    raise UserError(f"--stage={name} {what}: {suggest(name, known)}")
  return name


def at_step(experiment: Experiment, name: str, step: int | None) -> tuple[Experiment, str | None]:
  """The experiment with the batches that stage `name` has at a step (None: where they are largest)
  for all of it, and a sentence that says which; None where they never change.

  Raises:
    UserError: the stage has no such step.
  """
  stage = experiment.stages[name]
  if step is not None and step >= stage.steps:
    raise UserError(
      f"--at_step={step} is not a step of stage {name}: it has {stage.steps} of them."
    )
  if not stage.batch_changes:
    return experiment, None
  changes = ((0, 1.0), *(change for change in stage.batch_changes if change[0] < stage.steps))
  largest = max(changes, key=lambda change: change[1])
  first, factor = largest if step is None else max(c for c in changes if c[0] <= step)
  listed = ", ".join(f"x{change[1]:g} from step {change[0]}" for change in changes)
  where = "the largest of the stage" if factor == largest[1] else "not its largest"
  said = (
    f"batches are those from step {first} on, x{factor:g}, {where} (batch_changes: {listed}); "
    "--at_step plans others."
  )
  stages = {**experiment.stages, name: stage.at_step(first)}
  return dataclasses.replace(experiment, stages=stages), said


def pick_buckets(experiment: Experiment, name: str, text: str | None, every: bool) -> list[Bucket]:
  """The buckets to plan, that with the most tokens in its batch first.

  Raises:
    UserError: the stage has no such bucket.
  """
  stage = experiment.stages[name]
  task = planner.compile_lib.train_task(experiment, name)
  batches = stage.batches()
  ordered = sorted(batches, key=lambda b: batches[b].batch * task.tokens(b), reverse=True)
  if text is None:
    return ordered if every else ordered[:1]
  bucket = parse_bucket(text.removeprefix("b"))
  if bucket not in batches:
    known = [b.name for b in ordered]
    raise UserError(
      f"--bucket={text} is not a bucket of stage {name}: {suggest(bucket.name, known)}"
    )
  return [bucket]


def pick_sample_buckets(
  experiment: Experiment, name: str, text: str | None, every: bool
) -> list[Bucket]:
  """The shapes to plan the sampling of, that with the most tokens first: those of the stage, or
  any other one that is named."""
  task = planner.compile_lib.train_task(experiment, name)
  if text is not None:
    return [parse_bucket(text.removeprefix("b"))]
  ordered = sorted(experiment.stages[name].batches(), key=task.tokens, reverse=True)
  return ordered if every else ordered[:1]


def read_plan(path: str) -> dict[str, Any]:
  """A plan that --out has saved.

  Raises:
    UserError: it is missing or is none.
  """
  if not os.path.isfile(path):
    raise UserError(f"--compare={path} does not exist: name a plan that --out has saved.")
  with open(path, encoding="utf-8") as file:
    try:
      record = json.load(file)
    except ValueError as error:
      raise UserError(f"--compare={path} is not JSON ({error}): name a saved plan.") from error
  if not isinstance(record, dict) or "memory_gib" not in record:
    raise UserError(f"--compare={path} is not a plan: name a file that --out has saved.")
  record["memory_gib"].setdefault("frozen", 0.0)  # saved before there were frozen encoders
  return record


def save(out: str, record: dict[str, Any], text: str, shown: list[dict[str, Any]]) -> None:
  """Writes the plan as JSON, as text and as a picture, side by side."""
  save_record(record)
  stem = _stem(out)
  write_text_atomic(stem.with_name(stem.name + ".txt"), text)
  stem.with_name(stem.name + ".png").write_bytes(report.picture(shown))
  logging.info("saved %s.json, .txt and .png", stem)


def save_record(record: dict[str, Any]) -> None:
  """Writes the JSON, if there is to be one: also of what is not yet complete."""
  if _OUT.value:
    stem = _stem(_OUT.value)
    write_text_atomic(stem.with_name(stem.name + ".json"), json.dumps(record, indent=2) + "\n")


def _stem(out: str) -> Path:
  path = Path(out)
  return path.with_suffix("") if path.suffix in (".json", ".txt", ".png") else path


if __name__ == "__main__":
  cli.run(main)
