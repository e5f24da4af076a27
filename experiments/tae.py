"""The temporal autoencoder of Movie Gen (section 3.1.1): 8x8x8, 16 channels, images and videos.

  python -m mgen_jax.main --config=experiments/tae.py:toy
  python -m mgen_jax.main --config=experiments/tae.py:full \\
      --config.stages.tae_256.task.image_weights=sd3_vae.safetensors

full  Stable Diffusion's layout, inflated to 2.5D; starts from the weights of an image autoencoder
      of 16 channels where they are named, else from random ones. 256 px, then 512 px; one batch
      of images to three of videos, as in the paper; a patch discriminator from step 20,000 on.
      Hardware: 64 devices of 80 GB; not run by us. Widths, steps, rates and the weights of the
      losses are ours: the paper states none of them.
toy   on Marbles at 64 px, against a frame-wise autoencoder of 8 channels trained for as many steps
      of as many FLOPs: the paper's Table 10 in small. Hardware: 4 CPU cores; figures in
      docs/numbers.md, "Autoencoders".
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

# Positions of 4x8x8 pixels, then of 8x8x8: convolutions next to the pixels are too slow on a CPU.
TOY_MODEL = {
  "channels": 96,
  "multipliers": (1, 1),
  "res_blocks": 1,
  "decoder_res_blocks": 1,
  "patch": (4, 8, 8),
  "space_down": (),
  "time_down": (0,),
  "mid_attention": False,
  "norm": "rms",
  "conv_method": "matmul",
}
TOY_FRAME_WISE = {
  **TOY_MODEL,
  "multipliers": (1,),
  "patch": (1, 8, 8),
  "time_down": (),
  "temporal": False,
  "latent_channels": 8,
}
# 32 single frames cost the frame-wise model what 8 clips of 16 frames cost the temporal one.
TOY_BUCKETS = {"b1x64x64": {"batch": 16, "weight": 1.0}, "b16x64x64": {"batch": 8, "weight": 3.0}}
TOY_FRAMES = {"b1x64x64": {"batch": 32}}


def devices(arm="full"):
  """Devices of each train stage."""
  return {"tae_256": 64, "tae_512": 64} if arm == "full" else {"tae": 1, "frame_wise": 1}


def toy_train(model, steps, buckets):
  """A stage that trains a toy on Marbles."""
  muon = {"name": "muon", "lr": 3e-3, "muon_lr": 0.03, "schedule": "linear", "end_factor": 0.02}
  losses = {"l1_weight": 0.0, "l2_weight": 1.0, "kl_weight": 1e-4}
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": model, **losses},
    "steps": steps,
    "buckets": buckets,
    "optimizer": {**muon, "warmup_steps": 20, "b2": 0.98},
    "ema_decay": 0.98,
    "log_every": 25,
    "checkpoint_every": 250,
  }


def full_train(side, batch, model, steps, start_step=0, **task):
  """A stage of the full size: clips of 16 frames and images of `side` pixels."""
  frames = 16
  losses = {
    "l1_weight": 1.0,
    "perceptual_weight": 1.0,
    "kl_weight": 1e-6,
    "outlier_weight": 1e5 / (3 * frames * side * side),  # the paper's, beside means
    "discriminator": {"weight": 0.5, "kind": "3d", "start_step": start_step},
  }
  adam = {"b1": 0.5, "b2": 0.9, "lr": 1e-4, "warmup_steps": 1000}
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": model, **losses, **task},
    "steps": steps,
    "buckets": {
      f"b1x{side}x{side}": {"batch": batch * 4, "weight": 1.0},
      f"b{frames}x{side}x{side}": {"batch": batch, "weight": 3.0},
    },
    "optimizer": adam,
    "optimizers": {"discriminator": adam},
    "ema_decay": 0.9995,
    "log_every": 25,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "threads": 16,
  }


def get_config(arm="full"):
  if arm not in VARIANTS:
    raise config.ConfigError(f"unknown arm {arm!r}: use one of {', '.join(VARIANTS)}")
  if arm == "toy":
    return config.experiment(
      name="tae_toy",
      data={"marbles": MARBLES, "held_out": 0.06},
      stages={
        "ingest": {"kind": "ingest"},
        "tae": toy_train(TOY_MODEL, 700, TOY_BUCKETS),
        "frame_wise": toy_train(TOY_FRAME_WISE, 700, TOY_FRAMES),
        "reconstruct": {
          "kind": "reconstruct",
          "autoencoders": ("tae", "frame_wise"),
          "buckets": ("16x64x64", "1x64x64"),
        },
      },
    )
  model = {"dtype": "bfloat16", "remat": True}
  return config.experiment(
    name="tae",
    data={"videos": "data/videos", "held_out": 0.001},
    stages={
      "ingest": {"kind": "ingest"},
      "tae_256": full_train(256, 128, model, 150_000, start_step=20_000),
      "tae_512": {**full_train(512, 64, model, 50_000), "init_from": "tae_256"},
      "reconstruct": {
        "kind": "reconstruct",
        "autoencoders": ("tae_256", "tae_512"),
        "buckets": ("16x512x512", "1x512x512"),
      },
    },
  )
