"""What the instructions of a compiled program cost: FLOPs, bytes of memory, bytes on the network.

FLOPs are those of matrix products and convolutions, 2 for a multiply-add, and of attention kernels
by formula; elementwise work is not counted. Bytes are those that each instruction reads and writes
in the device's main memory if nothing stays in caches. Not here: how long it takes.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from mgen_jax.planning.hlo import Computation, Instruction, Module, Shape

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

# They move nothing themselves, or what they move is counted where it is used.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
  *("conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "iota"),
  *("async-start", "async-update", "async-done", "domain", "add-dependency"),
}

_FUSIONS = ("fusion", "fusion-start")

# Products of the size of queries x keys x head_dim in a kernel, by a part of its name. The
# backward pass computes the scores again: q k', dO v', dS k, dS' q, P' dO.
_ATTENTION_PRODUCTS = (
  ("fmha", "Backward", 5),
  ("fmha", "", 2),
  ("dot_product_attention_bwd", "", 5),
  ("dot_product_attention", "", 2),
  ("dkv_dq", "", 5),  # one kernel for all three gradients
  ("dkv", "", 4),
  ("dq", "", 3),
  ("splash", "", 2),
  ("flash", "", 2),
  ("attention", "", 2),
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation. Bytes are those of one device and one execution."""

  kind: str
  axes: tuple[str, ...]  # of the mesh: those that differ within a group
  group: np.ndarray  # [members] ids of one group, or [2] of the longest hop of a permutation
  size: int  # members of a group
  bytes: int  # of the whole array that a group gathers, reduces or exchanges
  wire: int  # that a device sends, with a ring


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction with its cost; all figures are of one execution on one device."""

  name: str
  source: str  # where in the Python program it comes from
  times: int
  flops: int
  bytes: int
  host_bytes: int  # between the device and the memory of its host
  collective: Collective | None = None


@dataclasses.dataclass(frozen=True)
class Costs:
  """Of one step on one device."""

  ops: tuple[Op, ...]
  unknown_loops: tuple[str, ...]  # counted once: their trip count could not be read
  unknown_kernels: tuple[str, ...]  # counted as 0 FLOPs

  @property
  def flops(self) -> int:
    return sum(op.flops * op.times for op in self.ops)

  @property
  def bytes(self) -> int:
    return sum(op.bytes * op.times for op in self.ops)

  @property
  def host_bytes(self) -> int:
    return sum(op.host_bytes * op.times for op in self.ops)


def costs_of(module: Module, mesh_shape: dict[str, int]) -> Costs:
  """The cost of every instruction of a program.

  Args:
    module: the program of one device.
    mesh_shape: axes of the mesh with their sizes, outermost first; devices are numbered along it.
  """
  ops, loops, kernels = [], [], []
  for computation, instruction, times in module.visits(loops):
    below = module.called(instruction) if instruction.opcode in _FUSIONS else None
    moved, host = _bytes(module, computation, instruction, below)
    flops = _flops(module, computation, instruction, kernels)
    collectives = _collectives(module, computation, instruction, below, mesh_shape)
    op = Op(instruction.name, instruction.op_name, times, flops, moved, host)
    if not collectives:
      if flops or moved or host:
        ops.append(op)
      continue
    ops.append(dataclasses.replace(op, collective=collectives[0]))
    ops += [Op(op.name, op.source, times, 0, 0, 0, other) for other in collectives[1:]]
  return Costs(tuple(ops), tuple(loops), tuple(sorted(set(kernels))))


def _flops(
  module: Module, computation: Computation, instruction: Instruction, unknown: list[str]
) -> int:
  """FLOPs of an instruction, with what is fused into it."""
  opcode = instruction.opcode
  if opcode in _FUSIONS:
    below = module.called(instruction)
    inside = below.instructions if below is not None else ()
    return sum(_flops(module, below, i, unknown) for i in inside)
  if opcode == "dot":
    lhs = computation.operand_shapes(instruction)[0]
    contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
    return 2 * instruction.shapes[0].size * math.prod(lhs.dims[d] for d in contracted)
  if opcode == "convolution":
    return convolution_flops(
      *computation.operand_shapes(instruction)[:2],
      instruction.shapes[0],
      instruction.attributes,
    )
  if opcode == "custom-call":
    return _kernel_flops(computation, instruction, unknown)
  return 0


def convolution_flops(lhs: Shape, rhs: Shape, out: Shape, attributes: str) -> int:
  """FLOPs of a convolution; taps that fall on padding or between dilated inputs are none.

  XLA for TPU writes every matrix product as a convolution, batch dimensions as spatial ones.

  Args:
    lhs: the input; rhs: the kernel; out: the result.
    attributes: with `window`, `dim_labels` and the group counts.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  lhs_labels, rhs_labels, out_labels = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(field.split("=") for field in (window.group(1).split() if window else ()))

  def of(name: str, default: str, axis: int) -> str:
    return fields[name].split("x")[axis] if name in fields else default

  taps = 1
  for axis in range(len(out_labels) - 2):
    digit = str(axis)
    taps *= _taps(
      lhs.dims[lhs_labels.index(digit)],
      rhs.dims[rhs_labels.index(digit)],
      out.dims[out_labels.index(digit)],
      int(of("stride", "1", axis)),
      int(of("pad", "0_0", axis).split("_")[0]),
      int(of("lhs_dilate", "1", axis)),
      int(of("rhs_dilate", "1", axis)),
    )
  groups = re.search(r"batch_group_count=(\d+)", attributes)
  batch = lhs.dims[lhs_labels.index("b")] // (int(groups.group(1)) if groups else 1)
  return 2 * taps * batch * rhs.dims[rhs_labels.index("i")] * out.dims[out_labels.index("f")]


