"""Latte-XL/2 on SkyTimelapse, with the paper's recipe.

  python -m data_pipelines.datasets --name=sky_timelapse --source=DIR --out=data/sky
  python -m mgen_jax.main --config=experiments/latte_xl2_sky.py --workdir=runs/latte_sky
  python -m mgen_jax.main --config=experiments/latte_xl2_sky.py:joint \\
      --workdir=runs/latte_sky_joint
  python -m mgen_jax.sample --workdir=runs/latte_sky --samples=4

Hardware: 8 devices with 80 GB (the paper's: A100, about a week), global batch 40; one of them with
accumulate=8, or 8 of 16 GB with remat "full" as it is (plans: docs/numbers.md). Not run with this
code. Behind the colon: video, or joint with 8 images beside each of 32 clips.

As released: AdamW at 1e-4 without decay, gradients clipped at norm 0.1 from step 20,000 on, EMA
0.9999, latents drawn from their distribution and multiplied by 0.18215, 250 steps of DDPM. Ours:
bf16 compute (they: fp32 with TF32), windows of 16 frames drawn once and not anew in every epoch.
The released autoencoder is Stable Diffusion's; here one of its architecture is trained first. To
start from DiT, as in the paper's ablation, or from a released Latte, set stages.latte.init_weights
to a safetensors file.
"""

from mgen_jax import config

VARIANTS = ("video", "joint")
CLIP, IMAGE = "16x256x256", "1x256x256"
AUTOENCODER = {"temporal": False, "time_down": (), "latent_channels": 4, "dtype": "bfloat16"}


def devices(kind="video"):
  """Devices of each train stage."""
  return {"autoencoder": 8, "latte": 8}


def get_config(kind="video"):
  if kind not in VARIANTS:
    raise config.ConfigError(f"unknown variant {kind!r}: use one of {', '.join(VARIANTS)}")
  joint = kind == "joint"
  train = {"kind": "train", "log_every": 100, "checkpoint_every": 5000, "ema_decay": 0.9999}
  return config.experiment(
    name=f"latte_xl2_sky_{kind}",
    data={"videos": "data/sky", "held_out": 0.01},
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
        "kind": "encode", "buckets": (IMAGE, CLIP), "batch": 8, "latent_scale": 0.18215,
      },
      "latte": {
        **train,
        "task": {
          "name": "latte",
          "model": config.latte("XL/2", dtype="bfloat16", remat="full"),
          "images": 8 if joint else 0,
          "sampler": {"method": "ddpm", "num_steps": 250},
        },
        "latents": "encode",
        "posterior": "sample",
        "steps": 1_000_000,
        "buckets": {f"b{CLIP}": {"batch": 32 if joint else 40}},
        "optimizer": {
          "lr": 1e-4, "b2": 0.999, "clip_norm": 0.1, "clip_from": 20_000,
        },
        "threads": 16,
      },
    },
  )  # fmt: skip
