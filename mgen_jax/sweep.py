"""Prints the commands of a sweep, one for each combination of values; runs nothing.

  python -m mgen_jax.sweep --config=experiments/t2v_sft.py:toy \\
      --vary=stages.sft_a.optimizer.lr=1e-4,3e-4 --vary=seed=0,1
  python -m mgen_jax.sweep --config=experiments/quickstart.py --together \\
      --vary=stages.t2v.optimizer.lr=1e-3,3e-3 --vary=stages.t2v.steps=3200,1600

Each --vary is a key of the experiment and its values; all combinations are printed, or with
--together the first values of all, then the second, and so on. Values that are tuples stand in
brackets: stages.sft.lr_steps=((500,1e-5),),((900,1e-5),). Every command is checked as `main` would,
has a --workdir of its own, and stands on a line: pipe them to a shell, xargs or a job array.
--flag=cluster=slurm gives every command a further flag.
"""

import itertools
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mgen_jax import cli
from mgen_jax import config as config_lib
from mgen_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command."""
  to = {"flag_values": values}
  flags.DEFINE_string("config", None, "The experiment, as for main.", **to)
  flags.DEFINE_multi_string("vary", [], "KEY=VALUE,VALUE,...", **to)
  flags.DEFINE_bool("together", False, "Vary all keys at once, not in all combinations.", **to)
  flags.DEFINE_string("workdir", None, "Folder of the runs' folders; default: runs/sweep.", **to)
  flags.DEFINE_multi_string(
    "flag", [], "A further flag of every command, like cluster=slurm.", **to
  )


def parse(text: str) -> tuple[str, list[str]]:
  """ "a.b=1,2" -> ("a.b", ["1", "2"]); commas within brackets do not count.

  Raises:
    UserError: there is no key or no value.
  """
  key, equals, rest = text.partition("=")
  values, depth, word = [], 0, ""
  for letter in rest:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      values.append(word)
      word = ""
    else:
      word += letter
  values.append(word)
  if not key or not equals or not all(values):
    raise UserError(f"--vary={text} is not KEY=VALUE,VALUE: like --vary=seed=0,1.")
  return key.removeprefix("config."), values


def combinations(varied: Sequence[tuple[str, list[str]]], together: bool) -> list[dict[str, str]]:
  """One mapping of keys to values for each run.

  Raises:
    UserError: a key is varied twice, or keys that are varied together have unequal numbers.
  """
  keys = [key for key, _ in varied]
  if len(set(keys)) < len(keys):
    raise UserError(f"--vary names a key twice: {', '.join(keys)}.")
  lists = [values for _, values in varied]
  if together and len({len(values) for values in lists}) > 1:
    counts = ", ".join(f"{key} has {len(values)}" for key, values in varied)
    raise UserError(f"--together needs as many values of each key: {counts}.")
  rows = zip(*lists, strict=True) if together else itertools.product(*lists)
  return [dict(zip(keys, row, strict=True)) for row in rows]


def commands(
  config: str, runs: Sequence[dict[str, str]], workdir: str, extra: Sequence[str]
) -> list[str]:
  """The command of each run, checked.

  Raises:
    UserError: a key or a value that the experiment cannot have.
  """
  lines, folders = [], {}
  for run in runs:
    overrides = [f"--config.{key}={value}" for key, value in run.items()]
    name = check(config, overrides)
    words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in run.items()]
    folder = re.sub(r"[^A-Za-z0-9=_.-]+", "-", "_".join([name, *words]))
    if folder in folders:  # two keys of one last name, or values of odd letters
      folder = f"{folder}_{len(folders)}"
    folders[folder] = run
    arguments = [f"--config={config}", *overrides, f"--workdir={workdir}/{folder}", *extra]
    lines.append(shlex.join(["python", "-m", "mgen_jax.main", *arguments]))
  return lines


def check(config: str, overrides: Sequence[str]) -> str:
  """The name of the experiment with these overrides, once it has passed all checks."""
  values = flags.FlagValues()
  argv = ["sweep", f"--config={config}", *overrides]
  cli.check_experiment(argv)
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (AttributeError, KeyError) as error:
    unknown = cli.unknown_override(argv, error)
    if unknown is None:
      raise
    raise unknown from error
  except (TypeError, ValueError, flags.Error) as error:
    raise UserError(f"{' '.join(overrides)} cannot be used: {error}") from error
  return config_lib.resolve(holder.value).name


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Prints one command for each run of the sweep."""
  del argv
  if values.config is None or not values.vary:
    raise UserError("--config and at least one --vary are needed: see --help.")
  runs = combinations([parse(text) for text in values.vary], values.together)
  extra = [f"--{flag.lstrip('-')}" for flag in values.flag]
  for line in commands(values.config, runs, values.workdir or "runs/sweep", extra):
    print(line)
  print(f"{len(runs)} runs", file=sys.stderr)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
