"""Parameters by name: which of them a stage trains, which it only reads, and their running mean.

A parameter's name is its path with slashes, "backbone/layers/mlp/up/kernel", as logs and manifests
show it.
"""

import difflib
import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util

from mgen_jax.errors import UserError


def flatten(params: Any) -> dict[str, Any]:
  """A tree of parameters by name."""
  return traverse_util.flatten_dict(params, sep="/")


def unflatten(named: dict[str, Any]) -> Any:
  """The tree again."""
  return traverse_util.unflatten_dict(named, sep="/")


def is_of(name: str, pattern: str) -> bool:
  """Whether a pattern fits a name: * stands for anything, the name of a part for all below it."""
  return any(fnmatch.fnmatchcase(name, each) for each in (pattern, f"{pattern}/*"))


def matching(patterns: Sequence[str], names: Sequence[str], where: str) -> frozenset[str]:
  """The names that one of the patterns fits (`is_of`).

  Raises:
    UserError: a pattern that fits none; says where it stands and what comes near.
  """
  found = set()
  for pattern in patterns:
    fits = [name for name in names if is_of(name, pattern)]
    if not fits:
      near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or list(names)[:1]
      raise UserError(f'{where} has "{pattern}", which fits no parameter: one is "{near[0]}".')
    found.update(fits)
  return frozenset(found)


def without(params: Any, names: frozenset[str]) -> Any:
  """The tree without some of its parameters; itself where that is none."""
  if not names:
    return params
  return unflatten({name: leaf for name, leaf in flatten(params).items() if name not in names})


def held(params: Any, names: frozenset[str]) -> Any:
  """The tree with no gradient for some of its parameters: what they cost is not computed."""
  if not names:
    return params
  return unflatten({
    name: jax.lax.stop_gradient(leaf) if name in names else leaf
    for name, leaf in flatten(params).items()
  })  # fmt: skip


@functools.partial(jax.jit, donate_argnums=0)
def blend(mean: jax.Array, tensor: jax.Array, step: float) -> jax.Array:
  """mean + step x (tensor - mean), in the place of `mean`: of two equal tensors it is the tensor,
  to the bit."""
  return mean + step * (tensor - mean)
