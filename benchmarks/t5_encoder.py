"""Throughput of the T5 encoder beside `transformers` on torch, at equal shapes, on this CPU.

  python -m benchmarks.t5_encoder
  python -m benchmarks.t5_encoder --encoder=t5-base --batch=8 --length=128 --rounds=20 --out=t5.json
  OMP_WAIT_POLICY=active taskset -c 0,1 python -m benchmarks.t5_encoder --threads=2

All have the same random weights (written once as safetensors), read the same tokens in fp32 with
the same padding, and take turns in one process, so that what else the machine does meets all
alike. Before anything is timed their features are compared. Three sides: `encoders.load` as it is,
"xla" without the compiler's options that it chooses for a CPU, and transformers in inference mode.
"ratio" is our tokens per second over theirs (of the median rounds), "cpu_ratio" likewise of the
processor time, "best" of each side's fastest round.

Needs the test extra on Python 3.11 (torch and transformers).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# PyTorch's threads would spin at each barrier while ours have the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import common
from mgen_jax import encoders
from mgen_jax.encoders import families, sizes
from mgen_jax.models import t5

LIMIT = 1e-4  # between the features of the sides


def reference(config: t5.T5Config, folder: Path):
  """The same encoder of `transformers`, random, saved to a folder."""
  import torch
  import transformers

  torch.manual_seed(0)
  hf = families.FAMILIES["t5"].to_hf(config)
  hf = {key: value for key, value in hf.items() if key not in ("architectures", "model_type")}
  kind = "T5" if config.shared_bias else "UMT5"
  model = getattr(transformers, f"{kind}EncoderModel")(
    getattr(transformers, f"{kind}Config")(**hf)
  ).eval()
  model.save_pretrained(folder)
  return model


def sides_of(
  config: t5.T5Config, ids: np.ndarray, mask: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
  """Functions that embed the tokens [N, S]: "jax", "xla" and "torch"; each returns features."""
  import torch

  batch = len(ids)
  with tempfile.TemporaryDirectory() as folder:
    model = reference(config, Path(folder))
    ours = {
      name: encoders.load(
        "any", folder, dtype="float32", devices=jax.devices()[:1], compiler_options=options
      )
      for name, options in (("jax", None), ("xla", {}))
    }
  tensors = torch.tensor(ids).long(), torch.tensor(mask).long()

  def embed(name: str) -> Callable[[], np.ndarray]:
    return lambda: ours[name].embed_tokens(ids, mask, batch=batch).features

  def torch_side() -> np.ndarray:
    with torch.inference_mode():
      return model(*tensors).last_hidden_state.numpy()

  return {**{name: embed(name) for name in ours}, "torch": torch_side}


def main(argv: Sequence[str] | None = None) -> common.Row:
  """Times the sides at the shape that the flags ask for."""
  parser = common.parser(__doc__, rounds=15)
  parser.add_argument("--encoder", default="t5-base", help="Of the T5 family (default: t5-base).")
  parser.add_argument("--layers", type=int, help="Only so many, to fit a small machine.")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--threads", type=int, help="Of torch; default: the cores of this process.")
  args = parser.parse_args(argv)
  size = sizes.named(args.encoder)
  if size.family != "t5":
    parser.error(f"{args.encoder} is no T5")
  import torch

  threads = args.threads or len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  layers = args.layers or size.config.layers
  config = dataclasses.replace(size.config, layers=layers, dtype="float32")
  rng = np.random.default_rng(0)
  ids = rng.integers(2, config.vocab, (args.batch, args.length)).astype(np.int32)
  lengths = rng.integers(args.length // 2, args.length + 1, args.batch)
  mask = np.arange(args.length)[None] < lengths[:, None]

  sides = sides_of(config, ids, mask)
  features = {name: side()[mask] for name, side in sides.items()}
  times = common.interleave(sides, args.rounds)
  rows = []
  for name in sides:
    error = float(np.abs(features[name] - features["torch"]).max())
    if error > LIMIT:
      raise SystemExit(f"the features of {name} and torch differ by {error}: not the same encoder.")
    compared = common.ratios(times["torch"], times[name])
    rows.append(
      {
        "side": name,
        "tokens_per_second": ids.size / statistics.median(times[name].wall),
        **compared,
        "best": min(times["torch"].wall) / min(times[name].wall),
        "max_abs_error": error,
      }
    )
  title = f"{args.encoder}, {layers} layers, {args.batch} x {args.length} tokens, {threads} threads"
  return common.report(title, rows, args.out)


if __name__ == "__main__":
  main()
