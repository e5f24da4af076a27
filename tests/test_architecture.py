"""The rules of the house that a program can check: who may import whom, and what no file may do.

`MAY_IMPORT` is the layering of WORKSPACE.md, written down once. A new part of the package belongs
in it before it can be imported; the tests say so by name. Nothing is imported here, only parsed.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

BELOW_TASKS = {
  *("errors", "schema", "parallel", "data"),
  *("models", "diffusion", "weights", "encoders"),
}
BELOW_TRAINING = BELOW_TASKS | {"tasks", "config", "workdir"}
LIBRARY = BELOW_TRAINING | {
  *("training", "coding", "planning", "evaluation", "cli", "compilation_cache"),
  *("distributed", "generator"),
}
COMMANDS = {
  *("main", "ingest", "plan", "encode", "sample", "evaluate", "reconstruct", "convert"),
  *("watch", "plot", "average", "sweep"),
}

# Part of mgen_jax -> the other parts that it may import. A part may always import itself.
MAY_IMPORT = {
  "__init__": set(),
  "errors": set(),
  "schema": {"errors"},
  "parallel": {"errors"},
  "data": {"errors"},
  "diffusion": {"errors", "parallel"},
  "models": {"errors", "parallel"},
  "weights": {"errors", "schema", "parallel", "data", "models"},  # data: whole files or none
  "encoders": {"errors", "schema", "parallel", "data", "models", "weights"},  # data: prompts
  "tasks": BELOW_TASKS,
  "config": BELOW_TASKS | {"tasks"},  # where the parts' configs meet
  "workdir": {"errors", "schema", "data", "config"},
  "training": BELOW_TRAINING - {"models", "diffusion", "encoders"},  # it knows no model
  "coding": BELOW_TASKS | {"tasks"},
  "generator": BELOW_TRAINING | {"training"},  # draws with what it has trained
  "planning": BELOW_TRAINING | {"training"},  # compiles what training would run
  "evaluation": {"errors", "schema", "data", "models", "diffusion"},
  "cli": {"errors", "schema", "training"},
  "compilation_cache": {"errors"},
  "distributed": {"errors"},
  **dict.fromkeys(COMMANDS, LIBRARY | COMMANDS),
}

# What only curation needs: mgen_jax imports none of it, and stages of curation know no engine.
CURATION_PACKAGES = {
  *("cv2", "duckdb", "faiss", "onnxruntime", "pdqhash", "rapidocr", "ray"),
  *("apache_beam", "simplejpeg"),
}
ENGINES = {"ray", "apache_beam"}
ABOVE_STAGES = {
  *("config", "engines", "export", "funnel", "report", "run", "select", "sources", "store", "work"),
  *("command", "shards"),
}

UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def name_of(path: pathlib.Path, root: pathlib.Path) -> str:
  """The dotted module name of a file below `root`: `mgen_jax.data.media`."""
  parts = path.relative_to(root).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, is_package: bool) -> list[tuple[int, str]]:
  """(line, dotted name) of everything imported anywhere in a file, late imports included.

  `from a.b import c` counts as `a.b.c`, whether c is a module or a name in one.
  """
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        package = module.split(".") if is_package else module.split(".")[:-1]
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, *filter(None, [base])])
      found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
  return found


def part_of(module: str) -> str:
  """The part of mgen_jax that a dotted name below it belongs to: the longest row that fits."""
  names = module.split(".")[1:]
  if not names or names[0].startswith("__"):
    return "__init__"
  nested = ".".join(names[:2])
  return nested if nested in MAY_IMPORT else names[0]


def layering_faults(root: pathlib.Path) -> list[str]:
  """One sentence for each import below `root` that goes against the one direction."""
  faults = []
  for path in sorted(root.glob("mgen_jax/**/*.py")):
    module = name_of(path, root)
    part = part_of(module)
    where = path.relative_to(root).as_posix()
    if part not in MAY_IMPORT:
      faults.append(f"{where}: the part {part!r} has no place in MAY_IMPORT; give it one")
      continue
    for line, name in imports_of(ast.parse(path.read_text()), module, path.stem == "__init__"):
      top, below = name.split(".")[0], part_of(name)
      if top in ("data_pipelines", "experiments", "tests", "benchmarks", "plans"):
        faults.append(f"{where}:{line}: mgen_jax stands below {top} and may not import it")
      elif top == "mgen_jax" and below not in MAY_IMPORT[part] | {part, "__init__"}:
        faults.append(f"{where}:{line}: {part} may not import mgen_jax.{below}")
  for path in sorted(root.glob("experiments/**/*.py")):
    where = path.relative_to(root).as_posix()
    for line, name in imports_of(ast.parse(path.read_text()), name_of(path, root), False):
      own = name == "mgen_jax.config" or name.startswith("mgen_jax.config.")
      if not own and name.split(".")[0] not in sys.stdlib_module_names:
        faults.append(f"{where}:{line}: an experiment imports only mgen_jax.config, not {name}")
  return faults


def curation_faults(root: pathlib.Path) -> list[str]:
  """One sentence for each import that lets curation's packages, engines or driver in too deep."""
  faults = []
  for path in sorted([*root.glob("mgen_jax/**/*.py"), *root.glob("data_pipelines/**/*.py")]):
    where = path.relative_to(root).as_posix()
    is_stage = where.startswith("data_pipelines/curate/stage")  # stage.py and stages/
    is_engine = where.startswith("data_pipelines/curate/engines/")
    module = name_of(path, root)
    for line, name in imports_of(ast.parse(path.read_text()), module, path.stem == "__init__"):
      parts = name.split(".")
      if where.startswith("mgen_jax/") and parts[0] in CURATION_PACKAGES:
        faults.append(f"{where}:{line}: {parts[0]} is a package of curation")
      elif parts[0] in ENGINES and not is_engine:
        faults.append(f"{where}:{line}: {parts[0]} belongs into data_pipelines/curate/engines")
      elif is_stage and parts[:2] == ["data_pipelines", "curate"] and parts[2] in ABOVE_STAGES:
        faults.append(f"{where}:{line}: a stage knows nothing of {parts[2]}")
  return faults


