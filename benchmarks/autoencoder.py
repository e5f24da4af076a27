"""Encoding and decoding a clip against diffusers' video autoencoders, and the price of pieces.

  python -m benchmarks.autoencoder                       # frames/s and memory, diffusers beside it
  python -m benchmarks.autoencoder --part=pieces --side=32 --plot=pieces.png   # memory, seams

Part "clip": our 2.5D autoencoder (8x8x8, 16 channels) and diffusers' CogVideoX and Wan ones (4x8x8,
16 channels), random weights, fp32, the width of each chosen so that all have about the same number
of parameters; the machine's default threads on both sides; rounds interleaved. Needs the test extra
(torch, diffusers). Memory is the peak of a process that does nothing else.

Part "pieces": `coding.Coder` on ever longer clips, each in a process of its own, in both modes: its
peak memory, most of which is the compiler's and differs by tens of MiB from one process to the
next, and by how much its memory grew after the first 64 frames had come back, which does not. And
how far each mode is from coding the whole at once, everywhere and beside the seams.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from mgen_jax import coding
from mgen_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from mgen_jax.models.tiling import TilingConfig
from mgen_jax.parallel import cpu
from mgen_jax.parallel import mesh as mesh_lib

OURS = AutoencoderConfig(channels=32, res_blocks=1, decoder_res_blocks=2, groups=8)
# A pixel's width of the toy that is cut in pieces: large enough to see memory, small enough to run.
PIECES = AutoencoderConfig(
  channels=16,
  multipliers=(1, 2),
  res_blocks=1,
  decoder_res_blocks=1,
  patch=(2, 4, 4),
  space_down=(0,),
  time_down=(0, 1),
  groups=4,
)
_WHOLE = 1024  # frames that are coded at once at most, to compare with
_SETTLED = 64  # frames after which everything is compiled
MODULES = ("mgen_jax", "AutoencoderKLCogVideoX", "AutoencoderKLWan")


def main(argv: Sequence[str] | None = None) -> common.Row | None:
  """Runs one part; returns what it saves."""
  parser = common.parser(__doc__, rounds=5)
  parser.add_argument("--part", choices=("clip", "pieces"), default="clip")
  parser.add_argument("--frames", type=int, default=16, help="Of the clip.")
  parser.add_argument("--side", type=int, default=64, help="Pixels of the clip's sides.")
  lengths = (128, 256, 512, 1024)
  parser.add_argument(
    "--lengths", type=common.numbers, default=lengths, help="Frames of the clips that are cut up."
  )
  parser.add_argument("--plot", help="Save a picture of the memory (PNG) here; part pieces.")
  parser.add_argument("--child", help="What the benchmark starts itself as.")
  flags = parser.parse_args(argv)
  cpu.keep_memory()  # as `main` does
  if flags.child:
    print(json.dumps(child(flags.child, flags.frames, flags.side)))
    return None
  return clip(flags) if flags.part == "clip" else pieces(flags)


# --------------------------------------------------------------------------------------------------
# One clip.


def clip(flags: Any) -> common.Row:
  steps, counts = {}, {}
  for name in MODULES:
    steps[name], counts[name] = make(name, flags.frames, flags.side)
  times = common.interleave(steps, flags.rounds, warm_up=1)
  rows = []
  for name in MODULES:
    frames = frames_of(name, flags.frames)
    median = sorted(times[name].wall)[len(times[name].wall) // 2]
    own = ratios(times[name], times["mgen_jax"], frames, flags.frames)
    rows.append(
      {
        "module": name,
        "parameters": f"{counts[name]:,}",
        "frames/s": round(frames / median, 2),
        "ours / theirs": own,
        **run_child(name, flags),
      }
    )
  return common.report("encode and decode a clip", rows, flags.out)


def ratios(theirs: common.Times, ours: common.Times, their_frames: int, frames: int) -> str:
  """Our frames/s over theirs."""
  found = common.ratios(theirs, ours)
  scale = frames / their_frames
  wall, cpu = found["ratio"] * scale, found["cpu_ratio"] * scale
  return f"{wall:.2f} (CPU time {cpu:.2f})"


def frames_of(name: str, frames: int) -> int:
  """Causal autoencoders code a first frame apart: 4 n + 1."""
  return frames if name == "mgen_jax" else frames + 1


def make(name: str, frames: int, side: int) -> tuple[Callable[[], Any], int]:
  """(a function that encodes and decodes one clip, the number of parameters)."""
  shape = (1, frames_of(name, frames), side, side, 3)
  video = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  if name == "mgen_jax":
    params = init(OURS, side)
    program = jax.jit(
      lambda params, video: Autoencoder(OURS).apply({"params": params}, video)[0],
      compiler_options=cpu.compiler_options(  # as `coding.Coder` does
        mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1]), convolutions=True
      ),
    )
    step = lambda: jax.block_until_ready(program(params, video))  # noqa: E731
    return step, sum(x.size for x in jax.tree.leaves(params))
  import torch

  model = match(name, parameters(OURS))
  pixels = torch.tensor(video.transpose(0, 4, 1, 2, 3))

  @torch.inference_mode()
  def step():
    return model.decode(model.encode(pixels).latent_dist.mode()).sample

  return step, sum(p.numel() for p in model.parameters())


def match(name: str, wanted: int) -> Any:
  """diffusers' module in the width whose number of parameters is nearest to `wanted`."""
  import diffusers
  import torch

  def build(width):
    if name == "AutoencoderKLWan":
      return diffusers.AutoencoderKLWan(base_dim=width)
    widths = tuple(width * m for m in (1, 2, 2, 4))
    return diffusers.AutoencoderKLCogVideoX(
      block_out_channels=widths, layers_per_block=2, norm_num_groups=8
    )

  def distance(width):
    with torch.device("meta"):
      return abs(sum(p.numel() for p in build(width).parameters()) - wanted)

  width = min(range(8, 129, 8), key=distance)
  return build(width).eval()


