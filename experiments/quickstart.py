"""From a folder of small videos to videos made from text, on a laptop's CPU.

  make quickstart
  python -m mgen_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart
  python -m mgen_jax.main --config=experiments/quickstart.py --workdir=runs/mine \\
      --config.data.videos=DIR

Hardware: 4 CPU cores. Time, memory and accuracies: docs/numbers.md, "Quickstart".

Everything is the full-size code by config, at toy size. Four choices are the toy's own: the
autoencoder codes each block of 8x8x8 pixels by itself (convolutions train too slowly on a CPU), the
times of flow matching lean to the noise (`time_mean`), where the place of the one object is
decided, a word of the caption is one feature, and all objects are large: a small one is less than
two blocks wide (docs/numbers.md has what both sizes gave).
"""

from mgen_jax import config

WORLD = {
  "colours": ("red", "green", "blue", "yellow", "purple", "cyan"),
  "shapes": ("circle", "square", "triangle", "cross"),
  "motions": (
    *("moves left", "moves right", "moves up", "moves down"),
    *("moves up and left", "moves up and right", "moves down and left", "moves down and right"),
  ),
  "textures": ("plain",),
  "backgrounds": ("dark grey",),
  "cameras": ("static",),
  "max_objects": 1,
  "sizes": ("large",),
  "split": "train",  # some combinations of colour, shape and motion are kept for the evaluation
}
IMAGES = ("1x64x64", "1x48x80")
CLIPS = ("16x64x64", "16x48x80")
LONG_CLIPS = ("24x64x64", "24x48x80")

AUTOENCODER = {
  "name": "autoencoder",
  "model": {
    "channels": 128,
    "multipliers": (1,),
    "patch": (8, 8, 8),
    "kernel": 1,
    "temporal": False,
    "space_down": (),
    "time_down": (),
    "mid_attention": False,
    "norm": "rms",
    "res_blocks": 1,
    "decoder_res_blocks": 1,
    "conv_method": "matmul",
  },
  "l2_weight": 1.0,
  "kl_weight": 1e-3,
}
GENERATOR = {
  "name": "text_to_video",
  "model": {
    "layers": 4,
    "width": 192,
    "heads": 6,
    "mlp_width": 384,
    "qk_norm": True,
    "cross_norm": True,
    "max_positions": (3, 5, 5),
    "position_std": 0.5,
    "context_widths": (64,),
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 4,
  },
  "text": {
    "width": 64,
    "layers": 1,
    "heads": 4,
    "mlp_width": 128,
    "max_words": 12,
    "max_length": 48,
  },
  "time_mean": -1.0,
  "sampler": {"num_steps": 24, "grid": "quadratic", "guidance": 4.0},
}


def _buckets(names, batch, share):
  """The buckets `names`, `batch` examples each; together they get `share` of the steps."""
  return {"b" + name: {"batch": batch, "weight": share / len(names)} for name in names}


def get_config():
  train = {"kind": "train", "log_every": 50, "checkpoint_every": 250, "small_buckets": "repeat"}
  muon = {"name": "muon", "schedule": "linear", "end_factor": 0.02, "warmup_steps": 30, "b2": 0.98}
  generate = {
    **train,
    "task": GENERATOR,
    "latents": "encode",
    "optimizer": {**muon, "lr": 5e-3, "muon_lr": 0.04},
    "ema_decay": 0.99,
  }
  return config.experiment(
    name="quickstart",
    data={
      "marbles": {"clips": 5000, "frames": (16, 16, 24), "sound": False, "world": WORLD},
    },
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        **train,
        "task": AUTOENCODER,
        "steps": 500,
        "buckets": _buckets(IMAGES, 24, 0.25) | _buckets(CLIPS + LONG_CLIPS, 8, 0.75),
        "optimizer": {**muon, "lr": 3e-3, "muon_lr": 0.03},
        "ema_decay": 0.98,
      },
      "encode": {"kind": "encode", "buckets": IMAGES + CLIPS + LONG_CLIPS},
      "t2i": {**generate, "steps": 400, "buckets": _buckets(IMAGES, 64, 1.0)},
      "t2v": {
        **generate,
        "init_from": "t2i",
        "steps": 1600,
        "buckets": _buckets(IMAGES, 64, 0.1)
        | _buckets(CLIPS, 32, 0.6)
        | _buckets(LONG_CLIPS, 32, 0.3),
      },
      "evaluate": {
        "kind": "evaluate",
        "targets": {
          "colour": 0.9,
          "direction": 0.8,
          "shape": 0.7,
          "psnr": 25.0,
          "seconds": 600.0,
          "peak_memory_gib": 8.0,
        },
      },
    },
  )
