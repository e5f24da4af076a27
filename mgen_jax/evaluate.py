"""Measures what a run has learned, and writes its report.

  python -m mgen_jax.evaluate --workdir=runs/quickstart
  python -m mgen_jax.evaluate --workdir=runs/quickstart --num_steps=10 --guidance=3

The evaluate stage of an experiment, and the command that repeats it on what is trained: held-out
clips go through the autoencoder and back, held-out prompts are sampled, and where the videos are
Marbles, their judge looks at the samples.

  WORKDIR/report.json, WORKDIR/report.html     the figures, and all of it to look at
  WORKDIR/STAGE/report.json                    the figures once more, of this stage
  WORKDIR/STAGE/samples/*.mp4, verdicts.jsonl  every sample, and what was seen in it
"""

import collections
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from mgen_jax import cli, sample, schema
from mgen_jax import config as config_lib
from mgen_jax.data import files, ingest, marbles
from mgen_jax.data import sources as sources_lib
from mgen_jax.data.buckets import Bucket, parse_bucket
from mgen_jax.errors import UserError, suggest
from mgen_jax.evaluation import alignment, reconstruction, report
from mgen_jax.generator import AnySampler, Generator, choose_bucket
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.training import metrics
from mgen_jax.workdir import Workdir

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

# Figure -> the key of `TargetsConfig` that bounds it, and from which side.
TARGETS = {
  "judge.colour": ("colour", "at_least"),
  "judge.shape": ("shape", "at_least"),
  "judge.direction": ("direction", "at_least"),
  "judge.of_world": ("of_world", "at_least"),
  "reconstruction.psnr": ("psnr", "at_least"),
  "reconstruction.psnr_image": ("psnr", "at_least"),
  "reconstruction.psnr_odd_length": ("psnr", "at_least"),
  "seconds.total": ("seconds", "at_most"),
  "peak_memory_gib": ("peak_memory_gib", "at_most"),
}

_PAIRS = 3  # shown of each kind
_PACKAGES = ("mgen_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def run(work: Workdir, name: str, sampler: AnySampler | None = None) -> None:
  """Runs the evaluate stage `name`; process 0 does, with its own devices.

  Args:
    work: of the run; the stages before are done.
    name: of the stage.
    sampler: in place of the one that the generator's stage has in its config.

  Raises:
    UserError: something that an earlier stage left cannot be used.
  """
  began = time.perf_counter()
  stage = work.experiment.stages[name]
  generator = Generator.load(work, stage.generator)  # by all: checkpoints are read together
  if jax.process_index() != 0:
    return
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment, name)))
  logging.info("reconstructing up to %d held-out clips", stage.clips)
  rebuilt, pairs = reconstruct(work, stage, generator, index)
  sampler = generator.task.config.sampler if sampler is None else sampler
  samples, verdicts, drawn = _sample(work, name, generator, index, sampler)

  data = config_lib.data_of(work.experiment, name)
  judged = None if data.videos else _judged(generator, verdicts, data.marbles.world)
  figures = {
    "experiment": work.experiment.name,
    "seconds": _seconds(work, name, time.perf_counter() - began),
    "judge": judged,
    "chance": judged and alignment.chance(data.marbles.world),
    "reconstruction": rebuilt,
    "peak_memory_gib": round(_peak_memory(work), 3),
    "generator": stage.generator,
    "bucket": _trained_bucket(generator, stage.bucket).name,
    "samples": drawn,
    "sampler": schema.to_plain(sampler),
    "versions": dict(_versions()),
  }
  figures["targets"] = check_targets(figures, work.experiment.stages[name].targets)
  text = json.dumps(_rounded(figures), indent=2) + "\n"
  files.write_text_atomic(work.root / REPORT_JSON, text)
  files.write_text_atomic(work.folder(name) / REPORT_JSON, text)  # of several such stages, each one
  command = _command(work, generator, samples[0].prompt)
  content = _content(work, name, figures, samples, pairs, index, command)
  report.write(work.root / REPORT_HTML, content)
  work.finish(name, time.perf_counter() - began, samples=drawn)

  for figure in content.figures:
    beside = figure.note
    if figure.reached is not None:
      beside = f"{'reached' if figure.reached else 'missed'}: {figure.target}"
    logging.info("%s: %s%s", figure.name, figure.value, f" ({beside})" if beside else "")
  logging.info("figures: %s", work.root / REPORT_JSON)
  logging.info("all to look at: %s", (work.root / REPORT_HTML).absolute())
  logging.info("make your own: %s", command)


