"""Where every parameter of the 30B lies on the paper's largest mesh, as a file to compare with.

python -m tests.parallel.golden     writes the file again; look at what changed in it

Not a test: see `test_sharding.py`.
"""

import json
import pathlib

import flax.linen as nn
import jax

from mgen_jax import tasks
from mgen_jax.models import backbone
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.tasks import text_inputs
from mgen_jax.tasks.text_to_video import TextToVideoConfig

PATH = pathlib.Path(__file__).resolve().parent.parent / "golden" / "partition_specs_30b.json"
# movie_gen 4.4, the 768 px stage with context parallelism: 6,144 devices.
MESH = {"replica": 1, "fsdp": 768, "context": 2, "tensor": 4}


def task_30b() -> tasks.Task:
  """The 30B with its three text encoders."""
  text = text_inputs.FeatureTextConfig()
  return tasks.make(TextToVideoConfig(model=backbone.SIZES["30B"], text=text))


def abstract_mesh() -> jax.sharding.AbstractMesh:
  """`MESH` without devices."""
  return jax.sharding.AbstractMesh(tuple(MESH.values()), mesh_lib.AXES)


def specs() -> dict[str, dict]:
  """Shape, logical names and PartitionSpec of every parameter, by its path."""
  boxed = jax.eval_shape(lambda: task_30b().init(jax.random.key(0)))
  shardings = rules.tree_shardings(abstract_mesh(), boxed)
  leaves = jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  found = {}
  for (path, box), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    found[jax.tree_util.keystr(path, simple=True, separator="/")] = {
      "shape": list(box.value.shape),
      "names": list(box.names),
      "spec": [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec],
    }
  return dict(sorted(found.items()))


def render() -> str:
  """The text of the file: one line a parameter."""
  lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in specs().items()]
  body = ",\n".join(lines)
  return f'{{\n  "mesh": {json.dumps(MESH)},\n  "parameters": {{\n{body}\n  }}\n}}\n'


if __name__ == "__main__":
  PATH.write_text(render())
  print(PATH)
