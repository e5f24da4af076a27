"""Where compiled programs are kept, so that a run that starts again does not compile again.

JAX keeps them under a hash of the program, the compiler and the devices. Whoever can write to that
folder can make a run execute what they like: it belongs to the run, or to its user.
"""

import os
from pathlib import Path

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from mgen_jax.errors import UserError

FOLDER = "compiled"  # in the folder of a run


def choose(wanted: str, root: str | os.PathLike, platform: str) -> str | None:
  """The folder to keep programs in; None: keep none, or leave it to JAX's own setting.

  "auto" is the folder of the run on accelerators, where the same machine type comes back. On a CPU
  it is none: what is compiled there uses what that very processor can do, and a run may move.

  Args:
    wanted: "auto", "off" or a folder.
    root: of the run.
    platform: of the devices.
  """
  if wanted == "off":
    return None
  if wanted != "auto":
    return wanted
  if os.environ.get("JAX_COMPILATION_CACHE_DIR") or platform == "cpu":
    return None  # JAX reads its own variable
  return str(Path(root) / FOLDER)


def enable(folder: str) -> None:
  """Keeps programs there from now on, and uses those that are there.

  Raises:
    UserError: the folder cannot be made.
  """
  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--compilation_cache={folder} cannot be made ({error.strerror}): name another folder, or "
      '"off".'
    ) from error
  jax.config.update("jax_compilation_cache_dir", str(folder))
  compilation_cache.reset_cache()  # one that a program compiled before has opened
  logging.info("compiled programs are kept in %s", folder)
