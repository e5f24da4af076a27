"""Where compiled programs are kept, and that "auto" keeps none where that is not safe."""

import jax
import pytest

from mgen_jax import compilation_cache
from mgen_jax.errors import UserError


def test_the_folder_is_that_of_the_run_but_on_a_cpu(monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  assert compilation_cache.choose("auto", "runs/a", "tpu") == "runs/a/compiled"
  assert compilation_cache.choose("auto", "runs/a", "cpu") is None
  assert compilation_cache.choose("off", "runs/a", "tpu") is None
  assert compilation_cache.choose("kept", "runs/a", "cpu") == "kept"


def test_jaxs_own_variable_goes_first(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  assert compilation_cache.choose("auto", "runs/a", "gpu") is None


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  before = jax.config.jax_compilation_cache_dir
  with pytest.raises(UserError, match=r"--compilation_cache=.*cannot be made"):
    compilation_cache.enable(f"{tmp_path}/file/below")
  assert jax.config.jax_compilation_cache_dir == before
