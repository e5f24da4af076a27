"""One training step of the backbone against the same step in PyTorch, in one run, as a ratio.

  python -m benchmarks.transformer_step
  python -m benchmarks.transformer_step --width=384 --heads=6 --mlp_width=1024 --tokens=64,256
  python -m benchmarks.transformer_step --size=30B --layers=4 --batch=1 --tokens=8192,32768 \\
      --dtype=bfloat16 --remat=full --out=step.json --plot=step.png

Forward, backward, gradient clipping and AdamW, on the same shapes and from the same parameters.
PyTorch's side is `benchmarks/torch_backbone.py` under `torch.compile` (unless --eager), with its
scaled_dot_product_attention and its fused AdamW. Both run on a GPU where both see one, else on the
CPU with as many threads as there are cores. Steps take turns, so that other work on the machine
hits both alike. "ratio" is our time over PyTorch's: below 1 we are faster; "cpu_ratio" compares the
processor time of all threads, which counts where the cores are shared with other programs.
PyTorch's threads wait for each other awake for a moment, then asleep: their own default. With
OMP_WAIT_POLICY=active they also take the cores from our turns, with passive each of its turns takes
up to three times as long. Needs torch, of the extra "test".
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is PyTorch's as well

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from mgen_jax.config import OptimizerConfig
from mgen_jax.diffusion import flow_matching
from mgen_jax.models import backbone
from mgen_jax.models.backbone import Backbone, BackboneConfig
from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.training.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=0.1, clip_norm=1.0)
TEXT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Inputs:
  """One batch, as NumPy arrays; `target` is the velocity that the model is to give."""

  latents: np.ndarray  # [B, T, H, W, C]
  time: np.ndarray  # [B]
  texts: tuple[np.ndarray, ...]  # [B, S, width] each
  masks: tuple[np.ndarray, ...]  # [B, S] each
  target: np.ndarray


def grid_of(tokens: int) -> tuple[int, int, int]:
  """Patches (time, height, width) whose product is `tokens`.

  Raises:
    SystemExit: it is no multiple of a square of 4, 8 or 16 patches.
  """
  side = 4 if tokens < 256 else 8 if tokens < 1024 else 16
  frames, odd = divmod(tokens, side * side)
  if odd or not frames:
    raise SystemExit(f"--tokens={tokens} is not a multiple of {side * side}: choose one.")
  return frames, side, side


def model_for(args: argparse.Namespace) -> BackboneConfig:
  """The named size, with the flags' changes and tables that hold every grid of the sweep."""
  names = ("layers", "width", "heads", "mlp_width", "dtype", "remat", "scan_unroll")
  changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  grids = [grid_of(tokens) for tokens in args.tokens]
  limits = tuple(max(grid[axis] for grid in grids) for axis in range(3))
  config = dataclasses.replace(backbone.SIZES[args.size], max_positions=limits, **changes)
  return dataclasses.replace(config, scan_unroll=min(config.scan_unroll, config.layers))


def make_inputs(config: BackboneConfig, batch: int, tokens: int) -> Inputs:
  """Random ones, always the same."""
  rng = np.random.default_rng(tokens)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  size = [n * p for n, p in zip(grid_of(tokens), config.patch, strict=True)]
  return Inputs(
    latents=normal(batch, *size, config.in_channels),
    time=rng.uniform(size=batch).astype(np.float32),
    texts=tuple(normal(batch, TEXT_TOKENS, width) for width in config.context_widths),
    masks=tuple(
      np.arange(TEXT_TOKENS) < rng.integers(4, TEXT_TOKENS + 1, (batch, 1))
      for _ in config.context_widths
    ),
    target=normal(batch, *size, config.out_channels),
  )


def make_params(config: BackboneConfig) -> Any:
  """Random parameters of the backbone; none of them zero, so that every gradient has its cost."""
  rng = np.random.default_rng(0)
  inputs = make_inputs(config, 1, 16)
  shapes = jax.eval_shape(
    Backbone(config).init, jax.random.key(0), inputs.latents, inputs.time, inputs.texts
  )
  scale = config.width**-0.5
  return jax.tree.map(
    lambda s: (scale * rng.standard_normal(s.shape, np.float32)).astype(np.float32),
    nn.unbox(shapes)["params"],
  )


