"""Engines: the same bytes from all of them, and a worker that dies costs nothing but time."""

import os
import signal
import threading
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("cv2", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import engines
from data_pipelines.curate import run as running
from data_pipelines.curate.engines.local import Local
from mgen_jax.errors import UserError
from tests.data_pipelines.curate import small
from tests.data_pipelines.curate.test_run import curate, files


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
  return small.write_videos(tmp_path_factory.mktemp("engines") / "videos", 10)


@pytest.fixture(scope="module")
def expected(videos, tmp_path_factory) -> dict[str, bytes]:
  out = tmp_path_factory.mktemp("engines") / "out"
  curate(small.recipe(), videos, out)
  return files(out)


def slow() -> small.Recipe:
  """The same scores, slowly enough that a worker can be killed before it is done."""
  return small.recipe(light=small.Light(pause=0.2))


def without_versions(found: dict[str, bytes]) -> dict[str, bytes]:
  """By stage and partition: a pause is a setting, so it is in the versions, not in the scores."""
  return {name.split("@")[0] + "/" + name.split("/")[-1]: data for name, data in found.items()}


def die(task) -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def fail(task) -> None:
  raise UserError(f"unit {task.partition} cannot be done.")


def pids_of_workers(root: Path, me: int) -> list[int]:
  """Processes below this one that run Python workers."""
  found = []
  for entry in Path("/proc").iterdir():
    if not entry.name.isdigit():
      continue
    try:
      parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
      command = (entry / "cmdline").read_bytes()
    except (OSError, IndexError):
      continue
    if parent == me and b"spawn_main" in command:
      found.append(int(entry.name))
  return found


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_loses_nothing(videos, expected, tmp_path):
  killed = []

  def kill_one():
    for _ in range(400):
      if list((tmp_path / "out").glob("light@*/_commit/*.json")):
        workers = pids_of_workers(tmp_path, os.getpid())
        if workers:
          os.kill(workers[0], signal.SIGKILL)
          killed.append(workers[0])
          return
      time.sleep(0.05)

  thread = threading.Thread(target=kill_one)
  thread.start()
  curate(slow(), videos, tmp_path / "out", Local(2))
  thread.join()
  assert killed
  assert without_versions(files(tmp_path / "out")).keys() == without_versions(expected).keys()
  found, wanted = without_versions(files(tmp_path / "out")), without_versions(expected)
  assert {n for n in wanted if found[n] != wanted[n]} <= {"selection.parquet/selection.parquet"}


def test_a_unit_that_always_kills_its_process_ends_the_run_with_a_sentence(videos, tmp_path):
  run, paths = running.create("small", small.recipe(), str(videos), str(tmp_path / "out"))

  class Dying(Local):
    def run(self, function, tasks):
      return super().run(die, tasks[:1])

  engine = Dying(1)
  with pytest.raises(UserError, match="lost their process 3 times"):
    running.score(run, paths, engine, limits=small.LIMITS)
  engine.close()


def test_a_fault_of_the_users_comes_through_as_its_sentence(videos, tmp_path):
  run, paths = running.create("small", small.recipe(), str(videos), str(tmp_path / "out"))

  class Failing(Local):
    def run(self, function, tasks):
      return super().run(fail, tasks)

  engine = Failing(1)
  with pytest.raises(UserError, match="cannot be done"):
    running.score(run, paths, engine, limits=small.LIMITS)
  engine.close()


def test_an_engine_that_is_not_there_is_named():
  with pytest.raises(UserError, match="must be one of local, ray, beam"):
    engines.make("spark", 1)


@pytest.mark.slow
def test_ray_writes_the_same_bytes_though_a_worker_is_killed(videos, expected, tmp_path):
  """A real cluster of three nodes on this machine, each with one worker; one is killed at work."""
  ray = pytest.importorskip("ray", reason="needs the extra: pip install mgen_jax[ray]")
  cluster_utils = pytest.importorskip("ray.cluster_utils")
  from data_pipelines.curate.engines.ray import _THREADS, Ray

  cluster = cluster_utils.Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False},
  )
  for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
  os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
  )
  workers: set[int] = set()
  killed: list[int] = []

  class Watched(Ray):
    """Kills the worker of the first result, while it is at its next unit."""

    def run(self, function, tasks):
      for done in super().run(function, tasks):
        workers.add(done.pid)
        if not killed:
          os.kill(done.pid, signal.SIGKILL)
          killed.append(done.pid)
        yield done

    def close(self):
      """Not after the first run: there is a second one."""

  try:
    engine = Watched(3, [cluster.address])
    curate(slow(), videos, tmp_path / "out", engine)
    with pytest.raises(UserError, match="cannot be done"):
      list(engine.run(fail, [types.SimpleNamespace(partition=number) for number in range(4)]))
    Ray.close(engine)
    # With a thread of the run left, Ray would end this process after its shutdown.
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(_THREADS)]
    with pytest.raises(RuntimeError, match="is closed"):
      list(engine.run(fail, [types.SimpleNamespace(partition=0)]))
  finally:
    ray.shutdown()
    cluster.shutdown()
  assert killed and len(workers) > 2  # more than one at once, or one in the place of the dead
  found, wanted = without_versions(files(tmp_path / "out")), without_versions(expected)
  assert found.keys() == wanted.keys()
  assert {n for n in wanted if found[n] != wanted[n]} <= {"selection.parquet/selection.parquet"}


@pytest.mark.slow
def test_beam_writes_the_same_bytes(videos, expected, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra: pip install mgen_jax[beam]")
  from data_pipelines.curate.engines.beam import Beam

  flags = ["--runner=DirectRunner", "--direct_running_mode=in_memory"]
  _, totals, _ = curate(small.recipe(), videos, tmp_path / "out", Beam(1, flags))
  assert totals["sources"] == 10
  assert files(tmp_path / "out") == expected
