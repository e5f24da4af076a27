"""Movie Gen Video, 30B: the whole recipe of the paper's Table 3, from videos to 768 px clips.

  python -m mgen_jax.main --config=experiments/t2v_30b.py --stage=t2i_256
  python -m mgen_jax.main --config=experiments/t2v_30b.py:v5p --stage=t2v_768

Behind the colon stands the hardware: h100 (the paper's: 6,144 of them, tensor 4, context 2), v5p or
v6e (`PRESETS`). Every stage has its own number of devices, `devices(hardware)`; start the same
command with the next --stage on as many. The TPU presets are arithmetic on memory and batch, not
measured, and nobody has run this recipe to its end with this code: about 3e24 FLOP.

Steps, batches, learning rates, lengths and shares of images are the paper's. It does not state the
optimizer but for the learning rate, warm-up, averaging, caption dropout, the five aspect ratios,
how position tables are expanded, or how its autoencoder was trained; those are ours, marked below.

Needs a folder of videos with captions (`data.videos`), and the weights of the three text encoders
in weights/ul2, weights/metaclip-bigg-text-256 and weights/byt5-small, made by mgen_jax.convert
(docs/encoders.md). The encode stages write their features beside the latents; with

  --config.stages.t2v_768.task.text.online=True

a stage runs the encoders in its training step instead. Long-prompt MetaCLIP is not public: the
tower of MetaCLIP bigG with stretched positions stands in for it.
"""

from mgen_jax import config

# --------------------------------------------------------------------------------------------------
# Hardware: devices, mesh, passes of gradient accumulation and rematerialisation of each stage.

# The paper's. A global batch is (batch per GPU x GPUs) / (tensor x context). Of a long sequence the
# attention is what costs most to compute again, and there is room for its output.
_LONG = {"remat": "save_attention"}
H100 = {
  "autoencoder": {"devices": 512},
  "t2i_256": {"devices": 1536},
  "t2v_256": {"devices": 3072, "mesh": {"tensor": 4}},
  "t2v_256_wide": {"devices": 6144, "mesh": {"tensor": 4}},
  "t2v_768": {"devices": 6144, "mesh": {"tensor": 4}, **_LONG},
  "t2v_768_low": {"devices": 6144, "mesh": {"tensor": 4}, **_LONG},
  "t2v_768_cp2": {"devices": 6144, "mesh": {"tensor": 4, "context": 2}, **_LONG},
  "t2v_768_cp2_low": {"devices": 4096, "mesh": {"tensor": 4, "context": 2}, **_LONG},
}
# 95 GB a chip and one torus for all of a slice: no tensor parallelism is needed. 18,432 tokens a
# chip at 768 px, whose layer inputs (all that "full" remat keeps) take 11 GB.
V5P = {
  "autoencoder": {"devices": 512},
  "t2i_256": {"devices": 1536},
  "t2v_256": {"devices": 1536, "mesh": {"context": 2}},
  "t2v_256_wide": {"devices": 1536, "mesh": {"context": 2}, "accumulate": 2},
  "t2v_768": {"devices": 1536, "mesh": {"context": 4}},
  "t2v_768_low": {"devices": 1536, "mesh": {"context": 4}},
  "t2v_768_cp2": {"devices": 1536, "mesh": {"context": 4}},
  "t2v_768_cp2_low": {"devices": 1024, "mesh": {"context": 4}},
}
# 32 GB a chip in pods of 256, between which only gradients travel (replica). 9,216 tokens a chip at
# 768 px: 5.4 GB of layer inputs.
V6E = {
  "autoencoder": {"devices": 512, "mesh": {"replica": 2}},
  "t2i_256": {"devices": 1536, "mesh": {"replica": 6}, "accumulate": 2},
  "t2v_256": {"devices": 1536, "mesh": {"replica": 6, "context": 4}, "accumulate": 2},
  "t2v_256_wide": {"devices": 1536, "mesh": {"replica": 6, "context": 4}, "accumulate": 4},
  "t2v_768": {"devices": 1536, "mesh": {"replica": 6, "context": 8}},
  "t2v_768_low": {"devices": 1536, "mesh": {"replica": 6, "context": 8}},
  "t2v_768_cp2": {"devices": 1536, "mesh": {"replica": 6, "context": 8}},
  "t2v_768_cp2_low": {"devices": 1024, "mesh": {"replica": 4, "context": 8}},
}
PRESETS = {"h100": H100, "v5p": V5P, "v6e": V6E}
VARIANTS = tuple(PRESETS)

# --------------------------------------------------------------------------------------------------
# Shapes: "height x width" of five aspect ratios (of which the paper names 16:9, 9:16 and 1:1), with
# about the same number of patches each, and the share of the clips that have them. Those of 256 px
# have 60 % landscape to 40 % portrait, those of 768 px 80 % to 20 %; the square is between.

SHAPES_256 = {
  "192x352": 0.45, "224x304": 0.10, "256x256": 0.10, "304x224": 0.10, "352x192": 0.25,
}  # fmt: skip
SHAPES_768 = {
  "576x1024": 0.60, "672x896": 0.12, "768x768": 0.10, "896x672": 0.06, "1024x576": 0.12,
}  # fmt: skip
# Frames: 16 s, 8 to 12 s and 4 to 8 s (Table 2). More than half of the clips have 15 s or more.
LENGTHS = {256: 0.6, 192: 0.2, 128: 0.2}
IMAGES = 1 / 11  # share of the steps: images to videos as 1 to 10


def _names(shapes, lengths):
  return tuple(f"{frames}x{shape}" for frames in lengths for shape in shapes)