# --------------------------------------------------------------------------------------------------
# Reconstruction.


def reconstruct(
  work: Workdir, stage: config_lib.EvaluateStage, generator: Generator, index: ingest.Index
) -> tuple[dict[str, float | int | None], list[report.Pair]]:
  """Held-out clips through the autoencoder and back, from the mean of their latents.

  Returns:
    {"psnr", "ssim": mean over clips, "psnr_image": of one frame of each (or of held-out images),
    "psnr_odd_length": of a number of frames that its stride in time does not divide, "clips": how
    many}; None where no held-out clip is of that kind. And a few pairs to look at.
  """
  values: dict[str, list[float]] = collections.defaultdict(list)
  pairs: dict[str, list[report.Pair]] = collections.defaultdict(list)
  compiled = jax.jit(
    lambda params, video: generator.autoencoder.sample(
      params, {"video": video}, None, Bucket(*video.shape[1:4])
    )
  )
  stride = generator.autoencoder.config.model.time_stride
  first = None  # other lengths are tried on the clips of one bucket: each is one more program
  for bucket, clips, fps in _held_out_clips(work, stage, index):
    first = bucket if first is None and not bucket.is_image else first
    cuts = {"psnr_image" if bucket.is_image else "psnr": clips}
    if bucket == first:
      middle = bucket.frames // 2
      cuts["psnr_image"] = clips[:, middle : middle + 1]
      if odd := _odd_length(stride, bucket.frames):
        cuts["psnr_odd_length"] = clips[:, :odd]
    for kind, cut in cuts.items():
      made = _on_devices(compiled, generator, cut)
      decibel = reconstruction.psnr(cut, made)
      values[kind] += decibel.tolist()
      if kind == "psnr":
        values["ssim"] += reconstruction.ssim(cut, made).tolist()
      for row in range(min(len(cut), _PAIRS - len(pairs[kind]))):
        title = "an image" if cut.shape[1] == 1 else f"{cut.shape[1]} frames"
        both = report.medium(report.beside(cut[row], made[row]), fps)
        pairs[kind].append(report.Pair(title, f"{decibel[row]:.1f} dB", both))
  kinds = ("psnr", "psnr_image", "psnr_odd_length", "ssim")
  means = {kind: float(np.mean(values[kind])) if values[kind] else None for kind in kinds}
  return {**means, "clips": len(values["psnr"])}, list(itertools.chain(*pairs.values()))


