"""The reconstruct stage and its films, on autoencoders that are not trained."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mgen_jax import config, reconstruct, schema
from mgen_jax.data import media
from mgen_jax.errors import ConfigError, UserError
from mgen_jax.models.tiling import TilingConfig
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training import runner
from mgen_jax.workdir import Workdir
from tests import untrained


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  work = untrained.make(tmp_path_factory.mktemp("reconstruct") / "run", clips=48)
  stage = config.ReconstructStage(autoencoders=("autoencoder",), buckets=("4x32x32", "1x32x32"))
  experiment = work.experiment
  stages = {**experiment.stages, "reconstruct": stage}
  recipe = (*experiment.recipe, "reconstruct")
  return Workdir(work.root, dataclasses.replace(experiment, stages=stages, recipe=recipe))


def test_the_table_has_every_measure_and_a_picture_beside(work, capsys):
  work.start("reconstruct")
  reconstruct.run(work, "reconstruct")
  folder = work.folder("reconstruct")
  made = json.loads((folder / reconstruct.REPORT_JSON).read_text())["autoencoders"]["autoencoder"]
  clip, image = made["buckets"]["4x32x32"], made["buckets"]["1x32x32"]
  for values in (clip, image):
    assert all(np.isfinite(values[key]) for key in ("psnr", "ssim", "rfid", "spot", "gflops"))
    assert values["lpips"] is None and values["spot"] > 1
  assert clip["rfvd"] > 0 and image["rfvd"] is None
  assert made["parameters"] > 1000
  assert media.read_image(folder / reconstruct.REPORT_PNG).shape[2] == 3
  assert "autoencoder" in capsys.readouterr().out
  assert work.is_done("reconstruct")


def test_measures_of_a_copy_are_perfect():
  clips = np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32, 3), np.uint8)
  values = reconstruct.compare(clips, clips, lambda a, b: np.zeros(len(a)))
  assert values["psnr"] == 100 and values["ssim"] == pytest.approx(1.0)
  assert values["rfid"] == pytest.approx(0, abs=1e-6) and values["lpips"] == 0


def test_ssim_and_psnr_are_scikit_images():
  metrics = pytest.importorskip("skimage.metrics")
  rng = np.random.default_rng(0)
  a = rng.integers(0, 256, (1, 1, 24, 20, 3), np.uint8)
  b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
  found = reconstruct.compare(np.concatenate([a, a]), np.concatenate([b, b]))
  ssim = metrics.structural_similarity(a[0, 0], b[0, 0], data_range=255, channel_axis=-1)
  psnr = metrics.peak_signal_noise_ratio(a[0, 0], b[0, 0], data_range=255)
  assert found["ssim"] == pytest.approx(ssim, rel=1e-9)
  assert found["psnr"] == pytest.approx(psnr, rel=1e-9)


def test_a_film_comes_back_with_its_length_and_size(work, tmp_path):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  with mesh_lib.use(mesh):
    task, params, _ = runner.load_trained(work, "autoencoder", mesh)
  rng = np.random.default_rng(0)
  media.write_video(tmp_path / "in.mp4", rng.integers(0, 256, (45, 34, 46, 3), np.uint8), 12.0)
  rest = (str(tmp_path / "in.mp4"), str(tmp_path / "out.mp4"), TilingConfig(frames=16, overlap=8))
  assert reconstruct.film(task, params, mesh, *rest, "pad") == 45
  info = media.probe(tmp_path / "out.mp4")
  assert (info.frames, info.height, info.width, info.fps) == (45, 34, 46, 12.0)
  with pytest.raises(UserError, match=r"is 46x34 and .* strides are 8x8: --fit=pad"):
    reconstruct.film(task, params, mesh, *rest)
  chunks = list(media.stream_video(tmp_path / "in.mp4", 10))
  assert [len(chunk) for chunk in chunks] == [10, 10, 10, 10, 5]
  np.testing.assert_array_equal(np.concatenate(chunks), media.read_video(tmp_path / "in.mp4"))


def test_a_stage_that_cannot_be_measured_is_refused(work):
  plain = schema.to_plain(work.experiment)
  for wrong, words in (
    ({"autoencoders": ()}, "must name one or more"),
    ({"autoencoders": ("t2v",)}, "which trains text_to_video"),
    ({"buckets": ("4x30x32",)}, "height 30 is not divisible"),
  ):
    stages = {**plain["stages"], "reconstruct": {**plain["stages"]["reconstruct"], **wrong}}
    with pytest.raises(ConfigError, match=words):
      config.resolve({**plain, "stages": stages})
