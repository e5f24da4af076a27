"""How the tensors of public files become our parameters: one rule for each parameter of a model.

A `Rule` says which tensors a parameter is made of and how they lie; a `Family` joins the rules of
a model with its config, its Flax module and the config.json of its files, in both directions. Not
here: the rules themselves (one file for each family) and files (`folders.py`, `stored.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

Shape = tuple[int, ...]
Transform = Literal["none", "transpose", "conv", "patches"]

# Axes of a tensor in a file, in the order in which our parameter has them, and the way back.
# "patches" is "conv" with all but the last axis flattened.
_AXES = {"none": None, "transpose": (1, 0), "conv": (2, 3, 1, 0), "patches": (2, 3, 1, 0)}
_BACK = {"none": None, "transpose": (1, 0), "conv": (3, 2, 0, 1), "patches": (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class Rule:
  """Where a parameter comes from.

  Attributes:
    target: path of the parameter, with slashes.
    source: canonical name in the file; "{i}" in it is the number of a block, and the parameter is
      the stack of all of them.
    transform: how the axes differ.
    patch: of "patches": the side of a patch.
    first, step: of the blocks that are stacked: layer l is block first + step * l.
    part: (k, n): the k-th of n equal parts of the tensor along its first axis.
  """

  target: str
  source: str
  transform: Transform = "none"
  patch: int = 0
  first: int = 0
  step: int = 1
  part: tuple[int, int] = (0, 1)

  @property
  def layered(self) -> bool:
    """Whether the parameter is a stack over layers."""
    return "{i}" in self.source

  def names(self, shape: Shape) -> list[str]:
    """The canonical names of all tensors of a parameter of `shape`, layer by layer."""
    if not self.layered:
      return [self.source]
    return [self.source.format(i=self.first + self.step * layer) for layer in range(shape[0])]

  def their_shape(self, shape: Shape) -> Shape:
    """The shape in a file of one tensor of a parameter of `shape` (all layers of a stack)."""
    shape = shape[1:] if self.layered else shape
    if self.transform == "patches":
      shape = (self.patch, self.patch, shape[0] // self.patch**2, shape[1])
    axes = _BACK[self.transform]
    shape = shape if axes is None else tuple(shape[axis] for axis in axes)
    return (shape[0] * self.part[1], *shape[1:]) if self.part[1] > 1 else shape

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """One tensor of a file, in the shape that `their_shape` says, as our module has it (a view)."""
    index, count = self.part
    if count > 1:
      size = len(array) // count
      array = array[index * size : (index + 1) * size]
    axes = _AXES[self.transform]
    array = array if axes is None else array.transpose(axes)
    return array.reshape(-1, array.shape[-1]) if self.transform == "patches" else array

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`, but for `part`: of a fused tensor it makes this part."""
    if self.transform == "patches":
      array = array.reshape(self.patch, self.patch, -1, array.shape[-1])
    axes = _BACK[self.transform]
    return array if axes is None else array.transpose(axes)


@dataclasses.dataclass(frozen=True)
class Family:
  """See the module's docstring.

  Attributes:
    name: as written in the description of a converted folder.
    config: the dataclass.
    module: makes the Flax module of a config.
    inputs: zeros of a config that the module can be initialised with.
    rules: of a config.
    canonical: a name in a file -> the name that the rules use, or None for what this family does
      not read (the decoder of a T5, the other tower of a CLIP).
    from_hf: (config.json, {canonical name: shape}) -> config. Raises UserError.
    to_hf: config -> config.json.
    kinds: what config.json says of such a model ("model_type" or "_class_name").
    marks: where there is no such config.json: names that its files have ("!name": have not).
    spare: of a config: canonical names that may be there and are not used.
    kept: whether a tensor that is not read is kept as it is, for the way back (computed tables,
      the classes of a model that others start from).
    file: name of its safetensors, without the ending.
    verbatim: whether the config.json goes out as it came in; else it is made from the config.
  """

  name: str
  config: type
  module: Callable[[Any], nn.Module]
  inputs: Callable[[Any], tuple]
  rules: Callable[[Any], tuple[Rule, ...]]
  canonical: Callable[[str], str | None]
  from_hf: Callable[[Mapping[str, Any], Mapping[str, Shape]], Any]
  to_hf: Callable[[Any], dict[str, Any]]
  kinds: tuple[str, ...]
  marks: tuple[str, ...] = ()
  spare: Callable[[Any], tuple[str, ...]] = lambda config: ()
  kept: Callable[[str], bool] = lambda name: False
  file: str = "model"
  verbatim: bool = False

  def init(self, config: Any) -> Any:
    """Parameters boxed with logical axis names; for `eval_shape` or a toy."""
    return self.module(config).init(jax.random.key(0), *self.inputs(config))["params"]


def same_matrix(found: Shape, wanted: Shape) -> bool:
  """Whether shapes agree; a linear map may be stored as a convolution of one pixel."""
  extra = found[len(wanted) :]
  return found[: len(wanted)] == wanted and all(side == 1 for side in extra)


def boxed_shapes(family: Family, config: Any) -> Any:
  """The parameters of a config as shapes in boxes of logical axis names; nothing is computed."""
  return jax.eval_shape(lambda: family.init(config))


def boxes(family: Family, config: Any) -> dict[str, nn.LogicallyPartitioned]:
  """The same by path. A parameter without names has a box that names nothing."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  leaves = jax.tree_util.tree_leaves_with_path(boxed_shapes(family, config), is_leaf=is_box)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    if is_box(leaf)
    else nn.LogicallyPartitioned(leaf, (None,) * len(leaf.shape))
    for path, leaf in leaves
  }


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *folders, last = path.split("/")
    node = tree
    for name in folders:
      node = node.setdefault(name, {})
    node[last] = value
  return tree
