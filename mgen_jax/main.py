"""Runs an experiment: every stage of its recipe, in order.

  python -m mgen_jax.main --config=experiments/quickstart.py
  python -m mgen_jax.main --config=experiments/quickstart.py --config.stages.t2v.optimizer.lr=1e-4
  python -m mgen_jax.main --config=experiments/quickstart.py --stage=t2v --workdir=runs/mine

A finished stage is skipped and an interrupted one continues where it was, so after any
interruption the same command goes on. For several hosts, start the same command on each (launch/
does): SLURM and Kubernetes tell the processes of each other, a TPU slice does with --cluster=tpu,
elsewhere --coordinator, --num_processes and --process_id do. On accelerators compiled programs are
kept in WORKDIR/compiled, so that a run that starts again does not compile again
(--compilation_cache).
"""

import os
import time
from collections.abc import Sequence

import jax
from absl import flags, logging
from ml_collections import config_flags

from mgen_jax import (
  average,
  cli,
  compilation_cache,
  distributed,
  encode,
  evaluate,
  ingest,
  reconstruct,
)
from mgen_jax import config as config_lib
from mgen_jax.errors import UserError, suggest
from mgen_jax.parallel import cpu
from mgen_jax.training import runner, start
from mgen_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME by default.")
_STAGE = flags.DEFINE_string("stage", None, "Run only this stage of the recipe.")
_CLUSTER = flags.DEFINE_enum(
  "cluster",
  "auto",
  distributed.CLUSTERS,
  "Where the other processes are found; auto: as the environment says, tpu: as the slice does.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.")
_START_TIMEOUT = flags.DEFINE_integer(
  "start_timeout", 300, "Seconds to wait for the other processes when the run or a stage begins."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout", 100, "Seconds after which a silent process counts as lost; all end then."
)
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
    near = suggest(_STAGE.value, experiment.recipe)
    raise UserError(f'--stage={_STAGE.value} is not a stage of "{experiment.name}": {near}')

  cluster = distributed.choose(
    os.environ,
    cluster=_CLUSTER.value,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
  distributed.start(cluster, timeout=_START_TIMEOUT.value, heartbeat=_HEARTBEAT_TIMEOUT.value)
  cpu.keep_memory()
  config_lib.check_devices(experiment, jax.device_count(), jax.process_count(), stages)
  work = Workdir.create(_WORKDIR.value or f"runs/{experiment.name}", experiment)
  start.check_weights(work, stages)
  if _CACHE.value == "off":
    jax.config.update("jax_enable_compilation_cache", False)
  kept = compilation_cache.choose(_CACHE.value, work.root, jax.default_backend())
  if kept is not None:
    compilation_cache.enable(kept)
  logging.info(
    "%s in %s on %d x %s", experiment.name, work.root, jax.device_count(), jax.devices()[0]
  )

  distributed.barrier("workdir", _START_TIMEOUT.value)
  for name in stages:
    done = work.is_done(name)
    # All processes look before one of them can change the answer.
    distributed.barrier(f"{name} begins", _START_TIMEOUT.value)
    if done:
      logging.info("stage %s is done", name)
      continue
    began = time.perf_counter()
    logging.info("stage %s begins", name)
    work.start(name)
    RUNNERS[experiment.stages[name].kind](work, name)
    # What one wrote, the others now see. Some stages work in process 0 alone, for as long as they
    # take: there is no time limit, and one that died is found by its heartbeat.
    distributed.barrier(f"{name} ends", 0)
    logging.info("stage %s took %.0f s", name, time.perf_counter() - began)


if __name__ == "__main__":
  cli.run(main)
