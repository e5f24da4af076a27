"""What every test stands on: 8 simulated CPU devices, whatever the machine and the folder.

It runs before any test module is imported, and so before jax looks for devices.
"""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent

DEVICES = "--xla_force_host_platform_device_count"

os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# Tests may name files of the project relative to its root, and start `python -m mgen_jax...`.
os.chdir(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(
  [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
