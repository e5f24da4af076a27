"""How long the first training step takes, layers scanned against layers written out one by one.

  python -m benchmarks.first_step
  python -m benchmarks.first_step --layers=12,48 --width=256 --rounds=3 --out=first.json

The layers of the backbone are scanned: one layer is compiled, whatever their number. `scan_unroll`
writes them out instead, which a toy on a CPU runs faster. Each row is one training step (forward,
backward, AdamW) of a model: seconds to trace it, to lower it to StableHLO and to compile it, and to
run it once; the persistent cache is off. "ratio" is the whole of it, unrolled over scanned.
"""

import dataclasses
import itertools
import statistics
import time

import jax

from benchmarks import common, transformer_step
from mgen_jax.models import backbone

PHASES = ("trace", "lower", "compile", "run")


def first_step(config: backbone.BackboneConfig, batch: int, tokens: int) -> dict[str, float]:
  """Seconds of each phase, and the number of "stablehlo_lines"."""
  step, arguments = transformer_step.jax_program(
    config,
    transformer_step.make_params(config),
    transformer_step.make_inputs(config, batch, tokens),
  )
  jax.clear_caches()
  times = [time.perf_counter()]
  traced = step.trace(*arguments)
  times.append(time.perf_counter())
  lowered = traced.lower()
  times.append(time.perf_counter())
  compiled = lowered.compile()
  times.append(time.perf_counter())
  jax.block_until_ready(compiled(*arguments))
  times.append(time.perf_counter())
  lines = lowered.as_text().count("\n")
  seconds = (b - a for a, b in itertools.pairwise(times))
  return dict(zip(PHASES, seconds, strict=True)) | {"stablehlo_lines": lines}


def main(argv: list[str] | None = None) -> common.Row:
  """Measures every number of layers, scanned and unrolled in turn."""
  parser = common.parser(__doc__, rounds=1)
  add = parser.add_argument
  add("--layers", type=common.numbers, default=(6, 24), help="Numbers of layers, with commas.")
  add("--width", type=int, default=192, help="Of the model, a multiple of 6 (default: 192).")
  add("--tokens", type=int, default=64, help="Of an example (default: 64).")
  add("--batch", type=int, default=2, help="Examples of a step (default: 2).")
  args = parser.parse_args(argv)
  jax.config.update("jax_enable_compilation_cache", False)
  rows = []
  for layers in args.layers:
    base = dataclasses.replace(
      backbone.SIZES["toy"],
      layers=layers,
      width=args.width,
      max_positions=transformer_step.grid_of(args.tokens),
    )
    configs = {
      "scanned": dataclasses.replace(base, scan_unroll=1),
      "unrolled": dataclasses.replace(base, scan_unroll=layers),
    }
    found: dict[str, list] = {name: [] for name in configs}
    for _ in range(args.rounds):
      for name, config in configs.items():
        found[name].append(first_step(config, args.batch, args.tokens))
    whole = {}
    for name, results in found.items():
      middle = {key: statistics.median(r[key] for r in results) for key in results[0]}
      whole[name] = sum(middle[phase] for phase in PHASES)
      seconds = {f"{phase}_s": middle[phase] for phase in PHASES}
      lines = int(middle["stablehlo_lines"])
      rows.append(
        {"layers": layers, "how": name, **seconds, "all_s": whole[name], "stablehlo_lines": lines}
        | {"ratio": whole[name] / whole["scanned"]}
      )
  return common.report("First training step", rows, args.out)


if __name__ == "__main__":
  main()
