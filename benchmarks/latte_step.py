"""One forward and backward pass of Latte against PyTorch, in one run, as a ratio.

  python -m benchmarks.latte_step
  python -m benchmarks.latte_step --sizes=S/2,B/2 --rounds=5 --out=latte.json

Batch 1, 16 frames of 32x32x4 latents, fp32, all parameters redrawn; PyTorch's side is
`tests/models/torch_latte.py`, built from the published architecture (which repeats the condition
for every token before the modulation, and has plain attention), eager as the released code runs,
or under `torch.compile` with --compile. Both use every core; steps take turns. "ratio" is our
time over PyTorch's. Needs torch, of the extra "test".
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see transformer_step

import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from mgen_jax.models import latte
from mgen_jax.weights import latte as weights

FRAMES, SIDE = 16, 32


def steps_of(size: str, compiled: bool, unroll: int) -> dict:
  """Ours and PyTorch's pass on the same parameters and inputs."""
  import torch

  from tests.models import torch_latte

  config = latte.size(size, scan_unroll=unroll)
  twin = torch_latte.Latte(config, SIDE, FRAMES)
  torch_latte.redraw(twin, 0, 0.02)
  state = {name: tensor.detach().numpy() for name, tensor in twin.state_dict().items()}
  params = jax.device_put(weights.from_latte(state, config))
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((1, FRAMES, SIDE, SIDE, 4)).astype(np.float32)
  target = rng.standard_normal((1, FRAMES, SIDE, SIDE, 8)).astype(np.float32)

  @jax.jit
  def gradient(params, latents, target):
    def loss(params):
      made = latte.Latte(config).apply({"params": params}, latents, jnp.array([500]))
      return jnp.square(made - target).mean()

    return jax.value_and_grad(loss)(params)

  theirs = [torch.tensor(np.moveaxis(x, -1, 2).copy()) for x in (latents, target)]
  forward = torch.compile(twin) if compiled else twin

  def ours():
    return jax.block_until_ready(gradient(params, latents, target))[0]

  def reference():
    twin.zero_grad(set_to_none=True)
    loss = (forward(theirs[0], torch.tensor([500])) - theirs[1]).square().mean()
    loss.backward()
    return loss.item()

  first, second = float(ours()), reference()
  if abs(first - second) > 1e-4 * abs(second):
    raise SystemExit(f"{size}: the losses differ, {first} and {second}: nothing is compared")
  return {"ours": ours, "torch": reference}


def main() -> None:
  """Reads the flags, times, prints and saves."""
  parser = common.parser(__doc__, rounds=5)
  parser.add_argument("--sizes", default="S/2,B/2", help="Of Latte (default: S/2,B/2).")
  parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile.")
  parser.add_argument("--unroll", type=int, default=1, help="Pairs of layers in a loop's body.")
  values = parser.parse_args()
  rows = []
  for size in values.sizes.split(","):
    steps = steps_of(size, values.compile, values.unroll)
    times = common.interleave(steps, values.rounds, warm_up=1)
    rows.append(
      {
        "size": size,
        "ours_seconds": statistics.median(times["ours"].wall),
        "torch_seconds": statistics.median(times["torch"].wall),
        **common.ratios(times["ours"], times["torch"]),
      }
    )
    print(json.dumps(rows[-1]), flush=True)
  if values.out:
    Path(values.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
  main()
