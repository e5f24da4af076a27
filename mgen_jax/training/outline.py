"""Makes a function of many arrays a short program: equal work on equal shapes is written once.

An optimizer does the same to every parameter, and a program of StableHLO says it again for each.
`outline` traces a function, finds the parts of it that do not touch each other (what happens to one
parameter) and calls one shared function for all parts that are the same. Nothing is computed
otherwise than before. Not here: what is computed.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from mgen_jax.training import joined

_SMALL = 500  # an array that is joined with others has at most this part of all elements


def outline(
  function: Callable[..., Any], shardings: Sequence[Any] | None = None
) -> Callable[..., Any]:
  """`function` with its repeated parts shared; to be called while tracing (inside `jit`).

  Sums of an array to a number split the work in levels: what follows the norm of all gradients is
  another part than what it is made of. What is asked for twice, as the norm or a schedule is, is
  done once. Small arrays that are treated alike element by element are treated as parts of one.

  Args:
    function: of trees of arrays.
    shardings: one tree for each argument, of the sharding of each array; None: nothing is joined.
  """

  def outlined(*arguments):
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(arguments)
    if any(equation.params.get("inline") for equation in closed.jaxpr.eqns):
      # Newer versions of JAX keep such a call, of optax's for all parameters at once, as one.
      closed = jax.make_jaxpr(functools.partial(_evaluate, closed))(*leaves)
    values = dict(zip(closed.jaxpr.invars, leaves, strict=True))
    values |= zip(closed.jaxpr.constvars, closed.consts, strict=True)
    jaxpr, numbers = _lifted(closed.jaxpr)
    values |= zip(numbers, jax.jit(lambda: list(numbers.values()))(), strict=True)
    lies = {}
    if shardings is not None:
      lies = dict(zip(closed.jaxpr.invars, jax.tree.leaves(tuple(shardings)), strict=True))
    small = sum(leaf.size for leaf in leaves) // _SMALL
    levels = [[_made(part, jaxpr) for part in level] for level in _levels(jaxpr)]
    # A function for what is done more than once; the same to the same array is done once anyway.
    each = {(part.key, *part.inputs) for level in levels for part in level}
    times = collections.Counter(key for key, *_ in each)
    shared: dict[str, Callable[..., Any]] = {}
    known: dict[tuple, list[jax.Array]] = {}

    def run(part: _Part, given: list[jax.Array]) -> list[jax.Array]:
      made = known.get((part.key, *map(id, given)))
      if made is None:
        call = core.jaxpr_as_fun(part.program)
        repeated = times[part.key] > 1 and not part.scalar
        call = shared.setdefault(part.key, jax.jit(call) if repeated else call)
        made = known[part.key, *map(id, given)] = call(*given)
      return made

    for level in levels:
      together: dict[Hashable, list[tuple[_Part, list[jax.Array]]]] = {}  # parts of one
      for part in level:
        given = [values[v] for v in part.inputs]
        if part.scalar:  # others of its level may read it
          values |= zip(part.outputs, run(part, given), strict=True)
          continue
        alike = joined.alike(part.program, given, [lies.get(v) for v in part.inputs], small)
        together.setdefault(id(part) if alike is None else alike, []).append((part, given))
      for group in together.values():
        parts, given = zip(*group, strict=True)
        if len({part.key for part in parts}) > 1:
          lie = [next(lies[v] for v in part.inputs if v.aval.shape) for part in parts]
          made = joined.run(parts[0].program, given, lie)
        else:  # a function of their own is enough
          made = map(run, parts, given)
        for part, outputs in zip(parts, made, strict=True):
          values |= zip(part.outputs, outputs, strict=True)
    results = [
      out.val if isinstance(out, core.Literal) else values[out] for out in closed.jaxpr.outvars
    ]
    return jax.tree.unflatten(jax.tree.structure(shape), results)

  return outlined


def _evaluate(closed: core.ClosedJaxpr, *values: Any) -> list[Any]:
  """Runs a program, the calls that are to be inlined as if they were written out."""
  known = dict(zip(closed.jaxpr.invars, values, strict=True))
  known |= zip(closed.jaxpr.constvars, closed.consts, strict=True)

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else known[atom]

  for equation in closed.jaxpr.eqns:
    if equation.params.get("inline"):
      outputs = equation.outvars
      made = _evaluate(equation.params["jaxpr"], *map(read, equation.invars))
    else:
      part = _made([equation], closed.jaxpr)
      outputs, made = part.outputs, core.jaxpr_as_fun(part.program)(*map(read, part.inputs))
    known |= zip(outputs, made, strict=True)
  return [read(atom) for atom in closed.jaxpr.outvars]


def _lifted(jaxpr: core.Jaxpr) -> tuple[core.Jaxpr, dict[core.Var, np.ndarray]]:
  """The program with the numbers that it applies to arrays as variables, and their values.

  So each is written once, not again in every part that reads it.
  """
  variables: dict[tuple, core.Var] = {}
  values: dict[core.Var, np.ndarray] = {}

  def lift(atom):
    if not isinstance(atom, core.Literal) or atom.aval.shape:
      return atom
    value = np.asarray(atom.val, atom.aval.dtype)
    variable = variables.setdefault((value.dtype, value.tobytes()), core.Var(atom.aval))
    values[variable] = value
    return variable

  equations = [
    e if _is_scalar(e) else e.replace(invars=[lift(atom) for atom in e.invars]) for e in jaxpr.eqns
  ]
  return jaxpr.replace(eqns=equations), values


def _levels(jaxpr: core.Jaxpr) -> list[list[list[core.JaxprEqn]]]:
  """The equations, grouped in parts, in an order in which they can run. In a level those of numbers
  come first; the others do not touch each other."""
  level: dict[core.Var, int] = {}
  levels: list[int] = []  # of each equation
  for equation in jaxpr.eqns:
    levels.append(max((level.get(v, 0) for v in _variables(equation.invars)), default=0))
    # A number that is made of arrays is known one level later.
    for out in equation.outvars:
      level[out] = levels[-1] + (not out.aval.shape and not _is_scalar(equation))
  # An array is made where it is first used, in the same part.
  needed: dict[core.Var, int] = {}
  for index, equation in reversed(list(enumerate(jaxpr.eqns))):
    if all(out.aval.shape for out in equation.outvars):
      levels[index] = min(
        (needed[v] for v in equation.outvars if v in needed), default=levels[index]
      )
    for v in _variables(equation.invars):
      needed[v] = min(needed.get(v, levels[index]), levels[index])
  parts = []
  for at in range(max(levels, default=-1) + 1):
    here = [e for e, level in zip(jaxpr.eqns, levels, strict=True) if level == at]
    numbers = [[equation] for equation in here if _is_scalar(equation)]
    parts.append(numbers + _connected([e for e in here if not _is_scalar(e)]))
  return parts


def _connected(equations: list[core.JaxprEqn]) -> list[list[core.JaxprEqn]]:
  """Groups that share no array that one of the equations makes; their order is kept."""
  group: dict[core.Var, int] = {}  # of each array made so far
  groups: dict[int, list[int]] = {}
  for index, equation in enumerate(equations):
    known = {group[v] for v in _variables(equation.invars) if v in group}
    groups[index] = sorted([index, *(i for g in known for i in groups.pop(g))])
    for member in groups[index]:
      group |= dict.fromkeys(equations[member].outvars, index)
  return [[equations[i] for i in members] for members in groups.values()]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
  """A part as a program of its own, what it reads, and what is read of it elsewhere."""

  program: core.ClosedJaxpr
  inputs: list[core.Var]
  outputs: list[core.Var]
  scalar: bool

  @functools.cached_property
  def key(self) -> str:
    """The same for parts that do the same."""
    hidden = _hides_constants(self.program.jaxpr)
    return str(id(self.program.jaxpr.eqns[0])) if hidden else str(self.program)


def _made(part: list[core.JaxprEqn], whole: core.Jaxpr) -> _Part:
  inside = {id(equation) for equation in part}
  made = dict.fromkeys(out for equation in part for out in equation.outvars)
  read = dict.fromkeys(v for equation in part for v in _variables(equation.invars))
  inputs = [v for v in read if v not in made]
  wanted = {v for e in whole.eqns if id(e) not in inside for v in _variables(e.invars)}
  wanted |= set(_variables(whole.outvars))
  outputs = [v for v in made if v in wanted]
  effects = frozenset().union(*(equation.effects for equation in part))
  jaxpr = core.Jaxpr((), inputs, outputs, part, effects, whole.debug_info.with_unknown_names())
  return _Part(core.ClosedJaxpr(jaxpr, ()), inputs, outputs, _is_scalar(part[0]))


def _is_scalar(what: core.JaxprEqn | list[core.JaxprEqn]) -> bool:
  return not any(v.aval.shape for v in (*what.invars, *what.outvars))


def _variables(atoms: Iterable[Any]) -> Iterable[core.Var]:
  return (atom for atom in atoms if not isinstance(atom, core.Literal))


def _hides_constants(jaxpr: core.Jaxpr) -> bool:
  """Whether a program inside holds arrays, which its text does not show."""
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if isinstance(value, core.ClosedJaxpr) and value.consts:
        return True
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns") and _hides_constants(inner):
        return True
  return False
