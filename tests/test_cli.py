"""What a command says of a wrong --config, before the file is run."""

import pytest

from mgen_jax import cli
from mgen_jax.errors import UserError

PLAIN = "def get_config():\n  return {}\n"
VARIANTS = "def get_config(variant):\n  return {}\n"
OPTIONAL = "def get_config(variant='toy'):\n  return {}\n"


@pytest.mark.parametrize(
  ("name", "source", "variant", "words"),
  [
    ("absent.py", None, "", "absent.py does not exist: name an experiment"),
    ("notes.md", "# Notes", "", "notes.md is no Python file"),
    ("folder", "", "", "folder is no Python file"),
    ("half.py", "def get_config(:", "", r"half.py is no valid Python \(line 1\)"),
    ("null.py", "\0", "", "null.py is no valid Python"),
    ("other.py", "x = 1", "", "other.py has no function get_config"),
    ("plain.py", PLAIN, ":toy", 'has no variants: leave out ":toy"'),
    ("variants.py", VARIANTS, "", "has variants: name one"),
  ],
)
@pytest.mark.parametrize("form", ["--config={}", "-config={}", "--config {}"])
def test_what_is_no_experiment_is_told_from_one_that_fails(
  tmp_path, name, source, variant, words, form
):
  path = tmp_path / name
  if source:
    path.write_text(source)
  elif source is not None:
    path.mkdir()
  arguments = form.format(f"{path}{variant}").split(" ")
  with pytest.raises(UserError, match=words):
    cli.check_experiment(["main", "--workdir=w", *arguments, "--config.seed=1"])


@pytest.mark.parametrize(
  ("source", "variant"),
  [
    (PLAIN, ""),
    (VARIANTS, ":toy"),
    (VARIANTS, ":h100:large"),
    (OPTIONAL, ""),
    (OPTIONAL, ":full"),
    ("from elsewhere import get_config", ":toy"),
    ("get_config = functools.partial(make, 3)", ""),
    ("raise ValueError('a fault of the file itself')\n" + PLAIN, ""),
  ],
)
def test_an_experiment_is_left_alone(tmp_path, source, variant):
  (tmp_path / "made.py").write_text(source)
  cli.check_experiment(["main", f"--config={tmp_path}/made.py{variant}"])
  cli.check_experiment(["main", "--config.seed=1"])
