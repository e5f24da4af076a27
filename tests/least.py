"""The least recipe that has every kind of stage and compiles in seconds: for tests that start it
many times, on several hosts or command by command.

python -m mgen_jax.main --config=tests/least.py --workdir=DIR
"""

from mgen_jax import config

BUCKETS = {"b1x32x32": {"batch": 8}, "b4x32x32": {"batch": 8}}


def get_config():
  autoencoder = {
    "name": "autoencoder",
    "model": {
      "channels": 8, "multipliers": (1,), "res_blocks": 1, "decoder_res_blocks": 1, "norm": "rms",
      "latent_channels": 4, "space_down": (), "time_down": (), "mid_attention": False,
      "patch": (4, 8, 8), "kernel": 1, "temporal": False, "conv_method": "matmul",
    },
  }  # fmt: skip
  generator = {
    "name": "text_to_video",
    "model": {
      "layers": 1, "width": 16, "heads": 2, "mlp_width": 16, "in_channels": 4, "out_channels": 4,
      "max_positions": (1, 2, 2), "context_widths": (8,), "dtype": "float32", "remat": "none",
    },
    "text": {"width": 8, "heads": 2, "layers": 1, "mlp_width": 8},
    "stride": (4, 8, 8),
    "sampler": {"num_steps": 2, "guidance": 2.0},
  }  # fmt: skip
  train = {
    "kind": "train", "steps": 4, "log_every": 1, "checkpoint_every": 2, "threads": 2,
    "optimizer": {"lr": 1e-3}, "buckets": BUCKETS,
  }  # fmt: skip
  return config.experiment(
    name="least",
    data={
      "held_out": 0.25,
      "marbles": {
        "clips": 24, "sizes": ((32, 32),), "frames": (4,), "sound": False,
        "world": {"split": "train"},
      },
    },
    stages={
      "ingest": {"kind": "ingest", "workers": 1},
      "autoencoder": {
        **train, "task": autoencoder, "buckets": {"b4x32x32": {"batch": 8}}, "steps": 2,
      },
      "encode": {
        "kind": "encode", "buckets": ("1x32x32", "4x32x32"), "batch": 8, "shard_examples": 8,
      },
      "t2v": {**train, "task": generator, "latents": "encode", "validate_every": 2},
      "evaluate": {
        "kind": "evaluate", "bucket": "4x32x32", "prompts": 4, "batch": 4, "clips": 2, "show": 2,
      },
    },
  )  # fmt: skip
