"""The public weights of LPIPS (VGG16) into `models.perceptual.Lpips`.

Two safetensors files, or one with both: VGG16's convolutions under torchvision's names
("features.0.weight") or those of the lpips package ("net.slice1.0.weight"), and LPIPS's linear
layers ("lin0.model.1.weight"). Their pickles are to be converted first (see `files`).
"""

import re
from collections.abc import Mapping

import numpy as np

from mgen_jax.models.perceptual import VGG16
from mgen_jax.weights import checks


def import_lpips(
  tensors: Mapping[str, np.ndarray], what: str = "the file"
) -> dict[str, np.ndarray]:
  """Flat parameters of `Lpips` ("conv0_0/kernel", ..., "weight0", ...).

  Raises:
    WeightsError: tensors are missing or of another shape; all are listed. VGG16's classifier, the
      scaling layer and the copies that the lpips package stores are passed over.
  """
  found = {}
  for name, value in tensors.items():
    if name.startswith(("classifier.", "scaling_layer.", "lins.")):
      continue
    name = re.sub(r"^net\.slice\d\.", "features.", name)
    found[name] = value.reshape(value.shape[:2]) if name.startswith("lin") else value
  pairs, shapes, layer, before = {}, {}, 0, 3
  for group, widths in enumerate(VGG16):
    for number, width in enumerate(widths):
      theirs = f"features.{layer}"
      pairs[f"conv{group}_{number}/kernel"] = f"{theirs}.weight"
      pairs[f"conv{group}_{number}/bias"] = f"{theirs}.bias"
      shapes |= {f"{theirs}.weight": (width, before, 3, 3), f"{theirs}.bias": (width,)}
      layer, before = layer + 2, width  # each is followed by its ReLU
    layer += 1  # and each group by its pooling
    pairs[f"weight{group}"] = f"lin{group}.model.1.weight"
    shapes[f"lin{group}.model.1.weight"] = (1, widths[-1])
  checks.check_names({name: value.shape for name, value in found.items()}, shapes, what)
  out = {}
  for ours, theirs in pairs.items():
    value = np.asarray(found[theirs], np.float32)
    if ours.endswith("kernel"):
      value = value.transpose(2, 3, 1, 0)
    out[ours] = value[0] if ours.startswith("weight") else value
  return out
