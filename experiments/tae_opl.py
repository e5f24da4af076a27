"""The paper's ablation of the outlier penalty (Table 12): 50k steps, then 10k with it, against 20k
without.

  python -m mgen_jax.main --config=experiments/tae_opl.py:toy
  python -m mgen_jax.main --config=experiments/tae_opl.py:full

The smaller autoencoder of the paper's ablations (4x4x4, 8 channels) at 512 px. The reconstruct
stage also reports the spot statistic: the largest normalised latent norm, which the penalty is to
lower. Hardware: full, 64 devices of 80 GB, not run by us; toy, 4 CPU cores, Marbles at 64 px, both
arms of as many steps, figures in docs/numbers.md, "Autoencoders".
"""

from mgen_jax import config

VARIANTS = ("full", "toy")
# The words of the quickstart.
WORLD = {
  "colours": ("red", "green", "blue", "yellow", "purple", "cyan"),
  "shapes": ("circle", "square", "triangle", "cross"),
  "textures": ("plain",),
  "backgrounds": ("dark grey",),
  "cameras": ("static",),
  "max_objects": 1,
}
MARBLES = {"clips": 1000, "sizes": ((64, 64),), "frames": (16,), "sound": False, "world": WORLD}


def devices(arm="full"):
  """Devices of each train stage."""
  return dict.fromkeys(("base", "penalised", "plain"), 64 if arm == "full" else 1)


def _full(steps, frames=16, side=512, **task):
  adam = {"b1": 0.5, "b2": 0.9, "lr": 1e-4, "warmup_steps": 1000}
  model = {
    "multipliers": (1, 2, 4),
    "space_down": (0, 1),
    "time_down": (0, 1),
    "latent_channels": 8,
    "dtype": "bfloat16",
    "remat": True,
  }
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": model, "perceptual_weight": 1.0, **task},
    "steps": steps,
    "buckets": {
      f"b1x{side}x{side}": {"batch": 256, "weight": 1.0},
      f"b{frames}x{side}x{side}": {"batch": 64, "weight": 3.0},
    },
    "optimizer": adam,
    "ema_decay": 0.9995,
    "log_every": 25,
    "checkpoint_every": 1000,
    "threads": 16,
  }


def _toy(steps, **task):
  muon = {"name": "muon", "lr": 3e-3, "muon_lr": 0.03, "schedule": "linear", "end_factor": 0.02}
  model = {
    "channels": 64,
    "multipliers": (1, 1),
    "res_blocks": 1,
    "decoder_res_blocks": 1,
    "patch": (2, 4, 4),
    "space_down": (),
    "time_down": (0,),
    "latent_channels": 8,
    "mid_attention": False,
    "norm": "rms",
    "conv_method": "matmul",
  }
  losses = {"l1_weight": 0.0, "l2_weight": 1.0, "kl_weight": 1e-6}
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": model, **losses, **task},
    "steps": steps,
    # 256 latents a frame: among 64, as of 32 px, one object alone cannot lie far outside the rest.
    "buckets": {
      "b1x64x64": {"batch": 8, "weight": 1.0},
      "b8x64x64": {"batch": 4, "weight": 3.0},
    },
    "optimizer": {**muon, "warmup_steps": 20, "b2": 0.98},
    "ema_decay": 0.95,
    "log_every": 25,
    "checkpoint_every": 250,
  }


def get_config(arm="full"):
  if arm not in VARIANTS:
    raise config.ConfigError(f"unknown arm {arm!r}: use one of {', '.join(VARIANTS)}")
  toy = arm == "toy"
  make = _toy if toy else _full
  base, penalised, plain = (400, 160, 160) if toy else (50_000, 10_000, 20_000)
  bucket = (8, 64) if toy else (16, 512)
  # The paper's weight of 1e5, beside means over the pixels of a clip.
  weight = 1e5 / (3 * bucket[0] * bucket[1] ** 2)
  return config.experiment(
    name="tae_opl_toy" if toy else "tae_opl",
    data={"marbles": MARBLES, "held_out": 0.06} if toy else {"videos": "data/videos"},
    stages={
      "ingest": {"kind": "ingest"},
      "base": make(base),
      "penalised": {**make(penalised, outlier_weight=weight), "init_from": "base"},
      "plain": {**make(plain), "init_from": "base"},
      "reconstruct": {
        "kind": "reconstruct",
        "autoencoders": ("base", "penalised", "plain"),
        "buckets": (f"{bucket[0]}x{bucket[1]}x{bucket[1]}", f"1x{bucket[1]}x{bucket[1]}"),
      },
    },
  )
