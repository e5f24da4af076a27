"""From a folder of small videos to videos made from text, on a laptop's CPU.

make quickstart
python -m mgen_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from mgen_jax import config

WORLD = {
  "split": "train",
  "motions": (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "moves up and left",
    "moves up and right",
    "moves down and left",
    "moves down and right",
  ),
  "textures": ("plain",),
  "backgrounds": ("dark grey",),
  "cameras": ("static",),
  "max_objects": 1,
  "colours": ("red", "green", "blue", "yellow", "purple", "cyan"),
  "shapes": ("circle", "square", "triangle", "cross"),
}
IMAGES = ("1x64x64", "1x48x80")
CLIPS = ("16x64x64", "16x48x80", "24x64x64", "24x48x80")


def _buckets(image: int, short: int, long: int, image_weight: float):
  """Batch sizes for images and for short and long clips; the share of image steps."""
  sizes = {1: image, 16: short, 24: long}
  entries = {}
  for name in (*(IMAGES if image else ()), *(CLIPS if short else ())):
    frames = int(name.split("x")[0])
    weight = image_weight / len(IMAGES) if frames == 1 else (1 - image_weight) / len(CLIPS)
    entries["b" + name] = {"batch": sizes[frames], "weight": weight}
  return entries


def get_config():
  generator = {
    "name": "text_to_video",
    "model": {
      "layers": 6, "width": 128, "heads": 4, "mlp_width": 384, "qk_norm": True, "cross_norm": True,
      "max_positions": (3, 5, 5), "position_std": 0.5, "context_widths": (96,),
      "dtype": "float32", "remat": "none", "scan_unroll": 6,
    },
    "text": {"width": 96, "layers": 1, "heads": 4, "mlp_width": 192, "pool": 4, "max_length": 48},
    "time_mean": -1.5,
    "sampler": {"num_steps": 24, "linear_steps": 100, "guidance": 3.0},
  }  # fmt: skip
  return config.experiment(
    name="quickstart",
    data={"marbles": {"clips": 1600, "world": WORLD}},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        "kind": "train",
        "task": {"name": "autoencoder", "l2_weight": 1.0, "kl_weight": 2e-3, "model": {
          "channels": 256, "multipliers": (1,), "patch": (8, 8, 8), "kernel": 1, "temporal": False,
          "space_down": (), "time_down": (), "mid_attention": False, "norm": "rms",
          "res_blocks": 1, "decoder_res_blocks": 1, "conv_method": "matmul",
        }},
        "steps": 2000,
        "buckets": _buckets(8, 2, 2, 0.25),
        "optimizer": {
          "lr": 4e-3, "schedule": "linear", "end_factor": 0.05, "warmup_steps": 30, "b2": 0.99,
        },
      },
      "encode": {"kind": "encode", "buckets": IMAGES + CLIPS},
      "t2i": {
        "kind": "train",
        "task": generator,
        "latents": "encode",
        "steps": 1000,
        "buckets": _buckets(32, 0, 0, 1.0),
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
      },
      "t2v": {
        "kind": "train",
        "task": generator,
        "latents": "encode",
        "init_from": "t2i",
        "steps": 1000,
        "buckets": _buckets(32, 32, 32, 0.1),
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
      },
      "evaluate": {"kind": "evaluate"},
    },
  )  # fmt: skip
