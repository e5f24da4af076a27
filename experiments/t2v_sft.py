"""Supervised finetuning of Movie Gen Video, 30B (section 3.4): a few runs, and their average.

  python -m mgen_jax.main --config=experiments/t2v_sft.py
  make quickstart && python -m mgen_jax.main --config=experiments/t2v_sft.py:toy

Hardware: 512 H100s, as the paper's, on tensor 4 and context 2; nobody has run it with this code. It
starts from what experiments/t2v_30b.py has left in runs/t2v_30b_h100, and reads a folder of chosen
clips with their captions, data/sft: half of the examples are whole clips of 16 s at 16 frames per
second, half are 10.67 s of shorter ones at 24, so that the model draws both lengths. Models that
differ in their learning rate, in their data and in what they start from are averaged.

The paper gives the cosine schedule, the lengths and rates, the 512 GPUs ("small batch") and that
such models are averaged; learning rates, steps, number of models and their weights are ours.

Behind the colon, "toy": the same on Marbles, a 4-core CPU and what the quickstart has left in
runs/quickstart, with one change: rates stay constant and no average over steps is kept, so that the
average of the models takes the place of both. Models that have settled by themselves gain nothing
that 384 judged videos can show. Times, accuracies and what else was tried: docs/numbers.md,
"Finetuning and averages".
"""

from mgen_jax import config

VARIANTS = ("h100", "toy")
MODELS = ("sft_a", "sft_b", "sft_c")


def _sft(task, init_from, seed, optimizer, steps, buckets, mixture, **values):
  """A finetuning. Each has a seed of its own: models that draw the same noise on the same batches
  err alike, and their average does too."""
  return {
    "kind": "train",
    "task": task,
    "init_from": init_from,
    "seed": seed,
    "steps": steps,
    "buckets": buckets,
    "mixture": mixture,
    "optimizer": {"schedule": "cosine", "warmup_steps": steps // 20, **optimizer},
    **values,
  }


def _import(task, folder, **values):
  """A model that another run has trained, as it is."""
  return {"kind": "average", "task": task, "of": (folder,), **values}


def _averages():
  """The average of the models, all with the same weight."""
  return {"kind": "average", "of": MODELS}


# --------------------------------------------------------------------------------------------------
# Full size.

# As in t2v_30b.py: "height x width" of five aspect ratios, and the share of the clips.
SHAPES = {
  "576x1024": 0.60, "672x896": 0.12, "768x768": 0.10, "896x672": 0.06, "1024x576": 0.12,
}  # fmt: skip
FRAMES = 256  # 16 s at 16 frames per second, 10.67 s at 24
TEXT = config.text_stack()


def _full():
  autoencoder = {"name": "autoencoder", "model": {"dtype": "bfloat16"}}
  generator = {
    "name": "text_to_video",
    "model": config.backbone("30B", max_positions=(32, 96, 96)),
    "text": TEXT,
    "sampler": {
      "num_steps": 50,
      "grid": "linear_quadratic",
      "linear_steps": 250,
      "guidance": 7.5,
      "dtype": "bfloat16",
    },
  }
  encode = {
    "kind": "encode",
    "buckets": tuple(f"{FRAMES}x{shape}" for shape in SHAPES),
    "batch": 8,
    "text": config.encoded_text(TEXT),
  }
  buckets = {f"b{FRAMES}x{s}": {"batch": 64, "weight": share} for s, share in SHAPES.items()}
  both = {"encode_16s": {"weight": 0.5}, "encode_10s": {"weight": 0.5}}
  by_size = {"encode_16s": {}, "encode_10s": {}}
  common = {
    "ema_decay": 0.999, "log_every": 10, "validate_every": 250, "checkpoint_every": 250,
    "threads": 16, "accumulate": -1, "mesh": {"tensor": 4, "context": 2},
  }  # fmt: skip
  rates = ({"lr": 1e-5, "weight_decay": 0.1}, {"lr": 2e-5, "weight_decay": 0.1})
  before = "runs/t2v_30b_h100"
  return config.experiment(
    name="t2v_sft",
    datasets={
      "sft_16s": {"videos": "data/sft", "fps": 16.0, "min_seconds": 16.0, "held_out": 0.01},
      "sft_10s": {
        "videos": "data/sft",
        "fps": 24.0,
        "held_out": 0.01,
        "min_seconds": FRAMES / 24,
        "max_seconds": 16.0,
      },
    },
    stages={
      "ingest_16s": {"kind": "ingest", "dataset": "sft_16s"},
      "ingest_10s": {"kind": "ingest", "dataset": "sft_10s"},
      "autoencoder": _import(autoencoder, f"{before}/autoencoder"),
      "pretrained": _import(generator, f"{before}/t2v_768_cp2_low", latents="encode_16s"),
      "pretrained_early": _import(generator, f"{before}/t2v_768_cp2", latents="encode_16s"),
      "encode_16s": {**encode, "ingest": "ingest_16s"},
      "encode_10s": {**encode, "ingest": "ingest_10s"},
      "sft_a": _sft(generator, "pretrained", 1, rates[0], 4000, buckets, both, **common),
      "sft_b": _sft(generator, "pretrained", 2, rates[1], 4000, buckets, by_size, **common),
      "sft_c": _sft(generator, "pretrained_early", 3, rates[0], 4000, buckets, both, **common),
      "average": {**_averages(), "task": generator},
    },
  )


# --------------------------------------------------------------------------------------------------
# The same on Marbles. World, autoencoder and generator are those of quickstart.py.

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
  "split": "train",
}
TOY_AUTOENCODER = {
  "name": "autoencoder",
  "model": {
    "channels": 128, "multipliers": (1,), "patch": (8, 8, 8), "kernel": 1, "temporal": False,
    "space_down": (), "time_down": (), "mid_attention": False, "norm": "rms", "res_blocks": 1,
    "decoder_res_blocks": 1, "conv_method": "matmul",
  },
}  # fmt: skip
TOY_GENERATOR = {
  "name": "text_to_video",
  "model": {
    "layers": 4, "width": 192, "heads": 6, "mlp_width": 384, "qk_norm": True, "cross_norm": True,
    "max_positions": (3, 5, 5), "position_std": 0.5, "context_widths": (64,), "dtype": "float32",
    "remat": "none", "scan_unroll": 4,
  },
  "text": {
    "width": 64, "layers": 1, "heads": 4, "mlp_width": 128, "max_words": 12, "max_length": 48,
  },
  "time_mean": -1.0,
  "sampler": {"num_steps": 24, "grid": "quadratic", "guidance": 4.0},
}  # fmt: skip