def _held_out_clips(
  work: Workdir, stage: config_lib.EvaluateStage, index: ingest.Index
) -> Iterator[tuple[Bucket, np.ndarray, float]]:
  """(bucket, clips uint8 [n, T, H, W, 3], fps): up to `stage.clips`, shared among the buckets."""
  data = config_lib.data_of(work.experiment, stage.generator)
  encode = work.experiment.stages[config_lib.latents_of(work.experiment, stage.generator)]
  sources, _ = sources_lib.media_sources(
    index,
    [parse_bucket(text) for text in encode.buckets],
    split="held_out",
    fps=data.rate,
    max_crop=data.max_crop,
  )
  sources = {bucket: source for bucket, source in sources.items() if len(source)}
  for bucket in sorted(sources, key=lambda bucket: (-len(sources[bucket]), bucket)):
    source = sources[bucket]
    count = min(len(source), max(1, stage.clips // len(sources)))
    batch = min(count, stage.batch)
    for start in range(0, count - count % batch, batch):  # whole batches: one program for all
      examples = [source.example(row, None) for row in range(start, start + batch)]
      yield bucket, np.stack([e["video"] for e in examples]), examples[0]["fps"] or 1.0


def _odd_length(stride: int, frames: int) -> int | None:
  """A length up to `frames` that the stride does not divide: a few more than one stride, if any."""
  lengths = (n for n in (stride + 5, stride + 1, frames - 1) if 1 < n <= frames and n % stride)
  return next(lengths, None)


def _on_devices(compiled: Any, generator: Generator, clips: np.ndarray) -> np.ndarray:
  """`compiled` on a batch, filled up so that the devices divide it."""
  mesh, count = generator.mesh, len(clips)
  clips = np.pad(clips, [(0, -count % mesh_lib.batch_shards(mesh))] + [(0, 0)] * 4, mode="edge")
  with mesh_lib.use(mesh):
    axes = ("batch", None, None, None, None)
    clips = jax.device_put(clips, rules.sharding(mesh, axes))
    return jax.device_get(compiled(generator.autoencoder_params, clips))[:count]


# --------------------------------------------------------------------------------------------------
# Samples.


def _sample(
  work: Workdir, name: str, generator: Generator, index: ingest.Index, sampler: AnySampler
) -> tuple[list[report.Sample], list[alignment.Verdict], int]:
  """Samples, judges (Marbles only) and writes.

  Returns:
    What the report shows, all verdicts, and how many samples were drawn.
  """
  stage, data = work.experiment.stages[name], config_lib.data_of(work.experiment, name)
  prompts: Sequence[marbles.Prompt | None]
  if generator.unconditional:
    texts, prompts = [""] * stage.prompts, [None] * stage.prompts
  elif data.videos is None:
    prompts = marbles.evaluation_prompts(data.marbles.world, stage.prompts, work.experiment.seed)
    texts = [prompt.text for prompt in prompts]
  else:
    captions = (clip.caption for clip in index.of_split("held_out"))
    texts = list(itertools.islice(dict.fromkeys(captions), stage.prompts))
    prompts = [None] * len(texts)
  if not texts:
    raise UserError(
      f"none of the {len(index.clips)} clips is held out, so {name} has no caption to sample: "
      f"raise config.data.held_out, which is {data.held_out:g}."
    )
  folder = work.folder(name) / "samples"
  folder.mkdir(parents=True, exist_ok=True)
  bucket = _trained_bucket(generator, stage.bucket)
  logging.info("drawing %d samples, %d steps each", len(texts), sampler.num_steps)
  samples, verdicts, lines = [], [], []
  for start in range(0, len(texts), stage.batch):
    rows = range(start, min(start + stage.batch, len(texts)))
    chosen = [texts[row] for row in rows]
    seeds = [(work.experiment.seed + row) % 2**31 for row in rows]
    videos = generator.generate(chosen, bucket, seeds, sampler, batch=stage.batch)
    for row, seed, video in zip(rows, seeds, videos, strict=True):
      path = sample.write_sample(folder, video, texts[row], seed, generator.fps)
      line = {"prompt": texts[row], "seed": seed, "file": f"samples/{path.name}"}
      checks: tuple = ()
      if data.videos is None:
        verdict = alignment.judge_video(video, prompts[row], data.marbles.world)
        verdicts.append(verdict)
        line |= verdict.to_json()
        checks = tuple((c.attribute, c.wanted, c.seen, c.right) for c in verdict.checks)
      lines.append(json.dumps(line) + "\n")
      if len(samples) < max(1, stage.show):
        medium = report.medium(video, generator.fps)
        samples.append(report.Sample(texts[row], seed, medium, checks))
    logging.info("drew %d of %d", rows.stop, len(texts))
  files.write_text_atomic(work.folder(name) / "verdicts.jsonl", "".join(lines))
  return samples, verdicts, len(texts)


def _trained_bucket(generator: Generator, wanted: str) -> Bucket:
  """The bucket that the stage names, or another where a user's videos left it without examples."""
  if parse_bucket(wanted) in generator.trained:
    return parse_bucket(wanted)
  bucket = choose_bucket(generator.trained)
  logging.warning("no clip fitted bucket %s: samples are of %s", wanted, bucket.name)
  return bucket


# --------------------------------------------------------------------------------------------------
# Figures.


def _judged(
  generator: Generator, verdicts: Sequence[alignment.Verdict], world: marbles.WorldConfig
) -> dict[str, Any]:
  """Accuracies; of a model that is asked for nothing, how often an object is seen at all."""
  made = alignment.accuracies(verdicts)
  if generator.unconditional:
    share, count = alignment.of_world(verdicts, world), len(verdicts)
    made["of_world"] = share
    made["interval"]["of_world"] = alignment.wilson(round(share * count), count)
  return made


def check_targets(
  figures: Mapping[str, Any], targets: config_lib.TargetsConfig
) -> dict[str, dict[str, Any]]:
  """Each target with its bound and whether it is reached; without those that were not measured."""
  bounds, out = dataclasses.asdict(targets), {}
  for key, (name, kind) in TARGETS.items():
    value, bound = _lookup(figures, key), bounds[name]
    if value is not None and bound is not None:
      reached = value >= bound if kind == "at_least" else value <= bound
      out[key] = {kind: bound, "reached": reached}
  return out


def _lookup(figures: Mapping[str, Any], key: str) -> float | None:
  value: Any = figures
  for part in key.split("."):
    value = value.get(part) if value is not None else None
  return value


def _rounded(value: Any) -> Any:
  """Plain values with numbers of five digits after the point."""
  if isinstance(value, Mapping):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  return round(value, 5) if isinstance(value, float) else value


def _seconds(work: Workdir, name: str, own: float) -> dict[str, float]:
  """Of every stage that is done, of this one so far, and in total."""
  seconds = {}
  for other in work.experiment.recipe:
    done = work.done_record(other)
    if other == name:
      seconds[other] = round(own, 1)
    elif done is not None:
      seconds[other] = done["seconds"]
  return {**seconds, "total": round(sum(seconds.values()), 1)}


def _peak_memory(work: Workdir) -> float:
  """GiB, of the process or device that had most in any stage."""
  lines = itertools.chain(*(metrics.read(str(work.folder(n))) for n in work.experiment.recipe))
  return max([metrics.peak_memory_gib(), *(line.get("peak_memory_gib") or 0.0 for line in lines)])


def _versions() -> list[tuple[str, str]]:
  found = [("python", platform.python_version())]
  for package in _PACKAGES:
    try:
      found.append((package, importlib.metadata.version(package)))
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
      continue
  devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
  found += [("devices", f"{devices} ({jax.local_devices()[0].platform})")]
  return [*found, ("cores", str(os.cpu_count())), ("system", platform.platform())]


def _command(work: Workdir, generator: Generator, prompt: str) -> str:
  what = "--samples=8" if generator.unconditional else f"--prompt={shlex.quote(prompt)}"
  return f"python -m mgen_jax.sample --workdir={shlex.quote(str(work.root))} {what}"


# --------------------------------------------------------------------------------------------------
# The report.


def _content(
  work: Workdir,
  name: str,
  figures: Mapping[str, Any],
  samples: list[report.Sample],
  pairs: list[report.Pair],
  index: ingest.Index,
  command: str,
) -> report.Content:
  """The figures of a run, arranged for its report."""
  stage = work.experiment.stages[name]
  now = datetime.datetime.now(datetime.UTC)
  stages = []
  for other in work.experiment.recipe:
    done = work.done_record(other) or {}
    lines = metrics.read(str(work.folder(other)))
    kind = work.experiment.stages[other].kind
    seconds = figures["seconds"].get(other)
    stages.append(report.Stage(other, kind, seconds, done.get("steps"), lines))
  sampler, drawn = figures["sampler"], figures["samples"]
  how = f"{sampler['num_steps']} {sampler['method']} steps, guidance {sampler['guidance']:g}"
  what = "Captions of held-out clips." if samples[0].prompt else "The model is asked for nothing."
  if figures["judge"]:
    split = config_lib.data_of(work.experiment, name).marbles.world.split
    which = "no training clip has" if split == "train" else "training clips have, too"
    asked = f"Combinations of colour, shape and motion that {which}."
    green = "green is as asked, red is what it saw instead."
    words = (asked, green) if samples[0].prompt else (what, "below each sample is what it saw.")
    what = f"{words[0]} The judge is a program that sees only the pixels: {words[1]}"
  else:
    what += " There is no judge for your own videos: look for yourself."
  summary, buckets, rejected = _data(work, stage, index)
  return report.Content(
    name=work.experiment.name,
    made=f"{now:%Y-%m-%d %H:%M} UTC, {dict(_versions())['devices']}, {os.cpu_count()} cores",
    figures=_headlines(figures),
    samples=samples,
    samples_note=f"{what} These are the first of {drawn} drawn, not picked; {how}.",
    pairs=pairs,
    pairs_note="Held-out clips: the original at the left, what the autoencoder made at the right.",
    stages=stages,
    data=summary + rejected,
    skipped=[(entry["file"], entry["reason"]) for entry in index.summary["bad_files"]],
    buckets=buckets,
    versions=_versions(),
    command=command,
    config=config_lib.to_json(work.experiment),
  )


def _headlines(figures: Mapping[str, Any]) -> list[report.Figure]:
  made = []

  def add(title: str, key: str, form: str, note: str = "") -> None:
    value, target = _lookup(figures, key), figures["targets"].get(key)
    if value is None:
      return
    text, reached = "", None
    if target is not None:
      sign = "≥" if "at_least" in target else "≤"
      bound = target["at_least"] if "at_least" in target else target["at_most"]
      text, reached = f"{sign} {form.format(bound)}", target["reached"]
    made.append(report.Figure(title, form.format(value), note, text, reached))

  if figures["judge"]:
    for name in (*alignment.ATTRIBUTES, "all"):
      if figures["judge"][name] is None:
        continue
      low, high = figures["judge"]["interval"][name]
      note = f"95 % interval {low:.0%} to {high:.0%}; guessing {figures['chance'][name]:.1%}"
      title = f"{name} right" if name != "all" else "all three right"
      add(title, f"judge.{name}", "{:.0%}", note)
    if "of_world" in figures["judge"]:
      low, high = figures["judge"]["interval"]["of_world"]
      note = f"show a colour, a shape and a direction; 95 % interval {low:.0%} to {high:.0%}"
      add("objects of this world", "judge.of_world", "{:.0%}", note)
  rebuilt = figures["reconstruction"]
  similarity = "" if rebuilt["ssim"] is None else f"SSIM {rebuilt['ssim']:.3f}"
  add("reconstruction", "reconstruction.psnr", "{:.1f} dB", similarity)
  add("of one frame", "reconstruction.psnr_image", "{:.1f} dB")
  add("of an odd length", "reconstruction.psnr_odd_length", "{:.1f} dB")
  total = report.duration(figures["seconds"]["total"])
  target = figures["targets"].get("seconds.total")
  text = "" if target is None else f"≤ {report.duration(target['at_most'])}"
  reached = target and target["reached"]
  made.append(report.Figure("all stages", total, "installation excluded", text, reached))
  add("peak memory", "peak_memory_gib", "{:.1f} GiB")
  return made


def _data(
  work: Workdir, stage: config_lib.EvaluateStage, index: ingest.Index
) -> tuple[list[tuple[str, str]], list[tuple[str, int, int]], list[tuple[str, str]]]:
  """Rows on the clips, on the buckets of the encode stage, and on clips that fit none."""
  data = config_lib.data_of(work.experiment, stage.generator)
  encode = work.experiment.stages[config_lib.latents_of(work.experiment, stage.generator)]
  wanted = [parse_bucket(text) for text in encode.buckets]
  (train, groups), (held_out, _) = (
    sources_lib.media_sources(
      index, wanted, split=split, images_from_videos=True, fps=data.rate, max_crop=data.max_crop
    )
    for split in ("train", "held_out")
  )
  buckets = [(bucket.name, len(train[bucket]), len(held_out[bucket])) for bucket in sorted(train)]
  facts = index.summary
  rows = [("source", str(index.folder) if data.videos else "Marbles, rendered")]
  rows += [
    (label, f"{facts[key]:,}")
    for label, key in (
      ("media files", "files"),
      ("usable clips", "clips"),
      ("to train on", "train"),
      ("held out", "held_out"),
      ("unreadable, skipped", "unreadable"),
      ("without a caption, skipped", "without_caption"),
    )
  ]
  rows.append(("video in all", report.duration(facts["seconds"])))
  rejected = [(f"fit no bucket: {reason}", f"{n:,}") for reason, n in groups.rejected.items()]
  return rows, buckets, rejected


# --------------------------------------------------------------------------------------------------
# The command.


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command (not at import: other commands have flags of the same names)."""
  to = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "Folder of the run, like runs/quickstart.", **to)
  flags.DEFINE_string("stage", None, "The evaluate stage; default: the last one.", **to)
  sample.define_sampler_flags(values)
  flags.adopt_module_key_flags(sample, values)  # `--help` shows them too


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Repeats the evaluate stage of a run."""
  del argv
  if values.workdir is None:
    raise UserError("--workdir is missing: name the folder of a run, like runs/quickstart.")
  work = Workdir.open(values.workdir)
  stages = work.experiment.stages
  known = [name for name in work.experiment.recipe if stages[name].kind == "evaluate"]
  name = values.stage if values.stage is not None else (known[-1] if known else "evaluate")
  if name not in known:
    raise UserError(
      f"--stage={name} is not an evaluate stage of {work.root}: {suggest(name, known)}"
    )
  sampler = sample.sampler_from_flags(values, stages[stages[name].generator].task.sampler)
  work.start(name)
  run(work, name, sampler)
  print(work.root / REPORT_HTML)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
