"""What an experiment file calls: the experiment itself, and named models and texts in full."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from mgen_jax import schema
from mgen_jax.config.stages import Experiment
from mgen_jax.encoders import StackConfig
from mgen_jax.encoders import sizes as encoder_sizes
from mgen_jax.errors import ConfigError, suggest
from mgen_jax.models import backbone as backbone_lib
from mgen_jax.models import latte as latte_lib


def backbone(size: str, *, dit: bool = False, **changes: Any) -> dict[str, Any]:
  """The "model" of a generator: a named size of the backbone, every key written out.

  Args:
    size: "30B", "17B", "9B", "7B", "5B", "1B" or "toy".
    dit: the DiT arm of the paper's ablation instead of the LLaMa3-like one.
    **changes: keys of BackboneConfig that differ.

  Raises:
    ConfigError: there is no such size.
  """
  if size not in backbone_lib.SIZES:
    raise ConfigError(f"unknown size {size!r}: {suggest(size, list(backbone_lib.SIZES))}")
  model = backbone_lib.SIZES[size]
  model = backbone_lib.dit_arm(model) if dit else model
  return {**schema.to_plain(model), **changes}


def latte(size: str, *, variant: int = 1, **changes: Any) -> dict[str, Any]:
  """The "model" of a Latte: a named size, every key written out.

  Args:
    size: "S/2" to "XL/8".
    variant: 1 to 4; 3 has fewer layers, so that all have about as many parameters.
    **changes: keys of LatteConfig that differ.

  Raises:
    ConfigError: there is no such size.
  """
  if size not in latte_lib.SIZES:
    raise ConfigError(f"unknown size {size!r}: {suggest(size, list(latte_lib.SIZES))}")
  return schema.to_plain(latte_lib.size(size, variant=variant, **changes))


def text_stack(**changes: Any) -> dict[str, Any]:
  """The "text" of a generator: Movie Gen's three frozen encoders, their features cached.

  The paper gives the widths of the features, from which the encoders follow, and MetaCLIP's 256
  tokens; 300 and 100 are those of mindone's re-implementation. Weights: made by mgen_jax.convert.

  Args:
    **changes: keys of FeatureTextConfig that differ.
  """
  encoders = ("ul2", "metaclip-bigg-text-256", "byt5-small")
  return {
    "kind": "features",
    "names": ("ul2", "metaclip", "byt5"),
    "encoders": encoders,
    "weights": tuple(f"weights/{name}" for name in encoders),
    "reads": ("prompt", "prompt", "quoted"),
    "widths": tuple(encoder_sizes.named(name).config.output_width for name in encoders),
    "lengths": (300, 256, 100),
    **changes,
  }


def encoded_text(text: Mapping[str, Any]) -> dict[str, Any]:
  """The "text" of the encode stage that writes the features a generator with `text` reads."""
  keys = {field.name for field in dataclasses.fields(StackConfig)}
  return {key: value for key, value in text.items() if key in keys}


def experiment(*, name: str, stages: Mapping[str, Any], **values: Any) -> config_dict.ConfigDict:
  """A complete experiment from the keys that differ from the defaults.

  Args:
    name: of the experiment.
    stages: by name, in the order in which they run; each a dict with a "kind".
    **values: further keys of `Experiment`.

  Returns:
    A ConfigDict with every key, so that a flag can override any of them.

  Raises:
    ConfigError: an unknown key or a value of the wrong type.
  """
  values = {"name": name, "stages": stages, "recipe": tuple(stages), **values}
  return schema.to_config_dict(schema.build(Experiment, values))