def _toy():
  bucket = "16x64x64"
  marbles = {
    "clips": 1200,
    "sizes": ((64, 64),),
    "frames": (16, 24),
    "sound": False,
    "world": WORLD,
  }
  both = {"encode_long": {"weight": 0.5}, "encode_short": {"weight": 0.5}}
  shorter = {"encode_long": {"weight": 0.25}, "encode_short": {"weight": 0.75}}
  common = {"ema": "off", "log_every": 25, "validate_every": 100, "checkpoint_every": 100}
  muon = {"name": "muon", "b2": 0.98, "schedule": "constant", "warmup_steps": 15}
  rates = ({**muon, "lr": 3e-3, "muon_lr": 0.024}, {**muon, "lr": 4e-3, "muon_lr": 0.032})
  train = (200, {f"b{bucket}": {"batch": 32}})
  judge = {"kind": "evaluate", "bucket": bucket, "prompts": 384}
  before = "runs/quickstart"
  return config.experiment(
    name="t2v_sft_toy",
    seed=1,  # other clips than the quickstart's
    datasets={
      "sft_long": {"marbles": marbles, "min_seconds": 3.0},
      "sft_short": {"marbles": marbles, "max_seconds": 3.0},
    },
    stages={
      "ingest_long": {"kind": "ingest", "dataset": "sft_long"},
      "ingest_short": {"kind": "ingest", "dataset": "sft_short"},
      "autoencoder": _import(TOY_AUTOENCODER, f"{before}/autoencoder"),
      "pretrained": _import(TOY_GENERATOR, f"{before}/t2v", latents="encode_short"),
      "pretrained_early": _import(TOY_GENERATOR, f"{before}/t2v@1500", latents="encode_short"),
      "encode_long": {"kind": "encode", "ingest": "ingest_long", "buckets": (bucket,)},
      "encode_short": {"kind": "encode", "ingest": "ingest_short", "buckets": (bucket,)},
      "sft_a": _sft(TOY_GENERATOR, "pretrained", 1, rates[0], *train, both, **common),
      "sft_b": _sft(TOY_GENERATOR, "pretrained", 2, rates[1], *train, shorter, **common),
      "sft_c": _sft(TOY_GENERATOR, "pretrained_early", 3, rates[0], *train, both, **common),
      "average": {**_averages(), "task": TOY_GENERATOR},
      "soup": {
        **_averages(),
        "task": TOY_GENERATOR,
        "method": "greedy",
        "validation": "sft_a",
      },
      **{
        f"evaluate_{name}": {**judge, "generator": name}
        for name in ("pretrained", *MODELS, "average", "soup")
      },
    },
  )


def devices(variant="h100"):
  """Devices of each train stage."""
  return dict.fromkeys(MODELS, 1 if variant == "toy" else 512)


def get_config(variant="h100"):
  if variant not in VARIANTS:
    raise config.ConfigError(f"unknown variant {variant!r}: use one of {', '.join(VARIANTS)}")
  return _toy() if variant == "toy" else _full()
