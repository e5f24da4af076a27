"""What a step may gather at once: the parameters of a layer, or the keys and values of one.

A larger all-gather says that the compiler gathers what was to stay split, like the activations of
hundreds of devices for the gradient of a kernel. Not here: what gathers cost (`roofline.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from mgen_jax import tasks
from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.planning.costs import Costs
from mgen_jax.planning.estimate import model_value
from mgen_jax.training import state as state_lib


def largest(costs: Costs) -> dict[str, Any] | None:
  """The largest array that a device gathers: its bytes, mesh axes and place in the program."""
  gathers = [op for op in costs.ops if op.collective and op.collective.kind == "all-gather"]
  if not gathers:
    return None
  top = max(gathers, key=lambda op: op.collective.bytes)
  return {
    "bytes": top.collective.bytes,
    "axes": list(top.collective.axes),
    "source": top.source or top.name,
  }


def limit(stage: TrainStage, bucket: Bucket, mesh_shape: dict[str, int]) -> int:
  """Bytes of the largest layer's parameters or of one layer's keys and values, whichever is more.

  A layer's parameters are counted whole and in fp32, the keys and values are those that a device
  needs for its own heads and examples in one pass.
  """
  task = tasks.make(stage.task)
  sizes: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state_lib.param_shapes(task)):
    names = [entry.key for entry in path]
    stacked = "layers" in names
    # All kernels of a layer of the stack together; whatever else there is by itself.
    part = "/".join(names[: names.index("layers") + 1] if stacked else names)
    size = leaf.size // leaf.shape[0] if stacked else leaf.size
    sizes[part] = sizes.get(part, 0) + size * leaf.dtype.itemsize
  parameters = max(sizes.values())
  heads = model_value(stage, "heads", 0)
  if not heads:  # no transformer
    return parameters
  key_heads = model_value(stage, "kv_heads", None) or heads
  head_dim = model_value(stage, "width", 0) // heads
  batch = stage.batches()[bucket].batch
  shards = mesh_shape["replica"] * mesh_shape["fsdp"]
  examples = batch // (shards * stage.passes(batch, shards))
  both = 2 * examples * task.tokens(bucket) * key_heads * head_dim // mesh_shape["tensor"]
  return max(parameters, both * jnp.dtype(model_value(stage, "dtype", "float32")).itemsize)
