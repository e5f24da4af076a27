"""Small arrays that a program treats alike, as the rows of one array.

Tables and embeddings of many lengths and one width would each need a program of their own. One for
all of them, joined, does the same to every element. Joining copies, so it is for arrays that hardly
count in the memory of a step, and only for those whose rows lie whole on a device: then nothing is
sent. Not here: which parts of a program there are (`outline.py`).
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_LAST = -1  # the dimension that may be split over devices
_ELEMENTWISE = {
  "abs", "add", "and", "convert_element_type", "copy", "div", "integer_pow", "is_finite", "max",
  "min", "mul", "neg", "pow", "rsqrt", "select_n", "sign", "sqrt", "square", "sub",
}  # fmt: skip


def alike(
  program: core.ClosedJaxpr,
  given: Sequence[jax.Array],
  shardings: Sequence[Any],
  most: int,
) -> Hashable:
  """What programs share that can run as one over the rows of their arrays; None: this one cannot.

  Args:
    program: any.
    given: its arguments.
    shardings: of the arguments; None where it is not known.
    most: elements of an array that is to be joined.
  """
  shapes = {
    v.aval.shape
    for equation in program.jaxpr.eqns
    for v in (*equation.invars, *equation.outvars)
    if v.aval.shape
  }
  if len(shapes) != 1:
    return None
  (shape,) = shapes
  if len(shape) < 2 or math.prod(shape) > most:
    return None
  if not all(map(_is_elementwise, program.jaxpr.eqns)):
    return None
  lies = [s for s, array in zip(shardings, given, strict=True) if array.shape]
  if any(s is None or any(tuple(s.spec)[: len(shape) - 1]) for s in lies):
    return None
  text = " ".join(str(program).split())  # however its lines are broken
  text = text.replace(f"[{','.join(map(str, shape))}]", "[*]").replace(str(shape), "*")
  numbers = tuple(id(number) for number in given if not number.shape)
  split = tuple(tuple(s.spec)[len(shape) - 1 :] or (None,) for s in lies)  # the last dimension
  return text, shape[_LAST], split, numbers


def run(
  program: core.ClosedJaxpr, given: Sequence[Sequence[jax.Array]]
) -> list[tuple[jax.Array, ...]]:
  """The results of a program for several sets of arguments that are `alike`."""
  shapes = tuple(next(array.shape for array in each if array.shape) for each in given)
  joined = [_join(*same) if same[0].shape else same[0] for same in zip(*given, strict=True)]
  return list(zip(*(_split(made, shapes) for made in _over_rows(program, joined)), strict=True))


@jax.jit
def _join(*arrays: jax.Array) -> jax.Array:
  return jnp.concatenate([array.reshape(-1, array.shape[_LAST]) for array in arrays])


@functools.partial(jax.jit, static_argnums=1)
def _split(joined: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
  made, start = [], 0
  for shape in shapes:
    end = start + math.prod(shape[:_LAST])
    made.append(joined[start:end].reshape(shape))
    start = end
  return made


def _over_rows(program: core.ClosedJaxpr, given: Sequence[jax.Array]) -> list[jax.Array]:
  """Runs an elementwise program on arrays of another shape than it was traced with."""
  shape = next(array.shape for array in given if array.shape)
  known = dict(zip(program.jaxpr.invars, given, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else known[atom]

  for equation in program.jaxpr.eqns:
    inputs = map(read, equation.invars)
    if equation.primitive.name == "broadcast_in_dim":
      made = jnp.broadcast_to(*inputs, shape)
    else:
      made = equation.primitive.bind(*inputs, **equation.params)
    known[equation.outvars[0]] = made
  return [read(atom) for atom in program.jaxpr.outvars]


def _is_elementwise(equation: core.JaxprEqn) -> bool:
  if equation.primitive.name == "broadcast_in_dim":
    return not equation.invars[0].aval.shape
  return equation.primitive.name in _ELEMENTWISE