def jax_program(config: BackboneConfig, params: Any, inputs: Inputs) -> tuple[Any, tuple]:
  """The jitted step (params, opt_state, batch) -> (params, opt_state, loss), which is given the
  first two away, and arguments for it."""
  model = Backbone(config)
  optimizer = make_optimizer(OPTIMIZER, 1000)

  def loss(params, x):
    made = model.apply({"params": params}, x["latents"], x["time"], x["texts"], x["masks"])
    return flow_matching.loss(made, x["target"]).mean()

  def step(params, opt_state, x):
    value, gradients = jax.value_and_grad(loss)(params, x)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  batch = jax.device_put({f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)})
  params = jax.tree.map(jnp.array, params)  # the caller keeps its own
  arguments = (params, jax.jit(optimizer.init)(params), batch)
  return jax.jit(step, donate_argnums=(0, 1)), arguments


def jax_step(config: BackboneConfig, params: Any, inputs: Inputs) -> Callable[[], float]:
  """A function that does one step and returns the loss once the parameters are there."""
  step, (*state, batch) = jax_program(config, params, inputs)
  lowered = step.lower(*state, batch)
  options = cpu.chosen_for(lowered, mesh_lib.make_mesh(mesh_lib.MeshConfig()))
  step = lowered.compile(compiler_options=options)  # as a training step is

  def run() -> float:
    *state[:], value = step(*state, batch)
    return float(jax.block_until_ready((state, value))[1])

  return run


def torch_step(
  config: BackboneConfig, params: Any, inputs: Inputs, *, compiled: bool = True
) -> Callable[[], float]:
  """The same in PyTorch: on a GPU if JAX has one, in bf16 by autocast if the config says so."""
  import torch
  from torch.utils.checkpoint import checkpoint

  from benchmarks import torch_backbone

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  torch.set_float32_matmul_precision("high")  # JAX multiplies fp32 on a GPU in TF32, too
  twin = torch_backbone.Backbone(config)
  torch_backbone.load(twin, params)
  twin = twin.to(device)
  if config.remat != "none":  # each layer computed again, as under "full"
    for layer in twin.layers:
      forward = layer.forward
      layer.forward = lambda *x, f=forward: checkpoint(f, *x, use_reentrant=False)
  matrices = [p for p in twin.parameters() if p.ndim >= 2]
  vectors = [p for p in twin.parameters() if p.ndim < 2]
  groups = [
    {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
    {"params": vectors, "weight_decay": 0.0},
  ]
  betas = (OPTIMIZER.b1, OPTIMIZER.b2)
  adamw = torch.optim.AdamW(groups, OPTIMIZER.lr, betas, OPTIMIZER.eps, fused=True)
  tensor = lambda x: torch.tensor(x, device=device)  # noqa: E731
  latents, time, target = map(tensor, (inputs.latents, inputs.time, inputs.target))
  texts, masks = list(map(tensor, inputs.texts)), list(map(tensor, inputs.masks))
  half = config.dtype == "bfloat16"

  def loss():
    with torch.autocast(device, torch.bfloat16, enabled=half):
      made = twin(latents, time, texts, masks)
    return (made.float() - target).square().mean()

  if compiled:
    torch._dynamo.reset()  # another shape is another program, not one with a size left open
    loss = torch.compile(loss)

  def run() -> float:
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), OPTIMIZER.clip_norm)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    if device == "cuda":
      torch.cuda.synchronize()
    return float(value.detach())

  return run


