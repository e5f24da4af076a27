"""Where the wall time of a stage goes: steps that count, and everything that is none.

Goodput is the time that devices spent on steps which the model still has, over the wall time since
the stage was first started: compilation, waiting for data, saves, validation, restoring, steps that
a restart had to do again and the time between two runs are the rest.

Steps are queued ahead of the devices, so the host's clock alone cannot tell. A thread waits for the
outputs of each step and notes when they are there; while the next step is not queued yet, the
devices are idle, and that time is charged to what the host did meanwhile (`Account.spend`).
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from mgen_jax.data import files

FILE_NAME = "goodput.jsonl"

# What the time of a run is charged to. A summary over several runs has two more: "lost" (steps done
# after the checkpoint that a later run began from) and "down" (between two runs, and what the first
# of them did after its last line).
KINDS = ("step", "compile", "initialise", "restore", "data", "validation", "save", "other")

# Seconds to wait for the thread. Whoever waits knows the step to be done, or the run ends with an
# error: devices that wait for a lost host never answer, and must not keep the process.
_PATIENCE = 10.0

Span = tuple[str, float, float]  # kind, began, ended


class Totals(NamedTuple):
  """What an account holds, from its start to the end of the last step that was measured."""

  seconds: dict[str, float]  # by kind; their sum is the wall time
  buckets: dict[str, tuple[int, float]]  # (steps, seconds of the devices) of each bucket
  steps: int  # that were measured

  @property
  def wall(self) -> float:
    return sum(self.seconds.values())


class Account:
  """Charges every second of a run to one kind. Made when the run begins, closed when it ends."""

  def __init__(self):
    self._charged_to = time.perf_counter()  # all before is charged
    self._spans: list[Span] = []  # of the host, since the last step was queued
    self._stack: list[tuple[str, float]] = []
    self._seconds = dict.fromkeys(KINDS, 0.0)
    self._buckets: dict[str, tuple[int, float]] = {}
    self._ready = self._charged_to  # when the next step's inputs were there
    self._queued = self._measured = 0
    self._changed = threading.Condition()
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._ended = self._closed = False
    self._thread = threading.Thread(target=self._measure, name="goodput", daemon=True)
    self._thread.start()

  def __enter__(self) -> "Account":
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  @contextlib.contextmanager
  def spend(self, kind: str) -> Iterator[None]:
    """Around what the host does; of nested kinds the innermost counts."""
    now = time.perf_counter()
    if self._stack:
      outer, began = self._stack[-1]
      self._spans.append((outer, began, now))
    self._stack.append((kind, now))
    try:
      yield
    finally:
      now = self._ready = time.perf_counter()
      self._spans.append((*self._stack.pop(), now))
      if self._stack:
        self._stack[-1] = (self._stack[-1][0], now)

  def queued(self, bucket: str, outputs: Any) -> int:
    """A step was queued, right after the last `spend`; `outputs` are there when it is done.

    Returns:
      The number of this step, for `totals`.
    """
    self._queue.put((self._ready, self._spans, bucket, outputs))
    self._spans = []
    self._queued += 1
    return self._queued

  def totals(self, number: int = 0) -> Totals:
    """The account, when the step of that number has been measured."""
    with self._changed:
      self._changed.wait_for(lambda: self._measured >= number or self._ended, _PATIENCE)
      return Totals(dict(self._seconds), dict(self._buckets), self._measured)

  def close(self) -> Totals:
    """Waits for the steps that are queued, charges what came after them, and ends the thread."""
    if not self._closed:
      self._closed = True
      self._queue.put(None)
      self._thread.join(_PATIENCE)
      self._charge_until(time.perf_counter(), self._spans)
    return self.totals()

  def _measure(self) -> None:
    try:
      self._measure_steps()
    except RuntimeError as error:  # of the devices: the loop meets the same one, and stops
      logging.debug("the account ends: %s", error)
    finally:
      with self._changed:
        self._ended = True
        self._changed.notify_all()

  def _measure_steps(self) -> None:
    while (item := self._queue.get()) is not None:
      ready, spans, bucket, outputs = item
      jax.block_until_ready(outputs)
      now = time.perf_counter()
      del item, outputs
      with self._changed:
        self._charge_until(ready, spans)
        busy = now - self._charged_to
        self._seconds["step"] += busy
        count, seconds = self._buckets.get(bucket, (0, 0.0))
        self._buckets[bucket] = (count + 1, seconds + busy)
        self._charged_to = now
        self._measured += 1
        self._changed.notify_all()

  def _charge_until(self, end: float, spans: Sequence[Span]) -> None:
    """Charges the idle time before `end`; where devices were busy until later, there is none."""
    idle = end - self._charged_to
    if idle <= 0:
      return
    for kind, began, ended in spans:
      share = max(0.0, min(ended, end) - max(began, self._charged_to))
      self._seconds[kind] += share
      idle -= share
    self._seconds["other"] += max(0.0, idle)
    self._charged_to = end


class Ledger:
  """The account on disk, a line for each log line of every run of a stage; process 0 writes it.

  Entered when a run begins. On leaving, the account is closed and its last line written.
  """

  def __init__(self, folder: str, account: Account):
    self._folder, self._account = folder, account
    self._active = jax.process_index() == 0
    self._start: int | None = None  # the step that this run goes on from
    self._base = account.totals()  # when it did
    self._before: dict[str, float] = {}  # of earlier runs
    self._began = time.time()
    if self._active:
      os.makedirs(folder, exist_ok=True)
      path = os.path.join(folder, FILE_NAME)
      _end_last_line(path)
      self._run = 1 + max((line["run"] for line in read(folder)), default=0)
      self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (`__exit__` does)
      self._write(None, self._base)

  def __enter__(self) -> "Ledger":
    return self

  def __exit__(self, *unused) -> None:
    totals = self._account.close()
    if self._start is not None:
      self.write(totals)
    if self._active:
      self._file.close()

  def resumed(self, step: int) -> None:
    """The run goes on from this step: what was done after it before is lost.

    Called again, it begins another run in the ledger: the state went back within this process.
    """
    if self._start is not None:
      self._base, self._began = self._account.totals(), time.time()
      if self._active:
        self._run += 1
    self._start = step
    if self._active:
      self._write(step, self._base)
      self._before = summarise(read(self._folder))

  def write(self, totals: Totals) -> float:
    """Notes how the account stands.

    Returns:
      The goodput of the stage so far, all its runs together (on process 0).
    """
    step = self._start + totals.steps - self._base.steps
    if not self._active:
      return 0.0
    here = self._write(step, totals)
    return goodput({kind: spent + here.get(kind, 0.0) for kind, spent in self._before.items()})

  def _write(self, step: int | None, totals: Totals) -> dict[str, float]:
    seconds = {
      kind: round(spent - self._base.seconds[kind], 4) for kind, spent in totals.seconds.items()
    }
    # The start of a run is told by the wall clock, everything within it by a clock that only runs
    # forward: a wall clock that is put right spoils no more than one "down".
    line = {"run": self._run, "time": round(self._began, 3), "step": step, "seconds": seconds}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    return seconds


def read(folder: str) -> list[dict[str, Any]]:
  """The lines of a stage's ledger, in order, without a last one that was cut short."""
  return files.read_json_lines(os.path.join(folder, FILE_NAME))


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Seconds of all runs by kind, "lost" and "down" included; their sum is the wall time."""
  runs: dict[int, list[Mapping[str, Any]]] = {}
  for line in lines:
    runs.setdefault(line["run"], []).append(line)
  seconds = dict.fromkeys((*KINDS, "lost", "down"), 0.0)
  began_from = [[line["step"] for line in run if line["step"] is not None] for run in runs.values()]
  ended = None
  for index, run in enumerate(runs.values()):
    last = run[-1]["seconds"]
    for kind, spent in last.items():
      seconds[kind] += spent
    later = [steps[0] for steps in began_from[index + 1 :] if steps]
    if later and last:
      lost = last["step"] - _step_seconds_at(run, min(later))
      seconds["step"] -= lost
      seconds["lost"] += lost
    if ended is not None:
      seconds["down"] += max(0.0, run[0]["time"] - ended)
    ended = run[0]["time"] + sum(last.values())
  return seconds


def goodput(seconds: Mapping[str, float]) -> float:
  """The share of steps that count in a summary; 0 where nothing has happened yet."""
  wall = sum(seconds.values())
  return seconds.get("step", 0.0) / wall if wall > 0 else 0.0


def describe(seconds: Mapping[str, float]) -> str:
  """One line for people: the goodput, and where the rest went, the largest share first."""
  wall = sum(seconds.values()) or 1.0
  rest = sorted(((spent, kind) for kind, spent in seconds.items() if kind != "step"), reverse=True)
  shares = [f"{kind} {spent / wall:.1%}" for spent, kind in rest if spent / wall >= 0.001]
  return f"goodput {goodput(seconds):.1%}" + (f" ({', '.join(shares)})" if shares else "")


def _step_seconds_at(run: Sequence[Mapping[str, Any]], step: int) -> float:
  """Seconds that a run had spent on steps when it was at `step`, between lines in proportion."""
  before = (0, 0.0)
  for line in run:
    if line["step"] is None:
      continue
    here = (line["step"], line["seconds"].get("step", 0.0))
    if here[0] >= step:
      width = here[0] - before[0]
      share = (step - before[0]) / width if width else 1.0
      return before[1] + share * (here[1] - before[1])
    before = here
  return before[1]


def _end_last_line(path: str) -> None:
  """Drops a last line that a killed run has cut short, so that the next one starts anew."""
  if not os.path.exists(path):
    return
  with open(path, "rb+") as file:
    text = file.read()
    file.truncate(text.rfind(b"\n") + 1)
