"""A 1B text-to-video model at 256 px: the recipe of experiments/t2v_30b.py for one small cluster.

  python -m mgen_jax.main --config=experiments/t2v_1b.py
  python -m mgen_jax.main --config=experiments/t2v_1b.py --stage=t2i_256 --config.seed=1

Hardware: 32 GPUs of 80 GB, or as many TPU v5p chips; batches divide over 8, 16 and 64 as well. Not
run by us. The size is that of mindone's re-implementation; steps, batches and rates are ours: the
paper trains no 1B model for video.

Captions go through the byte encoder (a feature for each word), which is trained along: nothing but
videos with captions is needed. The text encoders of the paper: see experiments/t2v_30b.py.
"""

from mgen_jax import config

SHAPES = ("192x352", "256x256", "352x192")
CLIPS = tuple(f"{frames}x{shape}" for frames in (128, 64) for shape in SHAPES)
IMAGES = tuple(f"1x{shape}" for shape in SHAPES)
TEXT_WIDTH = 1024


def devices(variant=None):
  """Devices of each train stage."""
  del variant
  return {"autoencoder": 32, "t2i_256": 32, "t2v_256": 32}


def _generator(max_positions):
  return {
    "name": "text_to_video",
    "model": config.backbone(
      "1B",
      max_positions=max_positions,
      position_growth="extend",
      context_widths=(TEXT_WIDTH,),
    ),
    "text": {
      "kind": "bytes", "width": TEXT_WIDTH, "layers": 6, "heads": 16, "mlp_width": 4096,
      "max_words": 128, "max_length": 1024, "dtype": "bfloat16",
    },
  }  # fmt: skip


def _buckets(names, batch, share):
  return {f"b{name}": {"batch": batch, "weight": share / len(names)} for name in names}


def get_config():
  train = {
    "kind": "train",
    "ema_decay": 0.9999,
    "log_every": 10,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "threads": 16,
  }
  adamw = {"warmup_steps": 1000, "weight_decay": 0.1}
  generate = {**train, "latents": "encode"}
  return config.experiment(
    name="t2v_1b",
    data={"videos": "data/videos", "held_out": 0.01},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        **train,
        "task": {"name": "autoencoder", "model": {"dtype": "bfloat16"}},
        "steps": 50_000,
        "buckets": {
          "b1x256x256": {"batch": 64, "weight": 1.0},
          "b16x256x256": {"batch": 64, "weight": 3.0},
        },
        "optimizer": {**adamw, "lr": 1e-4, "weight_decay": 0.0},
      },
      "encode": {"kind": "encode", "buckets": IMAGES + CLIPS, "batch": 8},
      "t2i_256": {
        **generate,
        "task": _generator((1, 22, 22)),
        "steps": 100_000,
        "buckets": _buckets(IMAGES, 2048, 1.0),
        "optimizer": {**adamw, "lr": 2e-4},
      },
      "t2v_256": {
        **generate,
        "task": _generator((16, 22, 22)),
        "init_from": "t2i_256",
        "steps": 100_000,
        "buckets": _buckets(IMAGES, 1024, 1 / 11) | _buckets(CLIPS, 256, 10 / 11),
        "optimizer": {**adamw, "lr": 1e-4},
      },
    },
  )