@functools.cache
def parameters(model: AutoencoderConfig) -> int:
  shape = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.float32)
  tree = jax.eval_shape(Autoencoder(model).init, jax.random.key(0), shape)
  return sum(x.size for x in jax.tree.leaves(tree))


def init(model: AutoencoderConfig, side: int) -> Any:
  video = jnp.zeros((1, 1, side, side, 3))
  return nn.unbox(jax.jit(Autoencoder(model).init)(jax.random.key(0), video))["params"]


# --------------------------------------------------------------------------------------------------
# Pieces.


def pieces(flags: Any) -> common.Row:
  rows = []
  for mode in ("blend", "exact", "whole"):
    for length in flags.lengths:
      if mode != "whole" or length <= _WHOLE:
        rows.append({"mode": mode, "frames": length, **run_child(f"{mode}:{length}", flags)})
  common.report("memory of encoding and decoding a long clip", rows, None)
  if flags.plot:
    plot(rows, flags.plot)
  frames = min(max(flags.lengths), _WHOLE)
  seams = seam(frames, flags.side)
  title = f"distance from coding {frames} frames at once"
  return common.report(title, seams, flags.out, memory=rows)


def plot(rows: Sequence[common.Row], path: str) -> None:
  """A PNG of the peaks over the frames, one curve for each mode."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6, 4), layout="constrained")
  axes = fig.subplots()
  for mode in ("blend", "exact", "whole"):
    own = [row for row in rows if row["mode"] == mode]
    axes.plot([r["frames"] for r in own], [r["peak MiB"] for r in own], marker="o", label=mode)
  axes.set(xlabel="frames", ylabel="peak of the process, MiB")
  axes.set_ylim(0, 1.1 * max(row["peak MiB"] for row in rows))
  axes.legend()
  fig.savefig(path, dpi=120)


def coder(model: AutoencoderConfig, mode: str, side: int) -> coding.Coder:
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  overlap = 16 if mode == "blend" else 0
  config = TilingConfig(mode="exact" if mode == "exact" else "blend", overlap=overlap)
  return coding.Coder(model, perturbed(model, side), config, mesh)


def perturbed(model: AutoencoderConfig, side: int) -> Any:
  """Random parameters whose temporal layers are no longer the identity."""
  leaves, tree = jax.tree.flatten(init(model, side))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def seam(frames: int, side: int) -> list[common.Row]:
  """For each mode the largest difference of the latents; largest and mean one of the frames that
  latents of the whole are decoded to, over all and over the two next to each seam."""
  video = np.random.default_rng(0).uniform(-1, 1, (frames, side, side, 3)).astype(np.float32)
  apply = jax.jit(Autoencoder(PIECES).apply)
  whole, mean, _ = (
    np.asarray(x[0]) for x in apply({"params": perturbed(PIECES, side)}, video[None])
  )
  near = np.zeros(frames, bool)
  for place in range(32, frames, 32):
    near[place - 1 : place + 1] = True
  rows = []
  for mode in ("none", "blend", "exact"):
    pieces = coder(PIECES, mode, side)
    means = np.concatenate([x for x, _ in pieces.encode([video])])
    made = np.concatenate(list(pieces.decode([mean], frames)))
    error = np.abs(made - whole).mean((1, 2, 3)) / np.abs(whole).mean()
    rows.append(
      {
        "mode": mode,
        "latents": float(np.abs(means - mean).max()),
        "largest": float(np.abs(made - whole).max()),
        "mean, relative": float(error.mean()),
        "beside seams": float(error[near].mean()),
      }
    )
  return rows


# --------------------------------------------------------------------------------------------------
# Processes of their own, for their peak memory.


def run_child(name: str, flags: Any) -> dict[str, float]:
  command = [sys.executable, "-m", "benchmarks.autoencoder", f"--child={name}"]
  command += [f"--frames={flags.frames}", f"--side={flags.side}"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def child(name: str, frames: int, side: int) -> dict[str, float]:
  if ":" not in name:
    make(name, frames, side)[0]()
    return {"peak MiB": memory("VmHWM")}
  mode, length = name.split(":")
  grown = long_clip(mode, int(length), side)
  return {"peak MiB": memory("VmHWM"), "grew MiB": grown}


def memory(key: str) -> int:
  """MiB of this process; not `getrusage`: a new process inherits its parent's peak there."""
  status = Path("/proc/self/status").read_text(encoding="ascii")
  return round(int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024)


def long_clip(mode: str, length: int, side: int) -> int | None:
  """Encodes and decodes a clip that is made, and forgotten, chunk by chunk; by how many MiB memory
  grew at most after the first frames had come back."""
  rng = np.random.default_rng(0)
  chunks = (rng.integers(0, 256, (32, side, side, 3), np.uint8) for _ in range(length // 32))
  if mode == "whole":
    video = np.concatenate(list(chunks))[None].astype(np.float32) / 127.5 - 1.0
    params = {"params": perturbed(PIECES, side)}
    jax.block_until_ready(jax.jit(Autoencoder(PIECES).apply)(params, video))
    return None
  made = coder(PIECES, mode, side)
  latents = (mean for mean, _ in made.encode(chunks))
  done, settled, most = 0, None, 0
  for video in made.decode(latents, length):
    done += len(video)
    if done >= _SETTLED:
      most = max(most, memory("VmRSS"))
      settled = most if settled is None else settled
  assert done == length
  return most - settled


if __name__ == "__main__":
  main()
