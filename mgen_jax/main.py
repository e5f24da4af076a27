"""Runs an experiment: every stage of its recipe, in order.

  python -m mgen_jax.main --config=experiments/quickstart.py
  python -m mgen_jax.main --config=experiments/quickstart.py --config.stages.t2v.optimizer.lr=1e-4
  python -m mgen_jax.main --config=experiments/quickstart.py --stage=t2v --workdir=runs/mine

A finished stage is skipped and an interrupted one continues where it was, so after any
interruption the same command goes on. For several hosts, start the same command on each: on a
cluster that JAX knows with --distributed, elsewhere with --coordinator, --num_processes and
--process_id. On accelerators compiled programs are kept in WORKDIR/compiled, so that a run that
starts again does not compile again (--compilation_cache).
"""

import time
from collections.abc import Sequence

import jax
from absl import flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from mgen_jax import average, cli, compilation_cache, encode, evaluate, ingest, reconstruct, schema
from mgen_jax import config as config_lib
from mgen_jax.errors import UserError
from mgen_jax.training import runner
from mgen_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME by default.")
_STAGE = flags.DEFINE_string("stage", None, "Run only this stage of the recipe.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several hosts, found by JAX.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.")
_CACHE = flags.DEFINE_string(
  "compilation_cache",
  "auto",
  'Folder of compiled programs; "off", or "auto": WORKDIR/compiled but on a CPU.',
)

RUNNERS = {
  "ingest": ingest.run,
  "train": runner.run,
  "average": average.run,
  "encode": encode.run,
  "evaluate": evaluate.run,
  "reconstruct": reconstruct.run,
}


def main(argv: Sequence[str]) -> None:
  """Resolves the experiment, checks all of it, then runs what is not done yet."""
  del argv
  if _CONFIG.value is None:
    raise UserError("--config is missing: name an experiment, like experiments/quickstart.py.")
  experiment = config_lib.resolve(_CONFIG.value)
  stages = experiment.recipe if _STAGE.value is None else (_STAGE.value,)
  if not set(stages) <= set(experiment.recipe):
    near = schema.suggest(_STAGE.value, experiment.recipe)
    raise UserError(f'--stage={_STAGE.value} is not a stage of "{experiment.name}": {near}')

  if _DISTRIBUTED.value or _COORDINATOR.value:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of use on CPUs only
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  config_lib.check_devices(experiment, jax.device_count(), jax.process_count(), stages)
  work = Workdir.create(_WORKDIR.value or f"runs/{experiment.name}", experiment)
  if _CACHE.value == "off":
    jax.config.update("jax_enable_compilation_cache", False)
  kept = compilation_cache.choose(_CACHE.value, work.root, jax.default_backend())
  if kept is not None:
    compilation_cache.enable(kept)
  logging.info(
    "%s in %s on %d x %s", experiment.name, work.root, jax.device_count(), jax.devices()[0]
  )

  multihost_utils.sync_global_devices("workdir")
  for name in stages:
    done = work.is_done(name)
    # All processes look before one of them can change the answer.
    multihost_utils.sync_global_devices(f"{name} begins")
    if done:
      logging.info("stage %s is done", name)
      continue
    began = time.perf_counter()
    logging.info("stage %s begins", name)
    work.start(name)
    RUNNERS[experiment.stages[name].kind](work, name)
    multihost_utils.sync_global_devices(f"{name} ends")  # what one wrote, the others now see
    logging.info("stage %s took %.0f s", name, time.perf_counter() - began)


if __name__ == "__main__":
  cli.run(main)
