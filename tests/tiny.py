"""The quickstart's recipe, so small that it runs in seconds and learns nothing: for tests.

python -m mgen_jax.main --config=tests/tiny.py --workdir=DIR
"""

from mgen_jax import config

IMAGES = ("1x32x32",)
CLIPS = ("4x32x32", "8x32x48")


def _buckets(names, batch=8):
  return {"b" + name: {"batch": batch} for name in names}


def get_config():
  autoencoder = {
    "name": "autoencoder",
    # The quickstart's kind: one with convolutions in time takes five times as long to trace.
    "model": {
      "channels": 8, "multipliers": (1,), "res_blocks": 1, "decoder_res_blocks": 1, "kernel": 1,
      "latent_channels": 4, "patch": (4, 8, 8), "space_down": (), "time_down": (),
      "temporal": False, "mid_attention": False, "norm": "rms", "conv_method": "matmul",
    },
  }  # fmt: skip
  generator = {
    "name": "text_to_video",
    "model": {
      "layers": 2, "width": 32, "heads": 2, "mlp_width": 64, "in_channels": 4, "out_channels": 4,
      "max_positions": (2, 2, 3), "context_widths": (16,), "dtype": "float32", "remat": "none",
    },
    "text": {"width": 16, "heads": 2, "layers": 1, "mlp_width": 32},
    "stride": (4, 8, 8),
    "sampler": {"num_steps": 4, "guidance": 2.0},
  }  # fmt: skip
  # Images need one frame and 2x2 patches: the position tables grow between the stages.
  image_generator = {**generator, "model": {**generator["model"], "max_positions": (1, 2, 2)}}
  train = {
    "kind": "train", "steps": 6, "log_every": 1, "checkpoint_every": 2, "threads": 2,
    "small_buckets": "repeat",
    "optimizer": {"lr": 1e-3},
  }  # fmt: skip
  return config.experiment(
    name="tiny",
    data={
      "held_out": 0.25,
      "marbles": {
        "clips": 32, "sizes": ((32, 32), (32, 48)), "frames": (4, 8), "sound": False,
        "world": {"split": "train"},
      },
    },
    stages={
      "ingest": {"kind": "ingest", "workers": 2},
      "autoencoder": {**train, "task": autoencoder, "buckets": _buckets(IMAGES + CLIPS)},
      "encode": {"kind": "encode", "buckets": IMAGES + CLIPS, "batch": 8, "shard_examples": 8},
      "t2i": {
        **train, "task": image_generator, "latents": "encode", "buckets": _buckets(IMAGES),
      },
      "t2v": {
        **train, "task": generator, "latents": "encode", "init_from": "t2i",
        "buckets": _buckets(IMAGES + CLIPS), "validate_every": 3,
      },
      "evaluate": {
        "kind": "evaluate", "bucket": "8x32x48", "prompts": 8, "batch": 8, "clips": 4, "show": 4,
        "targets": {"colour": 0.9, "psnr": 25.0, "peak_memory_gib": 8.0},
      },
    },
  )  # fmt: skip
