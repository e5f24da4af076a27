"""The evaluate stage: its figures, its files and its page, for Marbles and for own clips."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags

from mgen_jax import evaluate
from mgen_jax.data import marbles, media
from mgen_jax.errors import UserError
from mgen_jax.workdir import Workdir
from tests import untrained


def evaluated(work: Workdir) -> Workdir:
  """Runs the stage, on one device: eight take longer to compile for."""
  devices = jax.local_devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda: devices)
    work.start("evaluate")
    evaluate.run(work, "evaluate")
  return work


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workdir:
  """A run of untrained models that was evaluated."""
  return evaluated(untrained.make(tmp_path_factory.mktemp("evaluated") / "run"))


@pytest.fixture(scope="module")
def figures(work) -> dict:
  return json.loads((work.root / "report.json").read_text())


def test_the_figures_that_docs_quote_are_there(work, figures):
  assert set(figures["seconds"]) == {*work.experiment.recipe, "total"}
  assert figures["seconds"]["t2v"] == 10.0
  assert figures["seconds"]["total"] == pytest.approx(
    sum(value for name, value in figures["seconds"].items() if name != "total")
  )
  assert set(figures["judge"]) >= {"colour", "shape", "direction", "all", "prompts"}
  assert figures["judge"]["prompts"] == work.experiment.stages["evaluate"].prompts
  assert all(0 < figures["chance"][name] < 1 for name in ("colour", "shape", "direction"))
  assert set(figures["reconstruction"]) >= {"psnr", "psnr_image", "psnr_odd_length", "ssim"}
  assert figures["reconstruction"]["psnr"] > 0 and figures["peak_memory_gib"] > 0


def test_every_target_says_whether_it_is_reached(figures):
  for key, target in figures["targets"].items():
    group, _, name = key.rpartition(".")
    value = figures[group][name] if group else figures[name]
    met = value >= target["at_least"] if "at_least" in target else value <= target["at_most"]
    assert target["reached"] == met
  assert not figures["targets"]["reconstruction.psnr"]["reached"]  # nothing was learned


def test_every_sample_is_a_video_with_its_verdict(work):
  stage = work.experiment.stages["evaluate"]
  text = (work.folder("evaluate") / "verdicts.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  prompts = marbles.evaluation_prompts(work.experiment.data.marbles.world, stage.prompts, 0)
  assert [line["prompt"] for line in lines] == [prompt.text for prompt in prompts]
  assert [line["seed"] for line in lines] == list(range(stage.prompts))
  for line, prompt in zip(lines, prompts, strict=True):
    frames = media.read_video(work.folder("evaluate") / line["file"])
    assert f"{len(frames)}x{frames.shape[1]}x{frames.shape[2]}" == stage.bucket
    assert line["wanted"]["colour"] == prompt.colour
    assert line["right"]["colour"] == (line["seen"]["colour"] == prompt.colour)


def test_the_figures_are_those_of_the_verdicts(work, figures):
  text = (work.folder("evaluate") / "verdicts.jsonl").read_text()
  rights = [json.loads(line)["right"] for line in text.splitlines()]
  for name in ("colour", "shape", "direction", "all"):
    counted = [right[name] for right in rights if right[name] is not None]
    assert figures["judge"][name] == pytest.approx(np.mean(counted), abs=1e-5)


def test_the_page_shows_some_samples_pairs_and_the_command(work):
  page = (work.root / "report.html").read_text()
  shown = work.experiment.stages["evaluate"].show
  assert page.count("<video") >= shown and page.count(">seed ") == shown
  assert "http:" not in page and "https:" not in page
  assert f"python -m mgen_jax.sample --workdir={work.root}" in page
  assert "1x32x32" in page and "an image" in page
  assert "motion that no training clip has" in page  # its world keeps some combinations


def test_the_stage_is_done_afterwards(work):
  assert work.is_done("evaluate")


def test_another_process_than_the_first_leaves_it_alone(work, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  before = (work.root / "report.json").stat().st_mtime_ns
  evaluate.run(work, "evaluate")
  assert (work.root / "report.json").stat().st_mtime_ns == before


def test_videos_of_the_user_have_no_judge(work, tmp_path, monkeypatch):
  nothing = dict.fromkeys(("psnr", "psnr_image", "psnr_odd_length", "ssim"), None)
  monkeypatch.setattr(evaluate, "reconstruct", lambda *arguments: (nothing, []))
  own = evaluated(untrained.make(tmp_path / "run", videos=str(work.root / "videos")))
  figures = json.loads((own.root / "report.json").read_text())
  assert figures["judge"] is None and figures["chance"] is None
  assert set(figures["targets"]) == {"peak_memory_gib"}  # what was not measured has none
  lines = (own.folder("evaluate") / "verdicts.jsonl").read_text().splitlines()
  captions = (work.root / "videos" / "captions.jsonl").read_text()
  assert lines and all(json.loads(line)["prompt"] in captions for line in lines)
  assert "There is no judge for your own videos" in (own.root / "report.html").read_text()


def test_a_model_without_condition_is_shown_and_looked_at(tmp_path, monkeypatch):
  nothing = dict.fromkeys(("psnr", "psnr_image", "psnr_odd_length", "ssim"), None)
  monkeypatch.setattr(evaluate, "reconstruct", lambda *arguments: (nothing, []))
  task = {
    "name": "latte",
    "model": {"layers": 2, "width": 16, "heads": 2, "in_channels": 4},
    "stride": (4, 8, 8),
    "sampler": {"method": "ddim", "num_steps": 2},
  }
  work = untrained.make(tmp_path / "run", task=task)
  targets = dataclasses.replace(work.experiment.stages["evaluate"].targets, of_world=0.8)
  work.experiment.stages["evaluate"] = dataclasses.replace(
    work.experiment.stages["evaluate"], targets=targets
  )
  evaluated(work)
  figures = json.loads((work.root / "report.json").read_text())
  lines = [json.loads(x) for x in (work.folder("evaluate") / "verdicts.jsonl").open()]
  world, words = work.experiment.data.marbles.world, ("colour", "shape", "direction")
  assert len(lines) == figures["samples"] == work.experiment.stages["evaluate"].prompts
  assert all(line["wanted"] == dict.fromkeys(words) for line in lines)
  assert figures["judge"]["colour"] is None and figures["judge"]["all"] is None
  known = [line["seen"]["direction"] in world.motions for line in lines]  # of noise: not all are
  assert figures["judge"]["of_world"] == pytest.approx(np.mean(known), abs=1e-5)
  assert figures["targets"]["judge.of_world"] == {"at_least": 0.8, "reached": np.mean(known) >= 0.8}
  page = (work.root / "report.html").read_text()
  assert "Videos from noise alone" in page and "The model is asked for nothing." in page
  assert f"python -m mgen_jax.sample --workdir={work.root} --samples=8" in page
  assert (work.folder("evaluate") / "samples" / "seed0.mp4").exists()


def test_the_command_repeats_it_with_another_sampler(work, monkeypatch, capsys):
  seen = []
  monkeypatch.setattr(evaluate, "run", lambda *arguments: seen.append(arguments))
  values = flags.FlagValues()
  evaluate.define_flags(values)
  values(["evaluate", f"--workdir={work.root}", "--num_steps=3", "--guidance=1"])
  evaluate.main([], values)
  ((run, name, sampler),) = seen
  assert (run.root, name) == (work.root, "evaluate")
  configured = work.experiment.stages["t2v"].task.sampler
  assert sampler == dataclasses.replace(configured, num_steps=3, guidance=1.0)
  assert capsys.readouterr().out.strip() == str(work.root / "report.html")


@pytest.mark.parametrize("name", ["t2v", "evaluat"])
def test_a_stage_that_evaluates_nothing_is_refused(work, name):
  values = flags.FlagValues()
  evaluate.define_flags(values)
  values(["evaluate", f"--workdir={work.root}", f"--stage={name}"])
  with pytest.raises(UserError, match=f"--stage={name} is not an evaluate stage"):
    evaluate.main([], values)


@pytest.mark.parametrize(
  ("stride", "frames", "length"),
  [(8, 16, 13), (4, 16, 9), (5, 16, 6), (4, 8, 5), (8, 8, 7), (16, 16, 15), (1, 16, None)],
)
def test_the_odd_length_is_no_multiple_of_the_stride(stride, frames, length):
  assert evaluate._odd_length(stride, frames) == length
