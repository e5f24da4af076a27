"""One forward and backward pass of Latte against PyTorch, in one run, as a ratio.

  python -m benchmarks.latte_step
  python -m benchmarks.latte_step --sizes=S/2,B/2 --rounds=5 --out=latte.json
  python -m benchmarks.latte_step --dtype=bfloat16

Batch 1, 16 frames of 32x32x4 latents, all parameters redrawn, in fp32 or, on both sides, in bf16
(PyTorch's by autocast). PyTorch's side is `benchmarks/torch_latte.py`, built from the published
architecture (which repeats the condition for every token before the modulation, and has plain
attention): eager, as the released code runs, or under `torch.compile` with --compile. Both use
every core, and steps take turns. "ratio" is our time over PyTorch's, "cpu_ratio" that of the
processor time. Needs torch, of the extra "test".
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from mgen_jax.models import latte
from mgen_jax.models.latte import LatteConfig
from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.weights import latte as weights


def steps_of(
  config: LatteConfig, frames: int = 16, side: int = 32, compiled: bool = False
) -> dict[str, Callable[[], float]]:
  """Our pass and PyTorch's on the same parameters and inputs; each returns its loss.

  Args:
    config: unconditional, of variant 1.
    frames: latent frames.
    side: height and width of the latents.
    compiled: PyTorch under torch.compile.
  """
  import torch

  from benchmarks import torch_latte

  twin = torch_latte.Latte(config, side, frames)
  torch_latte.redraw(twin, 0, 0.02)
  state = {name: tensor.detach().numpy() for name, tensor in twin.state_dict().items()}
  params = jax.device_put(weights.from_latte(state, config))
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((1, frames, side, side, config.in_channels)).astype(np.float32)
  target = rng.standard_normal((*latents.shape[:-1], config.out_channels)).astype(np.float32)

  def gradient(params, latents, target):
    def loss(params):
      made = latte.Latte(config).apply({"params": params}, latents, jnp.array([500]))
      return jnp.square(made.astype(jnp.float32) - target).mean()

    return jax.value_and_grad(loss)(params)

  # There before the step, as a stage's are: see `cpu.keep_memory`.
  on_device = jax.block_until_ready(jax.device_put((params, latents, target)))
  lowered = jax.jit(gradient).lower(*on_device)
  options = cpu.chosen_for(lowered, mesh_lib.make_mesh(mesh_lib.MeshConfig()))
  program = lowered.compile(compiler_options=options)  # as a training step is
  theirs = [torch.tensor(np.moveaxis(x, -1, 2).copy()) for x in (latents, target)]
  forward = torch.compile(twin) if compiled else twin

  def ours() -> float:
    return float(jax.block_until_ready(program(*on_device))[0])

  def reference() -> float:
    twin.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
      made = forward(theirs[0], torch.tensor([500]))
    loss = (made.float() - theirs[1]).square().mean()
    loss.backward()
    return loss.item()

  return {"jax": ours, "torch": reference}


def main(argv: Sequence[str] | None = None) -> common.Row:
  """Times the sizes that the flags ask for."""
  parser = common.parser(__doc__, rounds=5)
  parser.add_argument("--sizes", default="S/2,B/2", help="Of Latte (default: S/2,B/2).")
  parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile.")
  parser.add_argument(
    "--dtype", default="float32", choices=("float32", "bfloat16"), help="Of both (float32)."
  )
  parser.add_argument(
    "--unroll",
    type=int,
    help="Pairs of layers in a loop's body (default: all, fastest on a CPU; models have 1).",
  )
  args = parser.parse_args(argv)
  cpu.keep_memory()  # as `main` does
  rows = []
  for name in args.sizes.split(","):
    print(f"{name} ...", file=sys.stderr, flush=True)
    config = latte.size(name, dtype=args.dtype)
    config = dataclasses.replace(config, scan_unroll=args.unroll or config.layers)
    steps = steps_of(config, compiled=args.compile)
    first, second = steps["jax"](), steps["torch"]()
    if abs(first - second) > (1e-4 if args.dtype == "float32" else 1e-2) * abs(second):
      raise SystemExit(f"{name}: losses {first} and {second}: this is not the same step.")
    times = common.interleave(steps, args.rounds, warm_up=1)
    milliseconds = {f"{k}_ms": 1e3 * statistics.median(t.wall) for k, t in times.items()}
    rows.append({"size": name, **milliseconds, **common.ratios(times["jax"], times["torch"])})
  return common.report(f"Forward and backward of Latte, batch 1, {args.dtype}", rows, args.out)


if __name__ == "__main__":
  main()