def is_config(node: ast.expr) -> bool:
  """Whether an expression is a config by its name: `config`, `self.cfg`, `model_config`."""
  name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
  return name in ("c", "cfg") or name.endswith("config")


def habit_faults(source: str, reads_files: bool = True) -> list[str]:
  """One sentence for each thing in a file that no file here may do, with its line.

  Tests may use pickle to see what a worker process receives (`reads_files` is then False).
  """
  tree = ast.parse(source)
  faults = []
  if not ast.get_docstring(tree):
    faults.append("1: a file starts with a docstring that says what it is")
  for line, name in imports_of(tree, "m", False):
    if reads_files and name.split(".")[0] in UNSAFE_MODULES:
      faults.append(f"{line}: {name} can run code that a file brings along; use msgpack or JSON")
  for node in ast.walk(tree):
    match node:
      case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
        faults.append(f"{node.lineno}: no {name}")
      case ast.Call(func=ast.Name(id="getattr"), args=[config, ast.Constant(), _]) if is_config(
        config
      ):
        faults.append(f"{node.lineno}: a config key has its default in the schema, not at its use")
      case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
        faults.append(f"{node.value.lineno}: allow_pickle can run code that a file brings along")
      case ast.ExceptHandler(type=None):
        faults.append(f"{node.lineno}: a bare except hides faults; name the exception")
      case ast.ExceptHandler(type=ast.Name(id="Exception" | "BaseException" as name)) if not any(
        isinstance(inner, ast.Raise) for inner in ast.walk(node)
      ):
        faults.append(f"{node.lineno}: except {name} without raise hides faults; name them")
  return faults


def sources() -> list[pathlib.Path]:
  folders = ["mgen_jax", "experiments", "data_pipelines", "tests", "benchmarks", "launch", "plans"]
  return sorted(path for folder in folders for path in (ROOT / folder).glob("**/*.py"))


def test_imports_go_one_way():
  assert layering_faults(ROOT) == []


def test_curation_stays_in_its_place():
  assert curation_faults(ROOT) == []


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("mgen_jax/data/media.py", "import cv2"),
    ("mgen_jax/ingest.py", "def late():\n  from faiss import Kmeans"),
    ("data_pipelines/curate/run.py", "import ray.data"),
    ("data_pipelines/curate/stages/text.py", "from data_pipelines.curate import run"),
    ("data_pipelines/curate/stages/text.py", "from data_pipelines.curate.engines import local"),
  ],
)
def test_curation_in_the_wrong_place_is_found(tmp_path, name, source):
  assert len(curation_faults(tree_with(tmp_path, {name: source}))) == 1


