"""From a prompt to files: the same seed gives the same video, and every fault is one sentence."""

import copy
import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from mgen_jax import generator as generator_lib
from mgen_jax import sample
from mgen_jax.data import media
from mgen_jax.data.buckets import Bucket
from mgen_jax.data.prompts import Prompt
from mgen_jax.errors import UserError
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.tasks.text_to_video import SamplerConfig
from mgen_jax.workdir import Workdir
from tests import untrained

PROMPTS = ["a small red circle moves left", "a large blue star", "", "x" * 200, "a green cross"]
SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workdir:
  return untrained.make(tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def generator(work) -> generator_lib.Generator:
  return generator_lib.Generator.load(work, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def bucket(generator) -> Bucket:
  return generator_lib.choose_bucket(generator.trained)


@pytest.fixture(scope="module")
def videos(generator, bucket) -> np.ndarray:
  return generator.generate(PROMPTS, bucket, SEEDS, batch=4)


def parse(*arguments: str) -> flags.FlagValues:
  values = flags.FlagValues()
  sample.define_flags(values)
  values(["sample", *arguments])
  return values


@pytest.fixture
def command(work, generator, monkeypatch):
  """Runs the command in this process, with the generator that is loaded and compiled."""
  load = generator_lib.Generator.load

  def loaded(run, stage=None, mesh=None):
    return load(run, stage, mesh=mesh) if stage or run.root != work.root else generator

  monkeypatch.setattr(generator_lib.Generator, "load", loaded)
  return lambda *arguments: sample.main([], parse(*arguments))


def difference(a: np.ndarray, b: np.ndarray) -> int:
  return int(np.abs(a.astype(int) - b.astype(int)).max())


# The generator.


def test_a_video_has_the_shape_of_its_bucket(videos, bucket):
  assert videos.dtype == np.uint8
  assert videos.shape == (5, bucket.frames, bucket.height, bucket.width, 3)


def test_a_video_is_the_same_wherever_it_stands_in_a_batch(generator, bucket, videos):
  turned = generator.generate(PROMPTS[::-1], bucket, SEEDS[::-1], batch=4)
  np.testing.assert_array_equal(turned[::-1], videos)
  alone = generator.generate(PROMPTS[1:2], bucket, SEEDS[1:2], batch=4)
  np.testing.assert_array_equal(alone, videos[1:2])


def test_a_video_is_the_same_in_a_batch_of_another_size(generator, bucket, videos):
  alone = generator.generate(PROMPTS[:1], bucket, SEEDS[:1])
  assert difference(alone[0], videos[0]) <= 1  # another program rounds in another order


def test_a_video_is_the_same_on_eight_devices(work, bucket, videos):
  wide = generator_lib.Generator.load(work, devices=jax.devices()[:8])
  assert difference(wide.generate(PROMPTS, bucket, SEEDS), videos) <= 1


def test_a_video_is_the_same_with_its_guidance_split_over_the_devices(work, bucket, videos):
  stage = work.experiment.stages["t2v"]
  sampler = dataclasses.replace(stage.task.sampler, guidance_split="mesh")
  stage = dataclasses.replace(stage, task=dataclasses.replace(stage.task, sampler=sampler))
  stages = {**work.experiment.stages, "t2v": stage}
  split = Workdir(work.root, dataclasses.replace(work.experiment, stages=stages))
  wide = generator_lib.Generator.load(split, devices=jax.devices()[:8])
  assert wide.mesh.shape["replica"] == 2
  assert difference(wide.generate(PROMPTS, bucket, SEEDS), videos) <= 1


def test_a_video_is_the_same_with_its_tokens_split_over_the_devices(work, bucket, videos):
  mesh = MeshConfig(context=2, tensor=2)
  wide = generator_lib.Generator.load(work, devices=jax.devices()[:8], mesh=mesh)
  assert wide.mesh.shape["fsdp"] == 2
  assert difference(wide.generate(PROMPTS, bucket, SEEDS), videos) <= 1


def test_seed_prompt_and_guidance_each_make_another_video(generator, bucket, videos):
  steps = generator.task.config.sampler
  for prompt, seed, sampler in (
    (PROMPTS[0], SEEDS[0] + 1, steps),
    (PROMPTS[1], SEEDS[0], steps),
    (PROMPTS[0], SEEDS[0], dataclasses.replace(steps, guidance=5.0)),
  ):
    other = generator.generate([prompt], bucket, [seed], sampler, batch=4)
    assert difference(other[0], videos[0]) > 1


def test_a_prompt_is_read_up_to_the_length_of_the_text_encoder(generator, bucket, videos):
  longer = generator.generate(["x" * 300], bucket, SEEDS[3:4], batch=4)
  np.testing.assert_array_equal(longer[0], videos[3])


def test_progress_counts_the_videos(generator, bucket):
  seen = []
  generator.generate(PROMPTS, bucket, SEEDS, batch=4, progress=lambda *n: seen.append(n))
  assert seen == [(4, 5), (5, 5)]


class Ones:
  """A task whose latents are all 1, and an autoencoder that shows latents as they are."""

  def __init__(self, task):
    self.config, self._shape = task.config, task.config.latent_shape

  def sample(self, params, batch, keys, bucket, sampler):
    del params, keys, sampler
    return jax.numpy.ones((len(batch["tokens"]), *self._shape(bucket)))

  def decode(self, params, latents, frames):
    del params, frames
    return latents


def test_latents_are_scaled_back_before_they_are_decoded(generator, bucket):
  other = copy.copy(generator)
  other._programs = {}
  other.task = other.autoencoder = Ones(other.task)
  latents = other.generate(["x"], bucket, [0])
  expected = np.add(untrained.LATENTS["mean"], untrained.LATENTS["std"])
  np.testing.assert_allclose(latents, np.broadcast_to(expected, latents.shape), rtol=1e-6)


def test_samples_that_are_not_finite_are_an_error_that_says_so(generator, bucket):
  broken = copy.copy(generator)
  broken.params = jax.tree.map(lambda leaf: leaf * np.nan, broken.params)
  with pytest.raises(UserError, match="not finite: lower --guidance"):
    broken.generate(["x"], bucket, [0])


def test_the_last_trained_stage_is_read_unless_another_is_named(work):
  assert generator_lib.Generator.load(work).stage == "t2v"
  assert generator_lib.Generator.load(work, "t2i").stage == "t2i"
  with pytest.raises(UserError, match='did you mean "t2v"'):
    generator_lib.Generator.load(work, "t2w")
  with pytest.raises(UserError, match="--stage=autoencoder is not a stage"):
    generator_lib.Generator.load(work, "autoencoder")


def test_the_frame_rate_is_that_of_the_data(work):
  assert generator_lib.frame_rate(work, "t2v") == work.experiment.data.marbles.fps
  data = dataclasses.replace(work.experiment.data, videos="anywhere")
  own = Workdir(work.root, dataclasses.replace(work.experiment, data=data))
  # As its clips say.
  assert generator_lib.frame_rate(own, "t2v") == work.experiment.data.marbles.fps
  data = dataclasses.replace(data, fps=24.0)
  own = Workdir(work.root, dataclasses.replace(own.experiment, data=data))
  assert generator_lib.frame_rate(own, "t2v") == 24


# Which shape.

TRAINED = {
  Bucket(1, 64, 64): 9.0,
  Bucket(16, 64, 64): 1.0,
  Bucket(16, 48, 80): 2.0,
  Bucket(24, 64, 64): 1.0,
}


@pytest.mark.parametrize(
  ("frames", "aspect", "name"),
  [
    (None, None, "16x48x80"),  # trained most, among videos
    (None, "1:1", "24x64x64"),  # as much as the other: the longer
    (16, "64:64", "16x64x64"),
    (1, None, "1x64x64"),
    (None, "1.66:1", "16x48x80"),  # near enough
    (24, None, "24x64x64"),
  ],
)
def test_a_shape_is_chosen_by_length_and_aspect(frames, aspect, name):
  assert generator_lib.choose_bucket(TRAINED, frames, aspect).name == name


@pytest.mark.parametrize(
  ("frames", "aspect", "message"),
  [
    (20, None, "--frames=20 is not a length .* the nearest is --frames=16"),
    (None, "2:1", "--aspect=2:1 is not a shape .* the nearest is --aspect=5:3"),
    (24, "5:3", "--aspect=5:3 with --frames=24 .* the nearest is --aspect=1:1"),
    (None, "wide", "--aspect=wide is not width:height"),
    (None, "0:1", "--aspect=0:1 is not width:height"),
  ],
)
def test_a_shape_that_was_not_trained_is_refused_with_the_nearest(frames, aspect, message):
  with pytest.raises(UserError, match=message):
    generator_lib.choose_bucket(TRAINED, frames, aspect)


# The files.


def test_the_command_writes_a_video_and_a_contact_sheet(command, work, bucket, tmp_path, capsys):
  arguments = (f"--workdir={work.root}", f"--prompt={PROMPTS[0]}", "--seed=11")
  command(*arguments, f"--out={tmp_path}")
  paths = capsys.readouterr().out.split()
  stem = f"{tmp_path}/seed11_a-small-red-circle-moves-left"
  assert paths == [f"{stem}.mp4", f"{stem}_sheet.png"]
  info = media.probe(paths[0])
  assert (info.codec, info.frames, info.fps) == ("h264", bucket.frames, 8.0)
  assert media.read_image(paths[1]).shape[1] > 8 * bucket.width
  before = (tmp_path / paths[0]).read_bytes()
  command(*arguments, f"--out={tmp_path}/again")
  again = tmp_path / "again" / "seed11_a-small-red-circle-moves-left.mp4"
  assert again.read_bytes() == before  # same seed, same video


def test_the_command_draws_images_several_prompts_and_seeds(command, work, tmp_path, capsys):
  (tmp_path / "prompts.txt").write_text("a red star\n\n  a blue cross \n")
  command(
    f"--workdir={work.root}", "--prompt=", f"--prompts_file={tmp_path}/prompts.txt", "--samples=2",
    "--frames=1", "--sampler=heun", "--num_steps=2", "--guidance=0", f"--out={tmp_path}",
  )  # fmt: skip
  written = sorted(path.name for path in tmp_path.glob("*.png"))
  assert len(capsys.readouterr().out.split()) == len(written) == 7
  assert "seed0_a-red-star.png" in written and "seed1_a-blue-cross.png" in written


def test_files_go_to_the_workdir_unless_told_otherwise(command, work):
  command(f"--workdir={work.root}", "--prompt=a red star")
  assert (work.root / "samples" / "seed0_a-red-star.mp4").exists()


def test_names_of_files_are_plain_and_differ_where_prompts_do():
  hard = [
    "../../etc/passwd",
    "a/b",
    "a b",
    "A b",
    "a  b",
    "",
    "円が動く",
    "赤",
    "\0",
    "x" * 5000,
    "é",
  ]
  names = [sample.file_stem(prompt, 3) for prompt in hard]
  assert names[hard.index("")] == "seed3"
  assert len(set(names)) == len(names)
  for name in names:
    assert re.match("seed3(_|$)", name) and len(name) < 130
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")


def test_a_long_prompt_is_cut_with_a_warning(command, work, tmp_path, caplog):
  command(f"--workdir={work.root}", f"--prompt={'a red circle ' * 40}", f"--out={tmp_path}")
  assert "reads the first 63 bytes" in caplog.text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--prompt=x", "--num_steps=0"], "--num_steps=0 is too few"),
    (["--prompt=x", "--num_steps=-3"], "--num_steps=-3 is too few"),
    (["--prompt=x", "--guidance=nan"], "--guidance=nan cannot be used"),
    (["--prompt=x", "--guidance=-1"], "--guidance=-1.0 cannot be used"),
    (["--prompt=x", "--fps=nan"], "--fps=nan cannot be used"),
    (["--class=cat"], "--class=cat is of a model of classes"),
    (["--prompt=x", "--samples=0"], "--samples=0 is too few"),
    (["--prompt=x", "--seed=-1"], "--seed=-1 cannot be used"),
    (["--prompt=x", "--seed=9999999999"], "--seed=9999999999 cannot be used"),
    (["--prompt=x", "--frames=5000"], "--frames=5000 is not a length"),
    (["--prompt=x", "--aspect=21:9"], "--aspect=21:9 is not a shape"),
    (["--prompt=x", "--aspect=square"], "--aspect=square is not width:height"),
    (["--prompt=x", "--camera=zoom inn"], "--camera=zoom inn .*: did you mean zoom in"),
    (["--prompt=x", "--camera=pan left"], "--camera=pan left is of models that read features"),
    (["--prompt=x", "--camera=pan left", "--frames=1"], "--camera=pan left is of videos"),
    (["--prompt=x", "--stage=nope"], "--stage=nope is not a stage"),
    (["--prompts_file=/no/such/file"], "--prompts_file=/no/such/file cannot be read"),
    ([], "no prompt is given"),
  ],
)
def test_bad_input_is_one_sentence(command, work, arguments, message):
  with pytest.raises(UserError, match=message) as caught:
    command(f"--workdir={work.root}", *arguments)
  assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_drawn(
  command, work, generator, tmp_path, monkeypatch
):
  monkeypatch.setattr(generator, "generate", lambda *_, **__: pytest.fail("it was drawn"))
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--out=\S*file cannot be made"):
    command("--prompt=x", f"--workdir={work.root}", f"--out={tmp_path}/file")


