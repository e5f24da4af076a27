"""What is wrong with weights of others, in words."""

from collections.abc import Mapping

from mgen_jax.errors import UserError

_LISTED = 200  # names in one message; a file of another model has thousands


class WeightsError(UserError):
  """A file of weights that cannot be used."""


def check_names(
  found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
  """Compares names and shapes, and lists every difference at once.

  Args:
    found: shapes by name in the file.
    wanted: shapes by name that the model has.
    what: the file, for the message.

  Raises:
    WeightsError: they differ.
  """
  faults = [f"missing: {name} {wanted[name]}" for name in sorted(set(wanted) - set(found))]
  faults += [f"extra: {name} {found[name]}" for name in sorted(set(found) - set(wanted))]
  faults += [
    f"shape: {name} is {found[name]} instead of {wanted[name]}"
    for name in sorted(set(found) & set(wanted))
    if tuple(found[name]) != tuple(wanted[name])
  ]
  if faults:
    more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    raise WeightsError(
      f"{what} does not fit the model in {len(faults)} tensors; give the model the file's channels,"
      " levels and latent channels, or name another file:\n  "
      + "\n  ".join(faults[:_LISTED])
      + more
    )
