"""Latte at toy size on Marbles, on a laptop's CPU: the twin of every full-size Latte experiment.

  python -m mgen_jax.main --config=experiments/latte_marbles.py --workdir=runs/latte_marbles
  python -m mgen_jax.main --config=experiments/latte_marbles.py:ucf_joint --workdir=runs/latte_joint
  python -m mgen_jax.sample --workdir=runs/latte_marbles --class="red circle moves left"
  python -m benchmarks.latte_ablations --workdir=runs/latte_ffs      # where there is no condition

Behind the colon stands whose twin it is:

  ucf (default), ucf_joint      by class; with 8 images beside each clip     latte_xl2_ucf.py
  ffs, ffs_joint                without condition                            latte_xl2_ffs.py,
                                                                             _sky.py, _taichi.py
  t2v                           by text, PixArt-style                        latte_t2v.py

Hardware: 4 CPU cores. What it reaches, and in which time: docs/numbers.md, "Latte".

The autoencoder codes each block of 8x8 pixels of each frame by itself. A class is a colour, a shape
and a direction; all objects are large. Three choices are the toy's own (what each is for:
docs/numbers.md): it predicts the velocity on a schedule that ends in pure noise, where the motion
is decided and where the paper's predicted noise has next to no loss; positions count in fours, so
that few places and frames are told apart; and the first and last matrices are Adam's, since under
Muon they grow until the positions are drowned. By text there are two more: the text encoder stays
as it is drawn, so that words are features apart from each other, like those of the frozen T5; and
nothing is learned from images before, since models that began with them drew no direction.
"""

import itertools

from mgen_jax import config

WORLD = {
  "colours": ("red", "green", "blue", "yellow"),
  "shapes": ("circle", "square", "cross"),
  "motions": ("moves left", "moves right", "moves up", "moves down"),
  "textures": ("plain",),
  "backgrounds": ("dark grey",),
  "cameras": ("static",),
  "max_objects": 1,
  "sizes": ("large",),
}
CLASSES = tuple(
  " ".join(words)
  for words in itertools.product(WORLD["colours"], WORLD["shapes"], WORLD["motions"])
)
IMAGE, CLIP = "1x64x64", "8x64x64"
VARIANTS = ("ucf", "ucf_joint", "ffs", "ffs_joint", "t2v")

AUTOENCODER = {
  "name": "autoencoder",
  "model": {
    "channels": 128, "multipliers": (1,), "patch": (1, 8, 8), "kernel": 1, "temporal": False,
    "space_down": (), "time_down": (), "mid_attention": False, "norm": "rms", "res_blocks": 1,
    "decoder_res_blocks": 1, "latent_channels": 8, "conv_method": "matmul",
  },
  "l2_weight": 1.0,
  "kl_weight": 1e-4,
}  # fmt: skip
MODEL = {
  "layers": 6, "width": 128, "heads": 4, "in_channels": 8, "max_frames": 8, "scan_unroll": 3,
  "position_scale": 0.25, "time_scale": 0.25,
}  # fmt: skip


def _task(condition, images):
  task = {
    "name": "latte",
    "model": dict(MODEL),
    "images": images,
    "prediction": "velocity",
    "schedule": "zero_terminal_snr",
    "sampler": {"method": "ddim", "num_steps": 25, "spacing": "trailing"},
  }
  if condition == "ucf":
    task["model"]["classes"] = len(CLASSES)
    task["class_names"] = CLASSES
    task["sampler"]["guidance"] = 3.0
  elif condition == "t2v":
    task["model"] |= {"conditioning": "adaln_single", "context_widths": (64,)}
    task["text"] = {
      "width": 64, "layers": 1, "heads": 4, "mlp_width": 128, "max_words": 12, "max_length": 48,
    }  # fmt: skip
    task["sampler"]["guidance"] = 2.0
  return task


def get_config(twin="ucf"):
  if twin not in VARIANTS:
    raise config.ConfigError(f"unknown twin {twin!r}: use one of {', '.join(VARIANTS)}")
  condition, _, joint = twin.partition("_")
  muon = {"name": "muon", "schedule": "linear", "end_factor": 0.02, "warmup_steps": 30, "b2": 0.98}
  train = {"kind": "train", "log_every": 50, "checkpoint_every": 500}
  learn = {
    **train,
    "latents": "encode",
    "optimizer": {**muon, "lr": 3e-3, "muon_lr": 0.03, "adam": ("latte/patch_in", "latte/head")},
    "ema_decay": 0.99,
  }
  clips = {f"b{CLIP}": {"batch": 16}}
  stages = {
    "ingest": {"kind": "ingest"},
    "autoencoder": {
      **train,
      "task": AUTOENCODER,
      "steps": 600,
      "buckets": {f"b{IMAGE}": {"batch": 32}, f"b{CLIP}": {"batch": 8}},
      "optimizer": {**muon, "lr": 3e-3, "muon_lr": 0.03},
      "ema_decay": 0.98,
    },
    "encode": {"kind": "encode", "buckets": (IMAGE, CLIP)},
  }
  task = _task(condition, 8 if joint else 0)
  if condition == "t2v":
    learn["frozen"] = ("text",)  # as the paper's T5 is
  stages["latte"] = {**learn, "task": task, "steps": 2000, "buckets": clips}
  # Without a condition there is nothing to be right or wrong, but an object to be seen or not.
  asked = {"colour": 0.9, "direction": 0.8, "shape": 0.7}
  targets = {"of_world": 0.8} if condition == "ffs" else asked
  stages["evaluate"] = {
    "kind": "evaluate", "generator": "latte", "bucket": CLIP, "targets": targets,
  }  # fmt: skip
  return config.experiment(
    name=f"latte_marbles_{twin}",
    data={
      "fps": 4.0,  # every second frame: 8 frames are 2 seconds
      "marbles": {
        "clips": 3000, "sizes": ((64, 64),), "frames": (16,), "sound": False, "world": WORLD,
      },
    },
    stages=stages,
  )  # fmt: skip
