"""From a folder of small videos to videos made from text, on a laptop's CPU.

make quickstart
python -m mgen_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from mgen_jax import config

WORLD = {
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
  model = {
    "layers": 6, "width": 192, "heads": 6, "mlp_width": 512, "qk_norm": True, "cross_norm": True,
    "max_positions": (4, 8, 8), "context_widths": (128,), "dtype": "float32", "remat": "none",
    "scan_unroll": 6,
  }  # fmt: skip
  generator = {
    "name": "text_to_video",
    "model": model,
    "sampler": {"num_steps": 24, "guidance": 4.0},
  }
  return config.experiment(
    name="quickstart",
    data={"marbles": {"clips": 1600, "world": WORLD}},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        "kind": "train",
        "task": {"name": "autoencoder", "model": {
          "channels": 32, "multipliers": (1, 2), "res_blocks": 1, "decoder_res_blocks": 1,
          "space_down": (0,), "time_down": (0, 1), "mid_attention": False, "patch": (2, 4, 4),
          "groups": 8, "conv_method": "matmul",
        }},
        "steps": 400,
        "buckets": _buckets(32, 8, 6, 0.25),
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 20},
      },
      "encode": {"kind": "encode", "buckets": IMAGES + CLIPS},
      "t2i": {
        "kind": "train",
        "task": generator,
        "latents": "encode",
        "steps": 1000,
        "buckets": _buckets(64, 0, 0, 1.0),
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
      },
      "t2v": {
        "kind": "train",
        "task": generator,
        "latents": "encode",
        "init_from": "t2i",
        "steps": 1000,
        "buckets": _buckets(64, 64, 64, 0.1),
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
      },
      "evaluate": {"kind": "evaluate"},
    },
  )  # fmt: skip
