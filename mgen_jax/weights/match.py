"""What of a folder of safetensors belongs to which parameter; what is missing, strange, left over.

Only names, shapes and types are looked at. Not here: reading and writing (`transfer.py`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mgen_jax import schema
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.weights import rules as rules_lib
from mgen_jax.weights.folders import CONFIG_NAME, Source
from mgen_jax.weights.rules import Family, Rule

# Names of one tower only, for folders that do not say which towers they hold.
_TOWERS = {"clip_text": "vision_model.", "clip_vision": "text_model."}


class Target(NamedTuple):
  """A parameter and the tensors that it is made of, layer by layer."""

  rule: Rule
  shape: tuple[int, ...]  # of the parameter
  axes: tuple[str | None, ...]  # logical names of its dimensions
  names: tuple[str, ...]  # in the files


@dataclasses.dataclass(frozen=True)
class Match:
  """How a folder and a model fit.

  Attributes:
    family, config: of the model.
    targets: every parameter for which all tensors are there.
    missing: canonical names that no file has.
    misshaped: what has another shape than the config says.
    unmapped: names in the files that the family does not know.
    ignored: names in the files that are of no use here (decoder, other tower, buffers).
    kept: those of them that are kept as they are, for the way back.
  """

  family: Family
  config: Any
  targets: tuple[Target, ...]
  missing: tuple[str, ...]
  misshaped: tuple[str, ...]
  unmapped: tuple[str, ...]
  ignored: tuple[str, ...]
  kept: tuple[str, ...]

  def complain(self, where: Path) -> None:
    """Raises UserError that lists everything that does not fit."""
    lists = {"missing": self.missing, "misshaped": self.misshaped, "unmapped": self.unmapped}
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names]
    if found:
      raise UserError(
        f"the weights in {where} do not fit {self.family.name} as its config.json (where there is "
        f"none, their shapes) describes it: {'; '.join(found)}."
      )


def match(source: Source, families: Mapping[str, Family], family: str | None = None) -> Match:
  """Compares a folder with the model that its config.json describes.

  Args:
    source: the folder.
    families: those that are looked for, by name.
    family: which part of the model, where it has several (the towers of a CLIP).

  Raises:
    UserError: the model is of no family that is known here.
  """
  made = families[_pick(source, families, family)]
  actual: dict[str, str] = {}
  ignored = []
  for name in source.tensors:
    known = made.canonical(name)
    if known is None:
      ignored.append(name)
    elif known in actual:  # an alias: the same tensor under a second name
      keep, drop = sorted((actual[known], name), key=lambda n: n != known)
      actual[known] = keep
      ignored.append(drop)
    else:
      actual[known] = name
  shapes = {known: source.tensors[name].shape for known, name in actual.items()}
  config = _described(made, source, shapes)
  spare = [actual.pop(known) for known in made.spare(config) if known in actual]
  return _compare(made, config, actual, source, [*ignored, *spare])


def _described(made: Family, source: Source, shapes: Mapping[str, rules_lib.Shape]) -> Any:
  """The config that config.json describes, or the shapes where there is none.

  Raises:
    UserError: what stands there has other types, is out of range, or is not known.
  """
  path = source.folder / CONFIG_NAME
  try:
    config = made.from_hf(source.config, shapes)
    return schema.build(made.config, schema.to_plain(config), made.name)
  except ConfigError as error:
    raise UserError(f"{path} cannot be used: {error}") from error
  except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path} describes no {made.name} ({error}): get it anew.") from error


def _pick(source: Source, families: Mapping[str, Family], family: str | None) -> str:
  """The family of a folder, by its config.json, else by its names."""
  kind = source.config.get("model_type", source.config.get("_class_name"))
  known = [name for name, made in families.items() if kind in made.kinds]
  if not known:
    found = (name for name, made in families.items() if _marked(made, source.tensors))
    known = list(found)[:1]
  if not known and not source.config:
    raise UserError(
      f"{source.folder / CONFIG_NAME} is missing, and the names in {source.path} do not say what "
      "it is: name a folder that has it."
    )
  if not known:
    kinds = dict.fromkeys(kind for made in families.values() for kind in made.kinds)
    raise UserError(
      f"{source.folder / CONFIG_NAME} says model_type {str(kind)!r}, which is not known: "
      f"{', '.join(kinds)} are."
    )
  if len(known) > 1 and family is None:
    # What holds nothing of the other tower is one tower.
    alone = [f for f in known if not any(n.startswith(_TOWERS[f]) for n in source.tensors)]
    known = alone or known
  if family is None and len(known) > 1:
    raise UserError(f"{source.path} holds {' and '.join(known)}: name one of them (--tower).")
  if family is not None and family not in known:
    raise UserError(f"{source.path} holds {' and '.join(known)}, no {family}: leave --tower out.")
  return known[0] if family is None else family


def _marked(family: Family, names: Mapping[str, Any]) -> bool:
  plain = {name.removeprefix("module.") for name in names}
  found = (mark.removeprefix("!") in plain for mark in family.marks)
  wanted = (not mark.startswith("!") for mark in family.marks)
  return bool(family.marks) and all(a == b for a, b in zip(found, wanted, strict=True))


def _compare(
  family: Family, config: Any, actual: Mapping[str, str], source: Source, ignored: list[str]
) -> Match:
  targets, missing, misshaped, used = [], {}, {}, set()
  shapes = rules_lib.boxes(family, config)
  for rule in family.rules(config):
    box = shapes[rule.target]
    shape, axes = tuple(box.value.shape), tuple(box.names)
    one, wanted = rule.their_shape(shape), rule.names(shape)
    names = []
    for name in wanted:
      used.add(name)
      if name not in actual:
        missing[name] = None
        continue
      found = source.tensors[actual[name]].shape
      if rules_lib.same_matrix(found, one):
        names.append(actual[name])
      else:
        misshaped[f"{actual[name]} {list(found)} instead of {list(one)}"] = None
    if len(names) == len(wanted):
      targets.append(Target(rule, shape, axes, tuple(names)))
  unmapped = [name for known, name in actual.items() if known not in used]
  kept = [name for name in ignored if family.kept(name)]
  lists = (missing, misshaped, sorted(unmapped), sorted(ignored), sorted(kept))
  return Match(family, config, tuple(targets), *map(tuple, lists))
