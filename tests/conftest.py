"""What every test stands on: 8 simulated CPU devices, whatever the machine and the folder.

It runs before any test module is imported, and so before jax looks for devices.
"""

import os
import pathlib
import shutil
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

DEVICES = "--xla_force_host_platform_device_count"

os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# A program is compiled once for all tests and the processes that they start, then forgotten. Worker
# processes of pytest find the folder set; so does who wants to keep it from one run to the next.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.mkdtemp(prefix="mgen_jax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_unconfigure():
  if _COMPILED:
    shutil.rmtree(_COMPILED, ignore_errors=True)


# Tests may name files of the project relative to its root, and start `python -m mgen_jax...`.
os.chdir(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(
  [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
