"""Latte from text: PixArt-alpha in space, temporal blocks between, 16 frames of 512 pixels.

  python -m mgen_jax.main --config=experiments/latte_t2v.py --workdir=runs/latte_t2v
  python -m mgen_jax.sample --workdir=runs/latte_t2v --prompt="a dog wearing sunglasses"

Hardware: 64 devices with 80 GB, ours; neither batch, steps nor hardware are published. Not run with
this code. The training of the released model never was released either; what is known of it: its
spatial blocks start from PixArt-alpha (stages.latte.init_weights, a safetensors file), its videos
are WebVid-10M and Vimeo25M in equal shares, it also learned images.

Needs a folder of videos with captions (data.videos) and, in the records of the encode stage, T5
features of at most 120 tokens as "text_t5" (see mgen_jax/tasks/text_inputs.py).
"""

from mgen_jax import config

CLIP, IMAGE = "16x512x512", "1x512x512"
AUTOENCODER = {"temporal": False, "time_down": (), "latent_channels": 4, "dtype": "bfloat16"}


def devices():
  """Devices of each train stage."""
  return {"autoencoder": 64, "latte": 64}


def get_config():
  train = {"kind": "train", "log_every": 100, "checkpoint_every": 2000, "ema_decay": 0.9999}
  model = config.latte(
    "XL/2",
    layers=56,
    conditioning="adaln_single",
    context_widths=(4096,),
    dtype="bfloat16",
    remat="full",
  )
  return config.experiment(
    name="latte_t2v",
    data={"videos": "data/videos", "held_out": 0.001},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        **train,
        "task": {"name": "autoencoder", "model": AUTOENCODER},
        "steps": 50_000,
        "buckets": {f"b{IMAGE}": {"batch": 128}},
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
        "task": {
          "name": "latte",
          "model": model,
          "text": {"kind": "features", "names": ("t5",), "widths": (4096,), "lengths": (120,)},
          "images": 8,
          "sampler": {"method": "ddim", "num_steps": 50, "guidance": 7.5},
        },
        "latents": "encode",
        "posterior": "sample",
        "steps": 300_000,
        "buckets": {f"b{CLIP}": {"batch": 128}},
        "optimizer": {"lr": 1e-4, "b2": 0.999, "clip_norm": 0.1, "warmup_steps": 1000},
        "threads": 16,
      },
    },
  )