def _buckets(shapes, batch):
  """Images and clips of all shapes and lengths, each step on one of them."""
  images = {f"b1x{shape}": IMAGES * share for shape, share in shapes.items()}
  clips = {
    f"b{frames}x{shape}": (1 - IMAGES) * of_length * share
    for frames, of_length in LENGTHS.items()
    for shape, share in shapes.items()
  }
  return {name: {"batch": batch, "weight": weight} for name, weight in (images | clips).items()}


# --------------------------------------------------------------------------------------------------
# Stages.


def _autoencoder():
  """8x8x8 with 16 channels; the paper's architecture, our schedule: it gives none but a share of
  one image batch to three of video, and 50,000 steps for the base of an ablation."""
  clips = {f"b{frames}x256x256": {"batch": 512, "weight": 1.5} for frames in (16, 32)}
  return {
    "kind": "train",
    "task": {"name": "autoencoder", "model": {"dtype": "bfloat16"}},
    "steps": 50_000,
    "buckets": {"b1x256x256": {"batch": 512, "weight": 1.0}, **clips},
    "optimizer": {"lr": 1e-4, "warmup_steps": 1000},
    "ema_decay": 0.9999,
  }


TEXT = config.text_stack()  # UL2, MetaCLIP and ByT5


def _encode(shapes):
  return {
    "kind": "encode",
    "buckets": _names(shapes, (1, *LENGTHS)),
    "batch": 8,
    "text": config.encoded_text(TEXT),
  }


def _generator(max_positions, growth="interpolate"):
  return {
    "name": "text_to_video",
    "model": config.backbone("30B", max_positions=max_positions, position_growth=growth),
    "text": TEXT,
    "caption_dropout": 0.1,  # ours
    "time_mean": 0.0,  # t = sigmoid(z), z ~ N(0, 1)
    "time_std": 1.0,
    "sampler": {
      "num_steps": 50,
      "grid": "linear_quadratic",
      "linear_steps": 250,
      "guidance": 7.5,
      "dtype": "bfloat16",
    },
  }


def _stage(task, lr, steps, buckets, latents, init_from=None, warmup=500):
  return {
    "kind": "train",
    "task": task,
    "steps": steps,
    "buckets": buckets,
    "latents": latents,
    "init_from": init_from,
    # AdamW with this decay, the warm-up (the moments start anew in each stage) and the averaging
    # are ours; the rate is constant within a stage.
    "optimizer": {"lr": lr, "warmup_steps": warmup, "weight_decay": 0.1},
    "ema_decay": 0.9999,
    "log_every": 10,
    "validate_every": 1000,
    "checkpoint_every": 500,
    "threads": 16,
  }


def devices(hardware="h100"):
  """Devices of each train stage."""
  return {name: preset["devices"] for name, preset in PRESETS[hardware].items()}


def get_config(hardware="h100"):
  if hardware not in PRESETS:
    raise config.ConfigError(f"unknown hardware {hardware!r}: use one of {', '.join(PRESETS)}")
  # Tables of 16 positions (256 px, square), twice that for more aspect ratios at the same size:
  # the new positions stand beside the old ones. Then three times that for the same picture in
  # finer patches: the old ones are stretched. Time comes with the videos: 32 latent frames.
  image = _generator((1, 16, 16))
  low = _generator((32, 32, 32), "extend")
  high = _generator((32, 96, 96), "interpolate")
  square = {"b1x256x256": {"batch": 9216}}
  stages = {
    "ingest": {"kind": "ingest"},
    "autoencoder": _autoencoder(),
    "encode_256": _encode(SHAPES_256),
    "t2i_256": _stage(image, 1e-4, 210_000, square, "encode_256", warmup=2000),
    # Printed as 123k steps; the samples and the sum that the paper gives say 113k.
    "t2v_256": _stage(low, 6e-5, 113_000, _buckets(SHAPES_256, 1536), "encode_256", "t2i_256"),
    "t2v_256_wide": _stage(low, 6e-5, 72_000, _buckets(SHAPES_256, 3072), "encode_256", "t2v_256"),
    "encode_768": _encode(SHAPES_768),
    "t2v_768": _stage(high, 6e-5, 19_600, _buckets(SHAPES_768, 1536), "encode_768", "t2v_256_wide"),
    "t2v_768_low": _stage(high, 3e-5, 11_000, _buckets(SHAPES_768, 1536), "encode_768", "t2v_768"),
    "t2v_768_cp2": _stage(
      high, 2e-5, 15_900, _buckets(SHAPES_768, 768), "encode_768", "t2v_768_low"
    ),
    "t2v_768_cp2_low": _stage(
      high, 1e-5, 28_000, _buckets(SHAPES_768, 512), "encode_768", "t2v_768_cp2"
    ),
  }
  for name, preset in PRESETS[hardware].items():
    stages[name]["mesh"] = preset.get("mesh", {})
    # At 768 px one example at a time is what a device has room for; the paper's GPUs hold no more.
    passes = -1 if name.startswith("t2v_768") else 1
    stages[name]["accumulate"] = preset.get("accumulate", passes)
    if "remat" in preset:
      task = stages[name]["task"]
      model = {**task["model"], "remat": preset["remat"]}
      stages[name]["task"] = {**task, "model": model}
  return config.experiment(
    name=f"t2v_30b_{hardware}",
    # Table 2: clips at 16 to 32 frames a second, so that each fills its bucket as a whole.
    data={"videos": "data/videos", "held_out": 0.001, "fps_range": (16.0, 32.0)},
    stages=stages,
  )