@functools.cache
def _taps(n: int, kernel: int, out: int, stride: int, pad: int, dilate: int, spread: int) -> int:
  """Pairs (output, kernel position) of one axis that meet an input."""
  extent = (n - 1) * dilate + 1
  outputs = np.arange(out, dtype=np.int64) * stride - pad
  total = 0
  for k in range(kernel):
    position = outputs + k * spread
    total += int(((position >= 0) & (position < extent) & (position % dilate == 0)).sum())
  return total


def _kernel_flops(computation: Computation, instruction: Instruction, unknown: list[str]) -> int:
  """FLOPs of a custom call: matrix products and attention kernels; others are noted."""
  target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
  target = target.group(1) if target else ""
  operands = computation.operand_shapes(instruction)
  if "gemm" in target or "matmul" in target:
    contracted = _config_numbers(instruction.attributes, "lhs_contracting_dimensions")
    lhs = operands[0]
    dims = [lhs.dims[d] for d in contracted] if contracted else lhs.dims[-1:]
    return 2 * instruction.shapes[0].size * math.prod(dims)
  if not ("fmha" in target or target in ("tpu_custom_call", "__gpu$xla.gpu.triton")):
    if target.startswith("__cu") or "custom_call" in target:
      unknown.append(target)
    return 0
  stated = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', instruction.attributes)
  if stated and int(stated.group(1)):
    return int(stated.group(1))
  name = f"{target} {instruction.op_name} {instruction.name}"
  for word, and_word, products in _ATTENTION_PRODUCTS:
    if word in name and and_word in name:
      size = _attention_size(target, operands, instruction.shapes)
      if size:
        return 2 * products * size
  unknown.append(f"{target} ({instruction.op_name})")
  return 0


