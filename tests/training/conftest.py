"""The programs of the toy are small, and compiled over and over: here all of them are kept."""

import os

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def keep_every_program():
  name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"  # for the processes that a test starts
  before, os.environ[name] = os.environ.get(name), "0"
  limit = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  yield
  jax.config.update("jax_persistent_cache_min_compile_time_secs", limit)
  if before is not None:
    os.environ[name] = before
