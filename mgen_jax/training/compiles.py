"""Compilations while a stage runs: each one is seen, and one too many can be an error.

The steps are compiled before the first one runs (`step.compile_for`), so after the warm-up nothing
should compile again: a program that does, stalls all devices, each time it does.
"""

import jax.monitoring

from mgen_jax.errors import UserError

_EVENT = "/jax/core/compile/backend_compile_duration"  # also for one from the persistent cache


class RecompilationError(UserError):
  """Something was compiled after the warm-up, and the stage forbids it."""


class Compilations:
  """Notes the compilations of this process while entered.

  Attributes:
    events: (function, seconds) of each since `take` was called.
  """

  def __init__(self):
    self.events: list[tuple[str, float]] = []

  def __enter__(self) -> "Compilations":
    jax.monitoring.register_event_duration_secs_listener(self._note)
    return self

  def __exit__(self, *unused) -> None:
    jax.monitoring.unregister_event_duration_listener(self._note)

  def take(self) -> list[tuple[str, float]]:
    """The events since the last call."""
    events, self.events = self.events, []
    return events

  def _note(self, event: str, seconds: float, **facts: str | int) -> None:
    if event == _EVENT:
      self.events.append((str(facts.get("fun_name", "a function")), seconds))


def refuse(stage: str, step: int, events: list[tuple[str, float]]) -> None:
  """Raises what the strict mode says of compilations after the warm-up.

  Raises:
    RecompilationError: there were some.
  """
  if not events:
    return
  names = sorted({name for name, _ in events})
  shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  raise RecompilationError(
    f"stage {stage}: {shown} compiled again around step {step} ({len(events)} times, "
    f"{sum(seconds for _, seconds in events):.1f} s), after the warm-up: give it arrays of one "
    f"shape, or set config.stages.{stage}.observe.strict_compiles=False."
  )