def measure(
  config: BackboneConfig, params: Any, tokens: int, args: argparse.Namespace
) -> common.Row:
  """One row of the sweep.

  Raises:
    SystemExit: the two sides do not have the same loss, so they are not the same step.
  """
  inputs = make_inputs(config, args.batch, tokens)
  steps = {"jax": jax_step(config, params, inputs)}
  if not args.no_torch:
    steps["torch"] = torch_step(config, params, inputs, compiled=not args.eager)
  losses = {name: step() for name, step in steps.items()}
  worst = max(losses.values()) / min(losses.values()) - 1
  if worst > (0.05 if config.dtype == "bfloat16" else 1e-3):
    raise SystemExit(f"the losses differ ({losses}): these are not the same step.")
  times = common.interleave(steps, args.rounds)
  text = [TEXT_TOKENS] * len(config.context_widths)
  size = inputs.latents.shape[1:4]
  flops = 3 * args.batch * sum(backbone.flops(config, size, text).values())
  row = {"tokens": tokens, "batch": args.batch, "gflop": flops / 1e9}
  for name, values in times.items():
    middle = statistics.median(values.wall)
    row |= {f"{name}_ms": 1e3 * middle, f"{name}_gflop_s": flops / middle / 1e9}
  return row | (common.ratios(times["jax"], times["torch"]) if "torch" in times else {})


def plot(record: common.Row, path: str) -> None:
  """A PNG of the sweep: milliseconds of both sides over the tokens, and the ratio below."""
  from matplotlib import figure

  rows = record["rows"]
  tokens = [row["tokens"] for row in rows]
  fig = figure.Figure(figsize=(6, 5), layout="constrained")
  top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  for name, colour in (("jax", "#4477aa"), ("torch", "#cc6677")):
    if f"{name}_ms" in rows[0]:
      values = [row[f"{name}_ms"] for row in rows]
      top.plot(tokens, values, marker="o", color=colour, label=name)
  top.set(xscale="log", yscale="log", ylabel="ms a step", title=record["benchmark"])
  top.legend()
  if "ratio" in rows[0]:
    bottom.plot(tokens, [row["ratio"] for row in rows], marker="o", color="#444444")
    low, high = ([row[end] for row in rows] for end in ("low", "high"))
    bottom.fill_between(tokens, low, high, color="#bbbbbb")
  bottom.axhline(1.0, color="#cc3311", linewidth=1)
  bottom.set(xlabel="tokens of an example", ylabel="our time / PyTorch's")
  bottom.set_xticks(tokens, [str(n) for n in tokens])
  bottom.minorticks_off()
  fig.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The flags."""
  parser = common.parser(__doc__)
  add = parser.add_argument
  add("--size", default="toy", choices=sorted(backbone.SIZES), help="Named size (default: toy).")
  for name in ("layers", "width", "heads", "mlp_width", "scan_unroll"):
    add(f"--{name}", type=int, help=f"Instead of the size's own {name}.")
  add("--dtype", choices=("float32", "bfloat16"), help="Of the computation.")
  add("--remat", help="Policy; other than none, PyTorch computes each layer again.")
  add("--tokens", type=common.numbers, default=(64, 256, 1024), help="Of an example, with commas.")
  add("--batch", type=int, default=8, help="Examples of a step (default: 8).")
  add("--eager", action="store_true", help="PyTorch without torch.compile.")
  add("--no_torch", action="store_true", help="Only our side.")
  add("--plot", help="Save a picture of the sweep (PNG) here.")
  args = parser.parse_args(argv)
  if not args.no_torch and importlib.util.find_spec("torch") is None:
    parser.error("torch is not installed: pip install -e .[test], or give --no_torch.")
  return args


def main(argv: list[str] | None = None) -> common.Row:
  """Runs the sweep that the flags ask for."""
  args = parse(argv)
  cpu.keep_memory()  # as `main` does
  config = model_for(args)
  params = make_params(config)
  rows = []
  for tokens in args.tokens:
    print(f"{tokens} tokens ...", file=sys.stderr, flush=True)
    rows.append(measure(config, params, tokens, args))
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  title = (
    f"Training step, {config.layers} layers of width {config.width}, {count / 1e6:.1f}M "
    f"parameters, {config.dtype}, remat {config.remat}"
  )
  record = common.report(title, rows, args.out, size=args.size, parameters=count)
  if args.plot:
    plot(record, args.plot)
  return record


if __name__ == "__main__":
  main()
