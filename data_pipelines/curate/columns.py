"""Columns of lists as arrays, without a Python object for each number: a million rows must fit."""

import numpy as np
import pyarrow as pa


def vectors(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
  """Of a column of lists of equal length: which rows have one, int [m], and float32 [m, d]."""
  there = np.flatnonzero(column.is_valid().to_numpy())
  values = column.drop_null().combine_chunks().flatten()
  rows = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
  return there, rows.reshape(len(there), -1) if len(there) else np.zeros((0, 0), np.float32)


def byte_rows(column: pa.ChunkedArray, width: int) -> list[np.ndarray]:
  """Of a column of lists of `width` bytes each: uint8 [n_i, width] of every row; n_i may be 0."""
  lists = column.cast(pa.list_(pa.binary(width))).combine_chunks()
  counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
  values = lists.flatten()
  data = np.zeros((0, width), np.uint8)
  if len(values):
    start = values.offset * width
    data = np.frombuffer(values.buffers()[1], np.uint8)[start : start + len(values) * width]
  return np.split(data.reshape(-1, width), np.cumsum(counts)[:-1]) if len(counts) else []
