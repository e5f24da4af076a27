"""The paper's ablations of Latte on FaceForensics: one run for each arm behind the colon.

  python -m data_pipelines.datasets --name=faceforensics --source=DIR --out=data/ffs
  python -m mgen_jax.main --config=experiments/latte_ablations.py:v2 --workdir=runs/ablations_v2

  v1 v2 v3 v4                   the variants
  compression                   against uniform patch embedding
  all_tokens                    against S-AdaLN
  rotary                        against absolute sines and cosines of time
  interval_N                    frames N apart, from data/ffs_interval_N, prepared with --interval=N
  imagenet                      start from DiT: weights/DiT-XL-2-256x256.safetensors
  size_s size_b size_l          against XL

Arms can be joined: `v2+rotary+size_b`. Hardware: 8 devices with 80 GB for each arm, global batch 40
as in the paper, whose curves end at 150,000 steps. Not run with this code; the toy twin is
latte_ablations_marbles.py.
"""

from mgen_jax import config

VARIANTS = (
  *("v1", "v2", "v3", "v4", "compression", "all_tokens", "rotary", "interval_8", "imagenet"),
  *("size_s", "size_b", "size_l"),
)
CLIP, IMAGE = "16x256x256", "1x256x256"
AUTOENCODER = {"temporal": False, "time_down": (), "latent_channels": 4, "dtype": "bfloat16"}


def devices(arms="v1"):
  """Devices of each train stage."""
  return {"autoencoder": 8, "latte": 8}


def get_config(arms="v1"):
  size, variant, changes, data, weights = "XL/2", 1, {}, "data/ffs", None
  for arm in arms.split("+"):
    word, _, value = arm.partition("_")
    if arm in ("v1", "v2", "v3", "v4"):
      variant = int(arm[1])
    elif arm == "compression":
      changes["embedding"] = "compression"
    elif arm == "all_tokens":
      changes["conditioning"] = "all_tokens"
    elif arm == "rotary":
      changes["time_encoding"] = "rotary"
    elif arm == "imagenet":
      weights = "weights/DiT-XL-2-256x256.safetensors"
    elif word == "interval" and value.isdigit():
      data = f"data/ffs_interval_{value}"
    elif word == "size" and value in ("s", "b", "l", "xl"):
      size = f"{value.upper()}/2"
    else:
      raise config.ConfigError(f"unknown arm {arm!r}: use {', '.join(VARIANTS)}, joined by '+'")
  train = {"kind": "train", "log_every": 100, "checkpoint_every": 5000, "ema_decay": 0.9999}
  model = config.latte(size, variant=variant, dtype="bfloat16", remat="full", **changes)
  return config.experiment(
    name=f"latte_ablations_{arms}",
    data={"videos": data, "held_out": 0.01},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        **train,
        "task": {"name": "autoencoder", "model": AUTOENCODER},
        "steps": 50_000,
        "buckets": {f"b{IMAGE}": {"batch": 64}},
        "optimizer": {"lr": 1e-4, "warmup_steps": 1000},
      },
      "encode": {
        "kind": "encode",
        "buckets": (IMAGE, CLIP),
        "batch": 8,
        "latent_scale": 0.18215,
      },
      "latte": {
        **train,
        "task": {"name": "latte", "model": model},
        "latents": "encode",
        "posterior": "sample",
        "init_weights": weights,
        "steps": 150_000,
        "buckets": {f"b{CLIP}": {"batch": 40}},
        "optimizer": {"lr": 1e-4, "b2": 0.999, "clip_norm": 0.1, "clip_from": 20_000},
        "threads": 16,
      },
    },
  )
