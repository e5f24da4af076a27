"""The paper's ablation of the inflation (Table 11): 2.5D against 3D, all else alike.

  python -m mgen_jax.main --config=experiments/tae_3d.py:toy
  python -m mgen_jax.main --config=experiments/tae_3d.py:full

Both arms are the smaller autoencoder of the paper's ablations: 4x4x4 compression, 8 channels. The
paper found 3D better by 0.3 dB and too costly for that. Hardware: full, 64 devices of 80 GB, 256
px, not run by us; toy, 4 CPU cores, Marbles at 64 px, figures in docs/numbers.md, "Autoencoders".
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
ARMS = {"inflated": "2.5d", "volume": "3d"}


def devices(arm="full"):
  """Devices of each train stage."""
  return dict.fromkeys(ARMS, 64 if arm == "full" else 1)


def _toy(inflation):
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
    "inflation": inflation,
  }
  task = {"l1_weight": 0.0, "l2_weight": 1.0, "kl_weight": 1e-4}
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": model, **task},
    "steps": 150,
    "buckets": {
      "b1x32x32": {"batch": 16, "weight": 1.0},
      "b8x32x32": {"batch": 8, "weight": 3.0},
    },
    "optimizer": {**muon, "warmup_steps": 20, "b2": 0.98},
    "ema_decay": 0.95,
    "log_every": 25,
    "checkpoint_every": 150,
  }


def _full(inflation):
  frames, side = 16, 256
  model = {
    "multipliers": (1, 2, 4),
    "space_down": (0, 1),
    "time_down": (0, 1),
    "latent_channels": 8,
    "inflation": inflation,
    "dtype": "bfloat16",
    "remat": True,
  }
  adam = {"b1": 0.5, "b2": 0.9, "lr": 1e-4, "warmup_steps": 1000}
  return {
    "kind": "train",
    "task": {
      "name": "autoencoder",
      "model": model,
      "perceptual_weight": 1.0,
      "discriminator": {"weight": 0.5, "kind": "3d", "start_step": 10_000},
    },
    "steps": 50_000,
    "buckets": {
      f"b1x{side}x{side}": {"batch": 512, "weight": 1.0},
      f"b{frames}x{side}x{side}": {"batch": 128, "weight": 3.0},
    },
    "optimizer": adam,
    "optimizers": {"discriminator": adam},
    "ema_decay": 0.9995,
    "log_every": 25,
    "checkpoint_every": 1000,
    "threads": 16,
  }


def get_config(arm="full"):
  if arm not in VARIANTS:
    raise config.ConfigError(f"unknown arm {arm!r}: use one of {', '.join(VARIANTS)}")
  toy = arm == "toy"
  return config.experiment(
    name="tae_3d_toy" if toy else "tae_3d",
    data={"marbles": MARBLES, "held_out": 0.06} if toy else {"videos": "data/videos"},
    stages={
      "ingest": {"kind": "ingest"},
      **{name: (_toy if toy else _full)(inflation) for name, inflation in ARMS.items()},
      "reconstruct": {
        "kind": "reconstruct",
        "autoencoders": tuple(ARMS),
        "buckets": ("8x32x32",) if toy else ("16x256x256",),
      },
    },
  )
