"""Reads the text of a compiled program: instructions, and how often each one runs.

A scanned layer stands once in the text and runs 48 times, which XLA's own cost analysis leaves
out; here each instruction comes with the product of the trip counts of the loops around it.
Not here: what an instruction costs (`costs.py`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Shape(NamedTuple):
  """An array as it lies in memory; `space` 0 is the device's main memory, 5 the host's."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without padding."""
    return math.ceil(self.size * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shapes opcode(operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # the arrays of the result, tuples flattened
  operands: tuple[str, ...]
  arguments: str  # what stands between the parentheses
  attributes: str
  is_root: bool

  def attribute(self, name: str) -> str | None:
    """The plain value of `name=value`, for instance of a computation's name."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
    return match.group(1) if match else None

  @property
  def op_name(self) -> str:
    """Where in the Python program it comes from."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """A list of instructions."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in self.instructions}

  @property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.is_root), self.instructions[-1])

  def operand_shapes(self, instruction: Instruction) -> list[Shape]:
    """The arrays that an instruction reads."""
    known = (self.by_name[name] for name in instruction.operands if name in self.by_name)
    return [shape for operand in known for shape in operand.shapes]


class Visit(NamedTuple):
  """An instruction that runs `times` times; `times` is of the whole program."""

  computation: Computation
  instruction: Instruction
  times: int


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program. `unknown_loops`: loops whose trip count could not be read, counted once."""

  computations: dict[str, Computation]
  entry: str

  def called(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
    """The computation that an attribute of an instruction names."""
    return self.computations.get(instruction.attribute(attribute) or "")

  def visits(self, unknown_loops: list[str] | None = None) -> Iterator[Visit]:
    """Every instruction outside fusions, with the number of times that it runs.

    Args:
      unknown_loops: names of loops whose trip count could not be read are appended.
    """
    yield from self._walk(self.computations[self.entry], 1, unknown_loops)

  def _walk(self, computation: Computation, times: int, unknown) -> Iterator[Visit]:
    for instruction in computation.instructions:
      yield Visit(computation, instruction, times)
      if instruction.opcode == "while":
        trips = self.trip_count(computation, instruction)
        if trips is None and unknown is not None:
          unknown.append(instruction.name)
        body = self.called(instruction, "body")
        yield from self._walk(body, times * (1 if trips is None else trips), unknown)
      elif instruction.opcode in ("call", "async-start"):
        below = self.called(instruction, "to_apply") or self.called(instruction)
        if below is not None:
          yield from self._walk(below, times, unknown)
      elif instruction.opcode == "conditional":  # one branch runs: take the longest
        names = re.findall(
          r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))",
          instruction.attributes,
        )
        flat = [n.strip().lstrip("%") for pair in names for part in pair for n in part.split(",")]
        branches = [self.computations[n] for n in flat if n in self.computations]
        if branches:
          longest = max(branches, key=lambda branch: len(branch.instructions))
          yield from self._walk(longest, times, unknown)

  def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, or None where the text does not say.

    From the annotation that XLA leaves (CPU, GPU), else from a condition that compares a counter
    with a constant (TPU); the counter is then taken to start at 0 and go up by 1, as JAX's do.
    """
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if match:
      return int(match.group(1))
    condition = self.called(loop, "condition")
    if condition is None:
      return None
    root = condition.root
    holder = condition
    if root.opcode == "fusion":
      holder = self.called(root) or condition
      root = holder.root
    if root.opcode != "compare":
      return None
    limits = [self._limit(computation, loop, condition, holder, name) for name in root.operands]
    known = [limit for limit in limits if limit is not None]
    if len(known) != 1:
      return None
    direction = root.attribute("direction")
    return {"LT": known[0], "GT": known[0], "NE": known[0]}.get(direction, known[0] + 1)

  def _limit(
    self,
    outer: Computation,
    loop: Instruction,
    condition: Computation,
    holder: Computation,
    name: str,
  ) -> int | None:
    """The constant behind an operand of a loop's comparison, through fusions and the carry."""
    found = holder.by_name.get(name)
    if found is None:
      return None
    if found.opcode == "constant":
      return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments) else None
    if found.opcode == "parameter" and holder is not condition:  # handed into the fusion
      operands = condition.root.operands
      return self._limit(outer, loop, condition, condition, operands[int(found.arguments)])
    if found.opcode in ("copy", "bitcast", "convert"):
      return self._limit(outer, loop, condition, holder, found.operands[0])
    if found.opcode == "get-tuple-element":  # carried unchanged through the loop?
      index, body = int(found.attribute("index")), self.called(loop, "body")
      start = outer.by_name.get(loop.operands[0])
      if body.root.opcode != "tuple" or start is None or start.opcode != "tuple":
        return None
      kept = body.by_name.get(body.root.operands[index])
      if kept is None or kept.opcode != "get-tuple-element":
        return None
      if int(kept.attribute("index")) == index:
        return self._limit(outer, loop, outer, outer, start.operands[index])
    return None


def parse(text: str) -> Module:
  """Reads what `compiled.as_text()` gives."""
  computations: dict[str, Computation] = {}
  entry, name, lines = "", None, []
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
    if header and name is None:
      name, lines = header.group(2), []
      entry = name if header.group(1) else entry
    elif line.rstrip() == "}" and name is not None:
      made = (parse_instruction(one) for one in lines)
      computations[name] = Computation(name, tuple(one for one in made if one is not None))
      name = None
    elif name is not None:
      # What a kernel says of itself may go on over several lines.
      if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line) or not lines:
        lines.append(line)
      else:
        lines[-1] += line
  return Module(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
  """Reads one line of a computation; None for what is no instruction."""
  match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
  if not match:
    return None
  rest = line[match.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opened = rest.find("(")
  if opened < 0:
    return None
  closed = _closing(rest, opened)
  arguments = rest[opened + 1 : closed]
  return Instruction(
    name=match.group(2),
    opcode=rest[:opened].strip(),
    shapes=tuple(parse_shapes(kind)),
    operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
    arguments=arguments,
    attributes=rest[closed + 1 :],
    is_root=bool(match.group(1)),
  )


def parse_shapes(text: str) -> list[Shape]:
  """The arrays of a type like "(f32[2,3]{1,0}, bf16[4]{0:T(128)S(1)})", in order."""
  shapes = []
  for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    shapes.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
  return shapes


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  return len(text)


@functools.cache
def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  digits = re.match(r"[a-z]+(\d+)", dtype)
  return int(digits.group(1)) if digits else 8
