"""How every command starts and ends: flags, one sentence for a fault of the user's, exit codes.

Exit codes: 0 done, 2 a fault that the user can fix (`UserError`), 130 Ctrl-C and 143 SIGTERM, both
after saving, 75 another process of the run is gone. After 130, 143 and 75 the same command goes on.
Anything else is a bug and keeps its traceback.
"""

import ast
import errno
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from mgen_jax.errors import ConfigError, UserError, nearest
from mgen_jax.training.interrupt import Interrupted, lost_process

LOST_PROCESS = 75  # what sysexits.h calls a temporary failure

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Parses the flags, calls `main` with what is left, and exits."""

  def guarded(argv: Sequence[str]) -> int:
    _set_up_logging()
    # Else JAX's own handler swallows SIGTERM in a run of several processes (`StopSignal` is ours).
    jax.config.update("jax_enable_preemption_service", False)
    try:
      if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: flags are written --name=value (see --help).")
      main(argv)
    except UserError as error:
      _say(error)
      return _leave(2)
    except Interrupted as error:
      _say(f"{error}; everything is saved, and the same command continues.")
      return 128 + error.signum
    except OSError as error:
      if error.errno not in _FULL:
        raise
      _say(
        f"{error.filename or 'a file'} could not be written ({error.strerror}): make room on that "
        "disk and run the same command again."
      )
      return _leave(2)
    except Exception as error:
      if not jax.distributed.is_initialized():
        raise
      if not lost_process(error):
        traceback.print_exc()
        return _leave(1)
      first_line = str(error).splitlines()[0][:200]
      _say(
        f"another process of this run is gone or cannot be reached ({first_line}): its log says "
        "why; start the same command again on every host, and the run goes on from its last "
        "checkpoint."
      )
      return _leave(LOST_PROCESS)
    return 0

  app.run(guarded, flags_parser=_parse)


def _leave(code: int) -> int:
  """Ends one of several processes at once: the usual way out would wait for all the others."""
  if jax.distributed.is_initialized():
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _set_up_logging() -> None:
  """Our own lines from info on, those of others from warnings on (Orbax: errors), with the time."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

  def wanted(record: std_logging.LogRecord) -> bool:
    path = os.path.normpath(record.pathname)
    if f"{os.sep}mgen_jax{os.sep}" in path:
      return True
    least = std_logging.ERROR if f"{os.sep}orbax{os.sep}" in path else std_logging.WARNING
    return record.levelno >= least

  handler.addFilter(wanted)


def _parse(argv: Sequence[str]) -> list[str]:
  """Like absl's own parser, with one sentence for what a config flag gets wrong, and with a help
  that is no fault (absl exits with 1)."""
  if {"--help", "-h"} & set(argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True)
    sys.exit(0)
  try:
    if "config" in flags.FLAGS:
      check_experiment(argv)
    return flags.FLAGS(argv)
  except UserError as error:
    _say(error)
  except flags.Error as error:
    _say(f"{error} (see --help)")
  except (AttributeError, KeyError) as error:  # an override of a key that does not exist
    override = unknown_override(argv, error) if "config" in flags.FLAGS else None
    if override is None:
      raise
    _say(override)
  except (TypeError, ValueError) as error:
    if not any(arg.startswith("--config.") for arg in argv):
      raise
    _say(f"an override of --config has the wrong type: {error}")
  sys.exit(2)


def check_experiment(argv: Sequence[str]) -> None:
  """Looks at the file that --config names before it is run, to tell a wrong file or variant from a
  file that fails inside.

  Raises:
    UserError: there is no such file, it is no experiment, or it has no such variant.
  """
  found = re.search(r"(?:^|\n)--?config[=\n]([^:\n]*)(?::(.*))?", "\n".join(argv[1:]))
  if found is None:
    return
  path, variant = found.groups()
  example = "name an experiment, like experiments/quickstart.py."
  if not os.path.exists(path):
    raise UserError(f"--config={path} does not exist: {example}")
  if not os.path.isfile(path) or not path.endswith(".py"):
    raise UserError(f"--config={path} is no Python file: {example}")
  try:
    with open(path, "rb") as file:
      source = file.read()
    tree = ast.parse(source)
  except (SyntaxError, ValueError) as error:
    line = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
    raise UserError(f"--config={path} is no valid Python{line}: {error}.") from error
  functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
  takes = next((node.args for node in functions if node.name == "get_config"), None)
  if b"get_config" not in source:
    raise UserError(f"--config={path} has no function get_config: {example}")
  if takes is None:  # imported, or made in another way
    return
  if variant is not None and not takes.args and not takes.vararg:
    raise UserError(f'--config={path} has no variants: leave out ":{variant}".')
  if variant is None and len(takes.args) > len(takes.defaults):
    raise UserError(f"--config={path} has variants: name one, as its docstring says, {path}:NAME.")


def unknown_override(argv: Sequence[str], error: Exception) -> ConfigError | None:
  """Names the override that `error` is about, with the nearest key that exists."""
  overrides = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--config.")]
  if not overrides:
    return None
  keys = _known_keys(argv)
  for name in overrides:
    key = name.removeprefix("config.")
    if keys and key not in keys and not any(known.startswith(key + ".") for known in keys):
      near = nearest(key, keys)
      hint = f'did you mean "--config.{near[0]}"?' if near else "see WORKDIR/config.json for all."
      return ConfigError(f"--{name} is not a key of this experiment: {hint}")
  return ConfigError(f"an override of --config cannot be used: {error}")


def _known_keys(argv: Sequence[str]) -> list[str]:
  """All keys of the experiment that --config names, with dots."""
  from ml_collections import config_flags

  from mgen_jax import schema

  plain = [arg for arg in argv if not arg.startswith("--config.")]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=plain)
  values(plain, known_only=True)
  return list(schema.flatten(config.value.to_dict()))


def _say(message: object) -> None:
  print(f"error: {message}", file=sys.stderr)