def _attention_size(target: str, operands: Sequence[Shape], results: Sequence[Shape]) -> int:
  """batch x heads x queries x keys x head_dim of an attention kernel, from its arrays; 0: unclear.

  cuDNN is given [batch, tokens, heads, head_dim] and gives or takes statistics
  [batch, heads, queries]; Pallas kernels are given [..., heads, tokens, head_dim].
  """
  floats = [s for s in operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f16", "f32")]
  if len(floats) < 2:
    return 0
  q, k = floats[:2]
  if "fmha" not in target:
    return q.size * k.dims[-2] if q.dims[-1] == k.dims[-1] else 0
  statistics = [s for s in (*results, *operands) if s.dtype == "f32" and len(s.dims) == 3]
  heads = statistics[0].dims[1] if statistics else q.dims[2]
  keys = k.size // (k.dims[0] * heads * k.dims[-1])
  return q.size * keys


def _bytes(
  module: Module,
  computation: Computation,
  instruction: Instruction,
  below: Computation | None,
) -> tuple[int, int]:
  """(bytes of main memory, bytes to or from the host) that an instruction moves."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-done", "-update")):
    return 0, 0
  if "AllocateBuffer" in instruction.attributes:
    return 0, 0
  reads = computation.operand_shapes(instruction)
  writes = list(instruction.shapes)
  if opcode.endswith("-start"):  # its result repeats its operands, and may hold flags
    writes = writes[:1] if opcode == "copy-start" else _results(instruction, reads)
  kind = opcode.removesuffix("-start")
  if kind in ("dynamic-slice", "gather", "slice"):  # a part of an array, where that lies
    reads = [Shape(s.dtype, s.dims, reads[0].space) for s in writes]
  elif kind == "dynamic-update-slice":
    reads, target = reads[1:2], reads[0]
    writes = [Shape(s.dtype, s.dims, target.space) for s in reads]
  elif opcode == "broadcast":
    reads = []
  elif below is not None:
    reads, writes = _fused_traffic(computation, instruction, writes, below)
  host = sum(s.bytes for s in (*reads, *writes) if s.space == 5)
  return sum(s.bytes for s in (*reads, *writes) if s.space == 0), host


def _results(start: Instruction, reads: Sequence[Shape]) -> list[Shape]:
  """The results of an asynchronous start, whose shapes repeat the operands first."""
  shapes = list(start.shapes)
  if start.opcode in ("fusion-start", "dynamic-slice-start", "dynamic-update-slice-start"):
    return [s for s in shapes[len(reads) :] if s.dims]  # without their flags
  if start.opcode == "all-reduce-start" or len(shapes) < 2 * len(reads):
    return shapes
  return shapes[len(reads) : 2 * len(reads)]


def _fused_traffic(
  computation: Computation, instruction: Instruction, results: Sequence[Shape], below: Computation
) -> tuple[list[Shape], list[Shape]]:
  """What a fusion reads and writes: of arrays that it only slices or updates, the slices."""
  users: dict[str, list[Instruction]] = {}
  for inner in below.instructions:
    for name in inner.operands:
      users.setdefault(name, []).append(inner)

  def through(inner: Instruction) -> list[tuple[str, Instruction]]:
    """(operand's name, user) pairs, looking through what only renames."""
    found = []
    for user in users.get(inner.name, []):
      if user.opcode in ("bitcast", "copy", "reshape") and not user.is_root:
        found += through(user)
      else:
        found.append((inner.name, user))
    return found

  reads = []
  parameters = sorted(
    (i for i in below.instructions if i.opcode == "parameter"), key=lambda i: int(i.arguments)
  )
  for parameter, name in zip(parameters, instruction.operands, strict=False):
    shapes = computation.by_name[name].shapes if name in computation.by_name else ()
    uses = through(parameter)
    sliced = [
      user.opcode in ("dynamic-slice", "gather") and user.operands[0] == via for via, user in uses
    ]
    updated = [
      user.opcode == "dynamic-update-slice" and user.operands[0] == via for via, user in uses
    ]
    if shapes and uses and all(a or b for a, b in zip(sliced, updated, strict=True)):
      slices = [user.shapes[0] for (_, user), s in zip(uses, sliced, strict=True) if s]
      reads += [Shape(s.dtype, s.dims, shapes[0].space) for s in slices]
    else:
      reads += shapes
  root = below.root
  roots = [root]
  if root.opcode == "tuple":
    roots = [below.by_name[name] for name in root.operands]
  writes = []
  for inner, shape in zip(roots, results, strict=False):
    while inner.opcode in ("bitcast", "copy") and inner.operands:
      inner = below.by_name[inner.operands[0]]
    if inner.opcode == "dynamic-update-slice" and len(inner.operands) > 1:
      update = below.by_name[inner.operands[1]].shapes[0]
      writes.append(Shape(update.dtype, update.dims, shape.space))
    else:
      writes.append(shape)
  return reads, writes


def _collectives(
  module: Module,
  computation: Computation,
  instruction: Instruction,
  below: Computation | None,
  mesh_shape: dict[str, int],
) -> list[Collective]:
  """The collective that an instruction is, or those that are fused into it."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    one = _collective(kind, computation, instruction, mesh_shape)
    return [one] if one is not None else []
  found = []
  for inner in below.instructions if below is not None else ():
    inner_below = module.called(inner) if inner.opcode == "fusion" else None
    for one in _collectives(module, below, inner, inner_below, mesh_shape):
      scatters = below.root.opcode == "dynamic-slice" and one.kind == "all-reduce"
      # TPU: a reduce-scatter is a fusion that keeps one slice of an all-reduce.
      if scatters:
        one = dataclasses.replace(one, kind="reduce-scatter", wire=one.wire // 2)
      found.append(one)
  return found


def _collective(
  kind: str, computation: Computation, instruction: Instruction, mesh_shape: dict[str, int]
) -> Collective | None:
  """None where no device talks to another."""
  sizes = tuple(mesh_shape.values())
  devices = math.prod(sizes)
  data = sum(shape.bytes for shape in computation.operand_shapes(instruction))
  if kind == "collective-permute":
    pairs = np.array(
      re.findall(r"\{(\d+),(\d+)\}", _braces(instruction.attributes, "source_target_pairs")), int
    )
    moving = pairs[pairs[:, 0] != pairs[:, 1]] if len(pairs) else pairs
    if not len(moving):
      return None
    steps = np.abs(np.subtract(*(np.array(np.unravel_index(moving[:, i], sizes)) for i in (0, 1))))
    axes = _names(mesh_shape, (steps > 0).any(axis=1))
    longest = moving[int(steps.sum(axis=0).argmax())]
    return Collective(kind, axes, longest, 2, data, data)
  groups = replica_groups(instruction.attributes, devices)
  size = groups.shape[1]
  if size == 1:
    return None
  places = np.stack(np.unravel_index(groups, sizes))  # [axes, groups, members]
  axes = _names(mesh_shape, (places != places[:, :, :1]).any(axis=(1, 2)))
  whole = data * size if kind == "all-gather" else data
  share = (size - 1) / size
  wire = whole * share * (2 if kind == "all-reduce" else 1)
  return Collective(kind, axes, groups[0], size, whole, int(wire))


def replica_groups(attributes: str, devices: int) -> np.ndarray:
  """The groups of a collective as ids, [groups, members].

  Understands lists, iotas like "[4,2]<=[2,4]T(1,0)", and the named axes of newer XLA:
  "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", where "'x':(2)2" would be the part of x of
  size 2 below its first 2.
  """
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    rows, columns, dims, order = iota.groups()
    ids = np.arange(devices).reshape(_ints(dims))
    ids = ids.transpose(_ints(order)) if order else ids
    return ids.reshape(int(rows), int(columns))
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
  )
  if named:
    return _named_groups(*named.groups())
  listed = re.findall(r"\{([\d,]+)\}", _braces(attributes, "replica_groups"))
  if listed:
    longest = max(map(len, map(_ints, listed)))
    return np.array([ids for ids in map(_ints, listed) if len(ids) == longest])
  return np.arange(devices)[None]


def _named_groups(mesh: str, order: str | None, chosen: str) -> np.ndarray:
  """Groups along the axes `chosen` of a mesh whose devices stand in the `order` of an iota like
  "[2,4]T(1,0)", or of a list (None: counted up)."""
  axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  picked: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
    picked.setdefault(name, []).append((int(before or 1), int(size or axes[name])))
  dims, inside = [], []
  for name, size in axes.items():
    done = 1
    for before, part in sorted(picked.get(name, [])):
      dims += [before // done, part]
      inside.append(len(dims) - 1)
      done = before * part
    dims.append(size // done)
  ids = np.arange(math.prod(dims))
  if order and order.startswith("["):
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order).groups()
    ids = ids.reshape(_ints(shape))
    ids = ids.transpose(_ints(turned)) if turned else ids
  elif order:
    ids = np.array(_ints(order))
  ids = ids.reshape(dims)
  outside = [axis for axis in range(len(dims)) if axis not in inside]
  members = math.prod(dims[axis] for axis in inside)
  return ids.transpose(*outside, *inside).reshape(-1, members)


def _names(mesh_shape: dict[str, int], used: Sequence[bool]) -> tuple[str, ...]:
  return tuple(name for name, use in zip(mesh_shape, used, strict=True) if use)


def _braces(attributes: str, name: str) -> str:
  """What stands between the outer braces of `name={...}`."""
  start = attributes.find(f"{name}={{")
  if start < 0:
    return ""
  depth = 0
  for match in re.compile(r"[{}]").finditer(attributes, start):
    depth += 1 if match.group() == "{" else -1
    if depth == 0:
      return attributes[start + len(name) + 2 : match.start()]
  return ""


def _numbers(attributes: str, name: str) -> tuple[int, ...]:
  match = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
  return _ints(match.group(1)) if match else ()


def _config_numbers(attributes: str, name: str) -> tuple[int, ...]:
  """A list of numbers in the JSON of a backend config."""
  match = re.search(rf'"{name}":\s*(\[[^\]]*\])', attributes)
  return tuple(int(n) for n in json.loads(match.group(1))) if match else ()


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)
