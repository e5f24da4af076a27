"""Small arrays that a program treats alike, as parts of one array.

Norms, tables and embeddings of many shapes would each need a program of their own. One for all of
them does the same to every element: each device joins what it holds of them, so nothing is sent.
Joining copies, so it is for arrays that hardly count in the memory of a step. Not here: which parts
of a program there are (`outline.py`).
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec

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
  """What programs share that can run as one on arrays that are joined; None: this one cannot.

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
  lies = {s for s, array in zip(shardings, given, strict=True) if array.shape}
  if math.prod(shape) > most or len(lies) != 1 or None in lies:
    return None
  if not all(map(_is_elementwise, program.jaxpr.eqns)):
    return None
  text = " ".join(str(program).split())  # however its lines are broken
  text = text.replace(f"[{','.join(map(str, shape))}]", "[*]").replace(str(shape), "*")
  return text, lies.pop().mesh, tuple(id(number) for number in given if not number.shape)


def run(
  program: core.ClosedJaxpr, given: Sequence[Sequence[jax.Array]], shardings: Sequence[Any]
) -> list[tuple[jax.Array, ...]]:
  """The results of a program for several sets of arguments that are `alike`.

  Args:
    program: of one of them.
    given: the sets.
    shardings: of the arrays of each set.
  """
  lie = [s.spec for s in shardings]

  def local(*arguments):
    shapes = tuple(x.shape for x in next(x for x in arguments if isinstance(x, tuple)))
    flat = [_join(*x) if isinstance(x, tuple) else x for x in arguments]
    return [_split(made, shapes) for made in _on_flat(program, flat)]

  arguments = [same if same[0].shape else same[0] for same in zip(*given, strict=True)]
  made = jax.shard_map(
    local,
    mesh=shardings[0].mesh,
    in_specs=tuple(tuple(lie) if isinstance(x, tuple) else PartitionSpec() for x in arguments),
    out_specs=[lie for _ in program.jaxpr.outvars],
    check_vma=False,
  )(*arguments)
  return list(zip(*made, strict=True))


@jax.jit
def _join(*arrays: jax.Array) -> jax.Array:
  return jnp.concatenate([array.reshape(-1) for array in arrays])


@functools.partial(jax.jit, static_argnums=1)
def _split(joined: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
  made, start = [], 0
  for shape in shapes:
    end = start + math.prod(shape)
    made.append(joined[start:end].reshape(shape))
    start = end
  return made


def _on_flat(program: core.ClosedJaxpr, given: Sequence[jax.Array]) -> list[jax.Array]:
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
