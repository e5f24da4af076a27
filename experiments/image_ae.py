"""The frame-wise image autoencoder: no layer sees two frames.

  python -m mgen_jax.main --config=experiments/image_ae.py:toy
  python -m mgen_jax.main --config=experiments/image_ae.py:full

Movie Gen codes single frames in its text-to-image model and in its upsampler (section 3.1.6), and
compares its temporal autoencoder with one (Table 10). It is also what a temporal one starts from: a
stage of `experiments/tae.py` may name this one in `init_from`, and is then inflated.

full  Stable Diffusion's layout, 16 channels, 256 px and then 512 px. Hardware: 64 devices of 80 GB;
      not run by us.
toy   on frames of Marbles at 64 px, then inflated in time and trained on clips. Hardware: 4 CPU
      cores, minutes.
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
  if arm == "full":
    return {"image_256": 64, "image_512": 64}
  return {"image": 1, "inflated": 1}


def _train(task, steps, buckets, optimizer, **rest):
  common = {"kind": "train", "log_every": 25, "checkpoint_every": 1000, "threads": 4}
  return {
    **common,
    "task": {"name": "autoencoder", **task},
    "steps": steps,
    "buckets": buckets,
    "optimizer": optimizer,
    **rest,
  }


def _toy():
  image = {
    "channels": 48,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "decoder_res_blocks": 1,
    "patch": (1, 4, 4),
    "space_down": (0,),
    "time_down": (),
    "temporal": False,
    "mid_attention": False,
    "norm": "rms",
    "conv_method": "matmul",
  }
  muon = {"name": "muon", "lr": 3e-3, "muon_lr": 0.03, "schedule": "linear", "warmup_steps": 20}
  losses = {"l1_weight": 0.0, "l2_weight": 1.0, "kl_weight": 1e-4}
  inflated = {**image, "temporal": True, "time_down": (0,)}
  images, clips = {"b1x64x64": {"batch": 32}}, {"b8x64x64": {"batch": 8, "weight": 3.0}}
  return {
    "image": _train({"model": image, **losses}, 300, images, muon, ema_decay=0.98),
    "inflated": _train(
      {"model": inflated, **losses}, 200, images | clips, muon, ema_decay=0.98, init_from="image"
    ),
    "reconstruct": {
      "kind": "reconstruct",
      "autoencoders": ("image", "inflated"),
      "buckets": ("8x64x64", "1x64x64"),
    },
  }


def _full():
  model = {"temporal": False, "time_down": (), "dtype": "bfloat16", "remat": True}
  adam = {"b1": 0.5, "b2": 0.9, "lr": 1e-4, "warmup_steps": 1000}

  def stage(side, batch, steps, start_step, **rest):
    losses = {
      "perceptual_weight": 1.0,
      "outlier_weight": 1e5 / (3 * side * side),  # the paper's, beside means
      "discriminator": {"weight": 0.5, "start_step": start_step},
    }
    buckets = {f"b1x{side}x{side}": {"batch": batch}}
    players = {"optimizers": {"discriminator": adam}, "ema_decay": 0.9995}
    return _train({"model": model, **losses}, steps, buckets, adam, **players, **rest)

  return {
    "image_256": stage(256, 512, 300_000, 50_000),
    "image_512": stage(512, 256, 100_000, 0, init_from="image_256"),
    "reconstruct": {
      "kind": "reconstruct",
      "autoencoders": ("image_256", "image_512"),
      "buckets": ("1x512x512",),
    },
  }


def get_config(arm="full"):
  if arm not in VARIANTS:
    raise config.ConfigError(f"unknown arm {arm!r}: use one of {', '.join(VARIANTS)}")
  toy = arm == "toy"
  return config.experiment(
    name="image_ae_toy" if toy else "image_ae",
    data={"marbles": MARBLES, "held_out": 0.06} if toy else {"videos": "data/images"},
    stages={"ingest": {"kind": "ingest"}, **(_toy() if toy else _full())},
  )
