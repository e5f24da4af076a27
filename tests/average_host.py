"""One process of an average that several make together, for tests/test_average.py.

python -m tests.average_host --folder=RUN --stage=average --processes=2 --index=0 --port=4711
"""

import jax
from absl import flags

from mgen_jax import average, cli
from mgen_jax.workdir import Workdir

FOLDER = flags.DEFINE_string("folder", None, "Of the run.", required=True)
STAGE = flags.DEFINE_string("stage", None, "An average stage of it.", required=True)
PROCESSES = flags.DEFINE_integer("processes", 1, "How many.")
INDEX = flags.DEFINE_integer("index", 0, "Which of them this is.")
PORT = flags.DEFINE_integer("port", None, "Of process 0.")


def main(argv):
  del argv
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{PORT.value}", PROCESSES.value, INDEX.value)
  average.run(Workdir.open(FOLDER.value), STAGE.value)


if __name__ == "__main__":
  cli.run(main)
