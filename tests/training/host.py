"""One process of a run of the toy on the real pipeline, for tests that start, kill and restart it.

  python -m tests.training.host --folder=DIR --processes=2 --index=0 --port=4711

It ends like every command does: see `cli.py` for the exit codes.
"""

import os
import time

import jax
from absl import flags

from mgen_jax import cli
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from tests.training import moments

FOLDER = flags.DEFINE_string("folder", None, "Of the run.", required=True)
STEPS = flags.DEFINE_integer("steps", 24, "In all.")
EVERY = flags.DEFINE_integer("every", 4, "Steps between checkpoints.")
MESH = flags.DEFINE_multi_string("mesh", [], "axis=size; by default all devices are fsdp.")
PROCESSES = flags.DEFINE_integer("processes", 1, "How many.")
INDEX = flags.DEFINE_integer("index", 0, "Which of them this is.")
PORT = flags.DEFINE_integer("port", None, "Of process 0.")
WORKERS = flags.DEFINE_integer("workers", 0, "Of Grain.")
SIGNAL = flags.DEFINE_integer("signal", 0, "Sent to itself.")
MOMENT = flags.DEFINE_string("moment", moments.BATCH, "When it is sent.")
AT = flags.DEFINE_integer("at", None, "And which: the number of a batch, or times before.")
BREAKS = flags.DEFINE_integer("breaks", None, "The number of a batch that cannot be read here.")
PREPARED = flags.DEFINE_string("prepared", None, "Waits for this file before it is sent.")


def main(argv):
  del argv
  if PROCESSES.value > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT.value}", PROCESSES.value, INDEX.value)
  from tests.training import toy

  times = dict.fromkeys(moments.WITHIN_A_SAVE, 0)

  def passes(name, number=None):
    if number is None:
      number, times[name] = times[name], times[name] + 1
    if (name, number) == (MOMENT.value, AT.value):
      while PREPARED.value and not os.path.exists(PREPARED.value):
        time.sleep(0.01)
      os.kill(os.getpid(), SIGNAL.value)

  def on_batch(number):
    passes(moments.BATCH, number)
    if number == BREAKS.value:
      raise UserError(f"record {number} of a shard cannot be read: bring it back.")

  moments.watch(passes)
  mesh = dict(entry.split("=") for entry in MESH.value) or {"fsdp": jax.device_count()}
  toy.train(
    FOLDER.value,
    devices=None,
    data=toy.mixed_stream(WORKERS.value, on_batch=on_batch),
    mesh=mesh_lib.MeshConfig(**{axis: int(size) for axis, size in mesh.items()}),
    steps=STEPS.value,
    checkpoint_every=EVERY.value,
  )


if __name__ == "__main__":
  cli.run(main)