def test_a_prompt_that_is_not_utf8_is_drawn(generator):
  broken = b"a circle \xff".decode(errors="surrogateescape")
  assert generator.task.too_long(Prompt(broken)) == []
  drawn, meant = generator.task.tokenize([broken, "a circle ?"])
  np.testing.assert_array_equal(drawn, meant)


def test_a_folder_that_is_no_run_is_refused(command, tmp_path):
  for arguments, message in (
    ((), "--workdir is missing"),
    ((f"--workdir={tmp_path}",), "does not exist: name the --workdir of a run"),
  ):
    with pytest.raises(UserError, match=message):
      command("--prompt=x", *arguments)


def test_a_run_that_has_trained_nothing_says_so(command, work, tmp_path):
  (tmp_path / "config.json").write_text((work.root / "config.json").read_text())
  with pytest.raises(UserError, match="no finished stage that trains latte or text_to_video"):
    command("--prompt=x", f"--workdir={tmp_path}")


def test_the_order_of_steps_follows_the_config_unless_flags_say_otherwise():
  values = parse("--num_steps=300", "--sampler=midpoint")
  made = sample.sampler_from_flags(values, SamplerConfig(guidance=2.0))
  assert made == SamplerConfig(method="midpoint", num_steps=300, linear_steps=300, guidance=2.0)


def test_a_fault_ends_the_command_with_a_sentence_and_code_2(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "mgen_jax.sample", f"--workdir={tmp_path}", "--prompt=x"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert json.dumps(str(tmp_path))[1:-1] in done.stderr
