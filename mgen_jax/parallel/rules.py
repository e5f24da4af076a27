"""The one rules table: which logical axis of an array goes to which axes of the mesh.

Models name the dimensions of their parameters and activations; nobody else names mesh axes. A
dimension that its mesh axes do not divide stays whole (toy models on many devices), which changes
memory and never results.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("replica", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  # Parameters. Dense kernels: [embed, heads] (q, k, v), [heads, embed] (out), [embed, mlp] (up,
  # gate), [mlp, embed] (down); the other dimension of every kernel carries the FSDP shards.
  ("embed", ("fsdp", "context")),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", None),
  ("layers", None),  # [layers, ...]: the scanned stack, never split
  # Convolutions: [..., conv_in, conv_out].
  ("conv_in", None),
  ("conv_out", ("fsdp", "context")),
  # Activations of the backbone: [batch, tokens, act_embed], [batch, tokens, act_heads, head_dim],
  # [batch, tokens, act_mlp]; between the tensor-parallel regions [batch, norm_tokens, act_embed].
  ("batch", BATCH_AXES),
  ("tokens", "context"),
  ("norm_tokens", ("context", "tensor")),
  ("act_embed", None),
  ("act_heads", "tensor"),
  ("act_mlp", "tensor"),
  ("context_tokens", None),
  # [samples, ...]: what is sampled while the two branches of guidance are split over replica.
  ("samples", "fsdp"),
  # Media: [batch, frames, height, width, channels].
  ("frames", None),
  ("height", None),
  ("width", None),
  ("channels", None),
)


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """The partition spec of an array whose dimensions carry the logical `names`."""
  table = dict(RULES)
  unknown = [name for name in names if name is not None and name not in table]
  if unknown:
    raise KeyError(f"logical axes {unknown} are not in the rules table of {__name__}")
  return nn.logical_to_mesh_axes(tuple(names), rules=RULES)


def sharding(
  mesh: jax.sharding.Mesh, names: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
  """`spec(names)` on a mesh; with a `shape`, dimensions that do not divide are left whole."""
  entries = list(spec(names))
  for dim, size in enumerate(shape or ()):
    axes = entries[dim] if dim < len(entries) else None
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    parts = 1
    for axis in axes:
      parts *= mesh.shape[axis]
    if size % parts:
      entries[dim] = None
  return NamedSharding(mesh, PartitionSpec(*entries))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: jax.sharding.Mesh, boxed: Any) -> Any:
  """Shardings of a tree of parameters whose leaves may be boxed with logical names by Flax.

  Args:
    mesh: the mesh.
    boxed: arrays or shapes, bare (then replicated) or in `nn.LogicallyPartitioned` boxes.

  Returns:
    The tree, unboxed, with a NamedSharding at each leaf.
  """

  def one(leaf):
    if isinstance(leaf, nn.LogicallyPartitioned):
      return sharding(mesh, leaf.names, leaf.value.shape)
    return replicated(mesh)

  return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
