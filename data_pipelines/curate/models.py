"""Networks with public weights, from a path that the user gives: checked, batched, one thread.

ONNX files run in onnxruntime, safetensors are read with their own library; neither can run code of
its own. Nothing is ever downloaded. A model is opened once a process and kept (`onnx`), so that a
worker pays for it once. Not here: what the numbers mean (the stages).
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mgen_jax.data.files import sha256_file
from mgen_jax.errors import UserError

# Of CLIP's pictures; SSCD was trained with those of ImageNet.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALLEST = 1024  # bytes: a pointer of git-lfs in the place of weights has 130
_BATCH = 16


@functools.lru_cache(maxsize=64)
def fingerprint(path: str) -> str:
  """12 hexadecimal digits of the bytes of a file of weights. Raises UserError if it cannot be."""
  file = Path(path)
  if not file.is_file():
    raise UserError(f"{path} is no file: download the weights yourself and give their path.")
  if file.stat().st_size < _SMALLEST:
    raise UserError(
      f"{path} has only {file.stat().st_size} bytes: that is no network (a git-lfs pointer looks"
      " so); download the weights themselves."
    )
  return sha256_file(file)[:12]


class ImageModel:
  """An ONNX network from pictures [n, 3, size, size] to rows [n, width], float32.

  `width` is how many numbers it says of a picture. Raises UserError where the file is no such
  network; a trial run on a grey picture comes before any other work.
  """

  def __init__(self, path: str, mean: Sequence[float], std: Sequence[float]):
    import onnxruntime  # an extra: only who gives a network needs it

    fingerprint(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
      self._session = onnxruntime.InferenceSession(
        path, options, providers=onnxruntime.get_available_providers()
      )
    except Exception as error:  # its errors have no base of their own
      raise UserError(f"{path} is no ONNX network that can be opened ({error}).") from error
    self._path = path
    self._mean, self._std = np.float32(mean), np.float32(std)
    inputs = self._session.get_inputs()
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
      raise UserError(
        f"{path} takes {[(i.name, i.shape) for i in inputs]}: export the image tower alone, with"
        " one input [n, 3, height, width]."
      )
    self._input = inputs[0].name
    self._fixed = shape[0] if isinstance(shape[0], int) else 0  # a batch that cannot change
    self.size = shape[2] if isinstance(shape[2], int) else 224
    self.width = self(np.full((1, self.size, self.size, 3), 128, np.uint8)).shape[1]

  def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [H, W, 3] each -> float32 [n, width]; each is fitted first.

    Always in batches of one size, the last one filled up: what is said of a picture must not depend
    on which others came with it.
    """
    step = self._fixed or _BATCH
    rows = []
    for start in range(0, len(pictures), step):
      part = np.stack([self._normal(self.fit(each)) for each in pictures[start : start + step]])
      filled = np.concatenate([part, np.repeat(part[-1:], step - len(part), 0)])
      found = self._session.run(None, {self._input: filled})[0]
      if found.ndim != 2 or not np.isfinite(found).all():
        raise UserError(
          f"{self._path} gives {found.dtype} {found.shape}: wanted is one row of finite numbers for"
          " each picture."
        )
      rows.append(np.float32(found[: len(part)]))
    return np.concatenate(rows)

  def fit(self, picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: the shorter side is scaled, the longer one cropped."""
    height, width = picture.shape[:2]
    scale = self.size / min(height, width)
    size = max(self.size, round(width * scale)), max(self.size, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(picture, size, interpolation=method)
    top, left = (scaled.shape[0] - self.size) // 2, (scaled.shape[1] - self.size) // 2
    return np.ascontiguousarray(scaled[top : top + self.size, left : left + self.size])

  def _normal(self, picture):
    return ((np.float32(picture) / 255 - self._mean) / self._std).transpose(2, 0, 1)


@functools.lru_cache(maxsize=8)
def onnx(path: str, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageModel:
  """The network at `path`, opened once in this process."""
  return ImageModel(path, mean, std)


class Head:
  """A chain of linear layers, as LAION's predictor of aesthetics on CLIP is one.

  Its tensors are named `...N.weight` [out, in] and `...N.bias` [out]; they follow each other in the
  order of N, with nothing between them but dropout, which does nothing here. Raises UserError.
  """

  def __init__(self, path: str):
    fingerprint(path)
    try:
      tensors = load_file(path)
    except (SafetensorError, OSError) as error:
      raise UserError(
        f"{path} is no safetensors file ({error}); save the state dict of the .pth so, once."
      ) from error
    numbers = {}
    for name in tensors:
      stem, _, kind = name.rpartition(".")
      number = stem.rpartition(".")[2]
      if kind == "weight" and number.isdigit() and f"{stem}.bias" in tensors:
        numbers[int(number)] = stem
    self._layers = [
      (np.float32(tensors[f"{numbers[i]}.weight"]), np.float32(tensors[f"{numbers[i]}.bias"]))
      for i in sorted(numbers)
    ]
    widths = [weight.shape for weight, _ in self._layers]
    chained = all(a[0] == b[1] for a, b in itertools.pairwise(widths))
    if not widths or not chained or widths[-1][0] != 1:
      raise UserError(f"{path} has layers {widths} (out, in): wanted is a chain that ends in 1.")
    self.width = widths[0][1]

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    """float [n, width] -> float32 [n]."""
    for weight, bias in self._layers:
      rows = rows @ weight.T + bias
    return rows[:, 0]


@functools.lru_cache(maxsize=8)
def head(path: str) -> Head:
  """The layers at `path`, read once in this process."""
  return Head(path)


def means(tower: ImageModel, clips: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
  """Of each clip the mean of its pictures' embeddings, of length 1; one call for all clips."""
  rows = unit(tower([picture for clip in clips for picture in clip]))
  ends = np.cumsum([len(clip) for clip in clips])[:-1]
  return [unit(part.mean(axis=0)).tolist() for part in np.split(rows, ends)]


def unit(rows: np.ndarray) -> np.ndarray:
  """Rows scaled to length 1 (a row of zeros stays)."""
  length = np.linalg.norm(rows, axis=-1, keepdims=True)
  return rows / np.where(length > 0, length, 1)
