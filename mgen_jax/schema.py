"""Typed trees: plain mappings to frozen dataclasses and back, with errors that name the fix.

An experiment is written as a ConfigDict (so that flags can override any key) and read as frozen
dataclasses (typed, hashable, no hidden defaults). This file is the machine between the two. Not
here: which keys an experiment has (see `config/` and the dataclass of each component).

Field types understood: bool, int, float, str, `X | None`, `Literal[...]`, `tuple[...]`,
`dict[str, X]`, dataclasses, and one of several dataclasses picked by the value of a key (`one_of`).
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from mgen_jax.errors import ConfigError, nearest, suggest

_ONE_OF = "mgen_one_of"


def one_of(
  tag: str,
  options: Callable[[], Mapping[str, type]],
  *,
  each: bool = False,
  default: str | None = None,
) -> Any:
  """A dataclass field that holds one of several dataclasses, picked by the value of key `tag`.

  Args:
    tag: the key that picks; every one of the classes has it as a field, with its name as default.
    options: gives the classes by name; called late, so that modules may register themselves.
    each: the field is a `dict[str, ...]` and each of its entries is one of the classes.
    default: the tag where none is given; the field then has that class's defaults as its own.
  """
  factory = dataclasses.MISSING if default is None else lambda: options()[default]()
  metadata = {_ONE_OF: (tag, options, each, default)}
  return dataclasses.field(metadata=metadata, default_factory=factory, kw_only=True)


def build(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
  """Makes a `cls` from a mapping; keys left out take the defaults of the class.

  Args:
    cls: a dataclass.
    values: a mapping of plain values, mappings, or instances of the dataclasses.
    path: where the mapping stands, for messages.

  Raises:
    ConfigError: an unknown key, a value of the wrong type, a missing value.
  """
  if dataclasses.is_dataclass(values) and isinstance(values, cls):
    return values
  if not isinstance(values, Mapping | config_dict.ConfigDict):
    raise ConfigError(f"{path} is {values!r}: it must be a group of keys ({cls.__name__}).")
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = _hints(cls)
  for key in values:
    if key not in fields:
      raise ConfigError(f"{path}.{key} is not a key: {suggest(key, list(fields))}")
  made = {}
  for name, field in fields.items():
    where = f"{path}.{name}"
    if name in values:
      value = values[name]
      if _ONE_OF in field.metadata:
        made[name] = _build_one_of(field.metadata[_ONE_OF], value, where)
      else:
        made[name] = _convert(hints[name], value, where)
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ConfigError(f"{where} has no default: set it.")
  try:
    return cls(**made)
  except ConfigError as error:  # a cross-check in __post_init__: say where the group stands
    raise ConfigError(f"{path}: {error}") from error


def to_plain(value: Any) -> Any:
  """A dataclass tree as nested dicts of plain values, every key present."""
  if dataclasses.is_dataclass(value):
    fields = dataclasses.fields(value)
    return {field.name: to_plain(getattr(value, field.name)) for field in fields}
  if isinstance(value, Mapping):
    return {key: to_plain(item) for key, item in value.items()}
  if isinstance(value, tuple | list):
    return tuple(to_plain(item) for item in value)
  return value


def to_config_dict(value: Any) -> config_dict.ConfigDict:
  """`to_plain` as a ConfigDict whose keys are typed, empty optional ones included."""
  return config_dict.ConfigDict(_with_placeholders(value))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys."""
  out = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      out.update(flatten(value, f"{prefix}{key}."))
    else:
      out[prefix + key] = value
  return out


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _build_one_of(rule: tuple, value: Any, where: str) -> Any:
  """Makes the dataclass that the tag in `value` names; for `each`, one for every entry."""
  tag, options, each, default = rule
  options = options()
  if any(type(value) is cls for cls in options.values()):
    return value
  if not isinstance(value, Mapping | config_dict.ConfigDict):
    raise ConfigError(f'{where} is {value!r}: it must be a group of keys with a "{tag}".')
  if each:
    one = (tag, lambda: options, False, default)
    return {key: _build_one_of(one, item, f"{where}.{key}") for key, item in value.items()}
  picked = value.get(tag, default)
  if picked is None:
    raise ConfigError(f"{where}.{tag} is missing: one of {', '.join(sorted(options))}.")
  if picked not in options:
    near = suggest(str(picked), list(options))
    raise ConfigError(f"{where}.{tag} is {picked!r}, which is not known: {near}")
  return build(options[picked], value, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
  """Checks a value against a type hint; ints pass as floats, lists as tuples."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    (inner,) = [arg for arg in args if arg is not type(None)]
    return _convert(inner, value, where)
  if origin is typing.Literal:
    if value not in args:
      choices = ", ".join(repr(arg) for arg in args)
      near = nearest(str(value), [str(arg) for arg in args])
      hint = f'; did you mean "{near[0]}"?' if near else "."
      raise ConfigError(f"{where} is {value!r}: it must be one of {choices}{hint}")
    return value
  if origin is tuple:
    return _convert_tuple(args, value, where)
  if origin is dict:
    if not isinstance(value, Mapping | config_dict.ConfigDict):
      raise ConfigError(f"{where} is {value!r}: it must be a group of named entries.")
    return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
  if hint is Any:
    return value
  if dataclasses.is_dataclass(hint):
    return build(hint, value, where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ConfigError(
      f"{where} is {value!r} ({type(value).__name__}): it must be {_describe(hint)}."
    )
  if hint is float and not math.isfinite(value):  # comparisons would let NaN pass
    raise ConfigError(f"{where} is {value!r}: it must be a finite number.")
  return value


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple:
  if not isinstance(value, tuple | list):
    raise ConfigError(f"{where} is {value!r}: it must be a tuple.")
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ConfigError(f"{where} is {value!r}: it must have {len(args)} entries.")
  return tuple(
    _convert(arg, item, f"{where}[{i}]")
    for i, (arg, item) in enumerate(zip(args, value, strict=True))
  )


def _describe(hint: type) -> str:
  names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
  return names.get(hint, str(hint))


def _with_placeholders(value: Any) -> Any:
  """Like `to_plain`, with a typed placeholder for each `X | None` that holds None."""
  if isinstance(value, Mapping):
    return {key: _with_placeholders(item) for key, item in value.items()}
  if not dataclasses.is_dataclass(value):
    return to_plain(value)
  out = {}
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if item is None:
      hint = _hints(type(value))[field.name]
      (inner,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
      out[field.name] = config_dict.placeholder(typing.get_origin(inner) or inner)
    else:
      out[field.name] = _with_placeholders(item)
  return out
