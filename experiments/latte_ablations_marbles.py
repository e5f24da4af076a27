"""The ablations of Latte at toy size: all arms on the same latents, with the same budget.

  python -m mgen_jax.main --config=experiments/latte_ablations_marbles.py --workdir=runs/ablations
  python -m benchmarks.latte_ablations --workdir=runs/ablations

The second command draws the table: a Frechet distance on fixed features, and how often the judge
sees the colour, shape and direction of the class. Each arm is one change of v1; interval_1 learns
clips of every frame in place of every second.

Objective, positions and optimizer are those of latte_marbles.py, for the reasons given there.
Hardware: 4 CPU cores. Time and table: docs/numbers.md, "Latte". notebooks/latte_ablations.ipynb
does both on a smaller budget.
"""

import itertools

from mgen_jax import config

WORLD = {
  "colours": ("red", "green", "blue"),
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
MODEL = {
  "layers": 4, "width": 96, "heads": 4, "in_channels": 8, "max_frames": 8, "scan_unroll": 2,
  "classes": len(CLASSES), "position_scale": 0.25, "time_scale": 0.25,
}  # fmt: skip
ARMS = {
  "v1": {},
  "v2": {"variant": 2},
  "v3": {"variant": 3, "layers": 3},  # 22 d^2 parameters a block, where the others have 18 d^2
  "v4": {"variant": 4},
  "compression": {"embedding": "compression"},
  "all_tokens": {"conditioning": "all_tokens"},
  "rotary": {"time_encoding": "rotary"},
}
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


def get_config():
  muon = {"name": "muon", "schedule": "linear", "end_factor": 0.02, "warmup_steps": 30, "b2": 0.98}
  train = {"kind": "train", "log_every": 25, "checkpoint_every": 500}
  optimizer = {**muon, "lr": 3e-3, "muon_lr": 0.03}
  ends = ("latte/patch_in", "latte/head")

  def arm(changes, bucket=CLIP, batch=16, **stage):
    task = {
      "name": "latte",
      "model": MODEL | changes,
      "class_names": CLASSES,
      "prediction": "velocity",
      "schedule": "zero_terminal_snr",
      "sampler": {"method": "ddim", "num_steps": 25, "spacing": "trailing", "guidance": 3.0},
    }
    return {
      **train, "task": task, "latents": "encode", "optimizer": {**optimizer, "adam": ends},
      "ema_decay": 0.99, "steps": 400, "buckets": {f"b{bucket}": {"batch": batch}}, **stage,
    }  # fmt: skip

  stages = {
    "ingest": {"kind": "ingest"},
    "autoencoder": {
      **train, "task": AUTOENCODER, "steps": 300, "optimizer": optimizer, "ema_decay": 0.98,
      "buckets": {f"b{IMAGE}": {"batch": 32}, f"b{CLIP}": {"batch": 8}},
    },
    "encode": {"kind": "encode", "buckets": (IMAGE, CLIP)},
    **{name: arm(changes) for name, changes in ARMS.items()},
    "joint": arm({}),
    # What ImageNet is for the real one: the same blocks have learned pictures first.
    "images": arm({}, IMAGE, 64),
    "image_start": arm({}, init_from="images"),
    "ingest_1": {"kind": "ingest", "dataset": "every_frame"},
    "encode_1": {"kind": "encode", "ingest": "ingest_1", "buckets": (CLIP,)},
    "interval_1": arm({}, latents="encode_1"),
  }  # fmt: skip
  stages["joint"]["task"]["images"] = 8
  marbles = {
    "clips": 1600, "sizes": ((64, 64),), "frames": (16,), "sound": False, "world": WORLD,
  }  # fmt: skip
  return config.experiment(
    name="latte_ablations_marbles",
    data={"fps": 4.0, "marbles": marbles},
    datasets={"every_frame": {"fps": 8.0, "marbles": marbles}},
    stages=stages,
  )
