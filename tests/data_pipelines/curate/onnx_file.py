"""A tiny ONNX file, written without the onnx package: the mean colour of a picture times a matrix.

ONNX is protobuf, of which a network this small needs two kinds of fields only.
"""

import struct
from pathlib import Path

import numpy as np


def write_mean_colour(
  path: Path, weights: np.ndarray, size: int = 32, shape: tuple[int | str, ...] = ()
) -> str:
  """[n, 3, size, size] -> mean over the picture [n, 3] @ weights float32 [3, width].

  With another `shape`, the mean is over all but its first two dimensions.
  """
  mean = _node("GlobalAveragePool", ["x"], ["mean"])
  flat = _node("Flatten", ["mean"], ["flat"])
  product = _node("MatMul", ["flat", "w"], ["y"])
  tensor = (
    b"".join(_number(1, side) for side in weights.shape)
    + _number(2, 1)  # float
    + _field(8, b"w")
    + _field(9, np.float32(weights).tobytes())
  )
  graph = (
    b"".join(_field(1, node) for node in (mean, flat, product))
    + _field(2, b"graph")
    + _field(5, tensor)
    + _field(11, _value("x", shape or ("n", 3, size, size)))
    + _field(12, _value("y", ("n", weights.shape[1])))
  )
  path.write_bytes(_number(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 13)))
  return str(path)


def _varint(value: int) -> bytes:
  out = b""
  while value > 127:
    out += struct.pack("B", value & 127 | 128)
    value >>= 7
  return out + struct.pack("B", value)


def _number(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(content)) + content


def _node(kind, inputs, outputs) -> bytes:
  names = b"".join(_field(1, name.encode()) for name in inputs)
  return names + b"".join(_field(2, name.encode()) for name in outputs) + _field(4, kind.encode())


def _value(name, shape) -> bytes:
  sides = b"".join(
    _field(1, _field(2, side.encode()) if isinstance(side, str) else _number(1, side))
    for side in shape
  )
  tensor = _field(1, _number(1, 1) + _field(2, sides))
  return _field(1, name.encode()) + _field(2, tensor)
