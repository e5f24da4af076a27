"""Throughput of the T5 encoder beside `transformers` on torch, at equal shapes, on this CPU.

  python -m benchmarks.t5_encoder
  python -m benchmarks.t5_encoder --encoder=t5-base --batch=8 --length=128 --rounds=20 --out=t5.json

Both have the same random weights (written once as safetensors), read the same tokens in fp32 with
the same padding, and take turns in one process, so that what else the machine does meets both
alike. Before anything is timed their features are compared. What counts is the ratio of the
medians; the times themselves are this machine's at this hour.

Needs the test extra on Python 3.11 (torch and transformers).
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np

from mgen_jax import encoders
from mgen_jax.encoders import families, sizes
from mgen_jax.models import t5


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


def main() -> None:
  """Measures and prints one line, or JSON with --out."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--encoder", default="t5-base", help="of the T5 family, see encoders/sizes.py"
  )
  parser.add_argument(
    "--layers", type=int, default=None, help="only so many, to fit a small machine"
  )
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--unroll", type=int, default=0, help="layers per scan iteration; 0: all")
  parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
  parser.add_argument("--out", default=None, help="write the figures as JSON")
  options = parser.parse_args()

  import torch

  torch.set_num_threads(options.threads)
  size = sizes.named(options.encoder)
  if size.family != "t5":
    parser.error(f"{options.encoder} is no T5")
  layers = options.layers or size.config.layers
  config = dataclasses.replace(size.config, layers=layers, dtype="float32")
  rng = np.random.default_rng(0)
  ids = rng.integers(2, config.vocab, (options.batch, options.length)).astype(np.int32)
  lengths = rng.integers(options.length // 2, options.length + 1, options.batch)
  mask = np.arange(options.length)[None] < lengths[:, None]

  with tempfile.TemporaryDirectory() as folder:
    model = reference(config, Path(folder))
    encoder = encoders.load("any", folder, dtype="float32", devices=jax.devices()[:1])
  module = t5.T5Encoder(dataclasses.replace(config, scan_unroll=options.unroll or layers))
  ours = jax.jit(lambda params, *x: module.apply({"params": params}, *x))
  placed = jax.device_put((ids, mask))
  tensors = torch.tensor(ids).long(), torch.tensor(mask).long()

  def run_ours():
    return jax.block_until_ready(ours(encoder.params, *placed))

  def run_theirs():
    with torch.inference_mode():
      return model(*tensors).last_hidden_state

  error = float(np.abs(np.asarray(run_ours()) - run_theirs().numpy())[mask].max())
  seconds: dict[str, list[float]] = {"mgen_jax": [], "transformers": []}
  for number in range(options.rounds + 2):
    pair = [("mgen_jax", run_ours), ("transformers", run_theirs)]
    for name, run in pair if number % 2 else pair[::-1]:
      began = time.perf_counter()
      run()
      if number >= 2:  # the first rounds warm both up
        seconds[name].append(time.perf_counter() - began)
  tokens = options.batch * options.length
  record = {
    **vars(options),
    "layers": layers,
    "max_abs_error": error,
    "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
    "best_tokens_per_second": {n: tokens / min(s) for n, s in seconds.items()},
    "jax": jax.__version__,
    "torch": torch.__version__,
  }
  rates = record["tokens_per_second"]
  record["ratio"] = rates["mgen_jax"] / rates["transformers"]
  best = record["best_tokens_per_second"]
  record["ratio_of_best"] = best["mgen_jax"] / best["transformers"]
  print(
    f"{options.encoder}, {layers} layers, {options.batch} x {options.length} tokens: "
    f"{rates['mgen_jax']:,.0f} tokens/s, transformers {rates['transformers']:,.0f}: "
    f"ratio {record['ratio']:.2f} (of the best rounds {record['ratio_of_best']:.2f}); "
    f"largest difference of a feature {error:.1e}"
  )
  if options.out:
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  main()
