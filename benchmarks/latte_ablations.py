"""The table of Latte's ablations on Marbles: every trained arm of a run, drawn and judged alike.

  python -m mgen_jax.main --config=experiments/latte_ablations_marbles.py --workdir=runs/ablations
  python -m benchmarks.latte_ablations --workdir=runs/ablations --samples=96 --out=table.json

For each arm: the Frechet distance of its samples to real clips on fixed features (see
`mgen_jax/evaluation/frechet.py`; compare within the table only), how often the judge sees the
colour, shape and direction of the class, how often a colour, shape and direction of the world at
all ("of_world"; an arm without condition has only this), the last training loss, seconds and
parameters. Two rows give the distances a scale: other real clips, and those standing still. Writes
the table as JSON, as Markdown, and as a picture beside it.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mgen_jax import config as config_lib
from mgen_jax.data import ingest, marbles
from mgen_jax.data import sources as sources_lib
from mgen_jax.data.buckets import Bucket
from mgen_jax.evaluation import alignment, frechet
from mgen_jax.generator import Generator
from mgen_jax.training import metrics
from mgen_jax.workdir import Workdir

Row = dict[str, Any]


def arms(work: Workdir) -> list[str]:
  """The finished stages that train a Latte on clips, in order."""
  return [
    name
    for name in work.experiment.recipe
    if isinstance(stage := work.experiment.stages[name], config_lib.TrainStage)
    and stage.task.name == "latte"
    and any(not bucket.is_image for bucket in stage.batches())
    and work.done_record(name) is not None
  ]


def real_clips(work: Workdir, name: str, bucket: Bucket, count: int) -> np.ndarray:
  """uint8 [count, T, H, W, 3] of the data that a stage learned from, centre windows."""
  latents = config_lib.latents_of(work.experiment, name)
  index = ingest.load(work.folder(config_lib.ingest_of(work.experiment, latents)))
  rate = config_lib.data_of(work.experiment, latents).rate
  sources, _ = sources_lib.media_sources(index, [bucket], split="train", fps=rate)
  source = sources[bucket]
  chosen = np.random.default_rng(0).choice(len(source), min(count, len(source)), replace=False)
  return np.stack([source.example(int(i), None)["video"] for i in chosen])


def prompts_of(world: marbles.WorldConfig, count: int) -> list[marbles.Prompt]:
  """As many of each class as of any other, in a fixed order, in the words of captions.

  A model by text has learned those; a class is found in them.
  """
  classes = list(itertools.product(world.colours, world.shapes, world.motions))
  order = np.random.default_rng(1).permutation(len(classes))
  chosen = [classes[order[i % len(order)]] for i in range(count)]
  size = world.sizes[0]
  return [
    marbles.Prompt(f"a {size} {colour} {shape} {motion}", colour, shape, motion, size)
    for colour, shape, motion in chosen
  ]


class _Real:
  """Features of real clips, and rows of others of them, by the latents that stand for them."""

  def __init__(self, work: Workdir, samples: int):
    self._work, self._samples = work, samples
    self._kept: dict[str, tuple[np.ndarray, list[Row]]] = {}

  def of(self, name: str, bucket: Bucket) -> tuple[np.ndarray, list[Row]]:
    """Those that a stage is compared with."""
    latents = config_lib.latents_of(self._work.experiment, name)
    if latents not in self._kept:
      count = max(self._samples, 256)
      clips = real_clips(self._work, name, bucket, count + self._samples)
      clips, others = clips[: -self._samples], clips[-self._samples :]
      features = frechet.random_clip_features(clips)
      world = self._work.experiment.data.marbles.world
      still = np.repeat(others[:, :1], others.shape[1], 1)
      rows = [
        {
          "arm": f"{latents}: {title}",
          "frechet": _distance(features, videos),
          "of_world": _of_world([alignment.judge_video(v, None, world) for v in videos], world),
        }
        for title, videos in (("other clips", others), ("standing still", still))
      ]
      self._kept[latents] = features, rows
    return self._kept[latents]

  def rows(self) -> list[Row]:
    return [row for _, rows in self._kept.values() for row in rows]


def _of_world(verdicts: Sequence[alignment.Verdict], world: marbles.WorldConfig) -> float:
  return round(alignment.of_world(verdicts, world), 3)


def _distance(real: np.ndarray, videos: np.ndarray) -> float:
  return round(frechet.distance(real, frechet.random_clip_features(videos)), 4)


def measure(work: Workdir, samples: int = 96, names: Sequence[str] | None = None) -> list[Row]:
  """One row for each arm, then those of real clips; see the docstring of this file."""
  rows, real = [], _Real(work, samples)
  world = work.experiment.data.marbles.world
  prompts = prompts_of(world, samples)
  for name in arms(work) if names is None else names:
    generator = Generator.load(work, name)
    bucket = max(generator.trained)
    features, _ = real.of(name, bucket)
    told = generator.task.config.condition != "none"
    texts = [prompt.text if told else "" for prompt in prompts]
    videos = generator.generate(texts, bucket, list(range(samples)))
    verdicts = [alignment.judge_video(v, p, world) for v, p in zip(videos, prompts, strict=True)]
    shares = alignment.accuracies(verdicts)
    losses = [line["loss"] for line in metrics.read(str(work.folder(name))) if "loss" in line]
    asked = ("colour", "shape", "direction")
    rows.append(
      {
        "arm": name,
        "frechet": _distance(features, videos),
        **{key: round(shares[key], 3) if told else None for key in asked},
        "of_world": _of_world(verdicts, world),
        "loss": round(float(losses[-1]), 4) if losses else None,
        "seconds": work.done_record(name)["seconds"],
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(generator.params)),
      }
    )
    print(rows[-1], flush=True)
  return rows + real.rows()


def markdown(rows: Sequence[Row]) -> str:
  """The rows as a table; "-" where there is no such figure."""
  keys = list(rows[0])
  lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
  cells = [["-" if row.get(key) is None else str(row[key]) for key in keys] for row in rows]
  lines += ["| " + " | ".join(row) + " |" for row in cells]
  return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], chance: dict[str, float]) -> Any:
  """Two panels: the distance of each arm, and what the judge sees beside chance."""
  from matplotlib import figure as figures

  figure = figures.Figure(figsize=(11, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.barh([row["arm"] for row in rows], [row["frechet"] for row in rows], color="#4477aa")
  left.set_xlabel("Frechet distance on fixed features (less is better)")
  left.invert_yaxis()
  asked = [row for row in rows if row.get("colour") is not None]
  places = np.arange(len(asked))
  for offset, key, colour in ((-0.25, "colour", "#cc6677"), (0, "shape", "#ddaa33"),
                              (0.25, "direction", "#228833")):  # fmt: skip
    right.bar(places + offset, [row[key] for row in asked], 0.25, label=key, color=colour)
    right.axhline(chance[key], color=colour, linewidth=0.8, linestyle=":")
  right.set_xticks(places, [row["arm"] for row in asked], rotation=40, ha="right")
  right.set_ylabel("share that is right (dotted: chance)")
  right.set_ylim(0, 1)
  right.legend()
  return figure


def main() -> None:
  """Reads the flags, measures, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="Of the run.")
  parser.add_argument("--samples", type=int, default=96, help="For each arm (default: 96).")
  parser.add_argument("--arms", help="Some only, like v1,v2.")
  parser.add_argument("--out", help="JSON; .md and .png beside it. Default: WORKDIR/ablations.json")
  values = parser.parse_args()
  work = Workdir.open(values.workdir)
  rows = measure(work, values.samples, values.arms.split(",") if values.arms else None)
  out = Path(values.out) if values.out else work.root / "ablations.json"
  out.write_text(json.dumps(rows, indent=2) + "\n")
  out.with_suffix(".md").write_text(markdown(rows))
  figure = plot(rows, alignment.chance(work.experiment.data.marbles.world))
  figure.savefig(out.with_suffix(".png"), dpi=120)
  print(markdown(rows))


if __name__ == "__main__":
  main()