def test_the_layering_has_no_cycle_below_the_commands():
  order = []
  waiting = {part: below & LIBRARY for part, below in MAY_IMPORT.items() if part not in COMMANDS}
  while waiting:
    free = [part for part, below in waiting.items() if below <= set(order)]
    assert free, f"these import each other: {sorted(waiting)}"
    order += free
    waiting = {part: below for part, below in waiting.items() if part not in free}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_keeps_the_habits(path):
  reads_files = not path.is_relative_to(ROOT / "tests")
  assert habit_faults(path.read_text(), reads_files) == []


def tree_with(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
  for name, source in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(source)
  return root


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("mgen_jax/models/net.py", "from mgen_jax.training import loop"),
    ("mgen_jax/models/net.py", "def late():\n  import mgen_jax.data.media"),
    ("mgen_jax/models/net.py", "from mgen_jax import tasks"),
    ("mgen_jax/models/net.py", "from ..training.loop import train"),
    ("mgen_jax/models/net.py", "from .. import tasks"),
    ("mgen_jax/models/__init__.py", "from ..tasks import base"),
    ("mgen_jax/diffusion/flow.py", "from mgen_jax.tasks.base import Task"),
    ("mgen_jax/diffusion/flow.py", "from mgen_jax.models import backbone"),
    ("mgen_jax/training/loop.py", "from mgen_jax.models.backbone import Backbone"),
    ("mgen_jax/training/loop.py", "import mgen_jax.main"),
    ("mgen_jax/training/optimizer.py", "from mgen_jax import main"),
    ("mgen_jax/config/stages.py", "from mgen_jax.training.loop import train"),
    ("mgen_jax/tasks/t2v.py", "from mgen_jax.training.step import step"),
    ("mgen_jax/data/media.py", "import data_pipelines.split"),
    ("mgen_jax/main.py", "from experiments import quickstart"),
    ("mgen_jax/nowhere.py", '"""A part that the layering does not know."""'),
    ("mgen_jax/__init__.py", "import mgen_jax.training"),
    ("experiments/run.py", "import jax"),
    ("experiments/run.py", "from mgen_jax.models.backbone import BackboneConfig"),
  ],
)
def test_an_import_against_the_direction_is_found(tmp_path, name, source):
  assert len(layering_faults(tree_with(tmp_path, {name: source}))) == 1


def test_imports_along_the_direction_are_left_alone(tmp_path):
  files = {
    "mgen_jax/__init__.py": '"""The package."""',
    "mgen_jax/main.py": "from mgen_jax import sample\nfrom mgen_jax.training import loop",
    "mgen_jax/training/loop.py": "from mgen_jax.training import optimizer, state\nimport jax",
    "mgen_jax/config/stages.py": "from mgen_jax.parallel.mesh import MeshConfig",
    "mgen_jax/plan.py": "import mgen_jax\nfrom mgen_jax import __version__",
    "mgen_jax/models/net.py": "from mgen_jax.models import layers\nfrom mgen_jax.errors import E",
    "mgen_jax/data/marbles/write.py": "from . import world\nfrom ..media import write_video",
    "experiments/run.py": "import math\nfrom mgen_jax.config import experiment",
  }
  assert layering_faults(tree_with(tmp_path, files)) == []


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from cloudpickle import loads",
    "eval('1')",
    "exec('x = 1')",
    "x = getattr(config, 'lr', 1.0)",
    "x = getattr(self.config, 'lr', None)",
    "x = getattr(cfg.optimizer_config, 'lr', 0)",
    "x = np.load(path, allow_pickle=True)",
    "try:\n  f()\nexcept:\n  pass",
    "try:\n  f()\nexcept Exception:\n  pass",
    "try:\n  f()\nexcept BaseException as error:\n  print(error)",
  ],
)
def test_a_broken_habit_is_found(line):
  assert len(habit_faults(f'"""Says what it is."""\n{line}\n')) == 1


def test_a_file_without_a_docstring_is_found():
  assert len(habit_faults("x = 1\n")) == 1


def test_good_habits_are_left_alone():
  source = '''"""Says what it is."""
import json
x = getattr(module, "name", None)
y = getattr(config, "lr")
try:
  model.eval()
except (OSError, ValueError):
  pass
except Exception:
  clean_up()
  raise
'''
  assert habit_faults(source) == []
