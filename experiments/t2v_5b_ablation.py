"""The paper's ablations at 5B (section 3.6.2): objective and backbone, all else alike.

  python -m mgen_jax.main --config=experiments/t2v_5b_ablation.py:flow_matching
  python -m mgen_jax.main --config=experiments/t2v_5b_ablation.py:diffusion
  python -m mgen_jax.main --config=experiments/t2v_5b_ablation.py:dit

  flow_matching  the base: flow matching, LLaMa3-like backbone
  diffusion      v-prediction with zero terminal SNR, sampled by DDIM, instead of flow matching
  dit            LayerNorm without affine, SiLU and biases instead of RMSNorm, SwiGLU and none

352x192 pixels, clips of 4 to 8 s as 128 frames (latents 16x24x44, 4,224 tokens). Hardware: 512 GPUs
of 80 GB for both stages, as in the paper; not run by us. The paper found flow matching better by
16.5 % (quality) and 7.1 % (text alignment) net wins, the LLaMa3-like backbone by 18.6 % and 12.6 %.

Learning rates, batches, steps and the share of images are the paper's; warm-up, weight decay,
averaging and caption dropout are ours. Text comes as in experiments/t2v_30b.py.
"""

from mgen_jax import config

VARIANTS = ("flow_matching", "diffusion", "dit")
IMAGE, CLIP = "1x192x352", "128x192x352"
TEXT = config.text_stack()


def devices(arm="flow_matching"):
  """Devices of each train stage."""
  del arm
  return {"autoencoder": 512, "t2i": 512, "t2v": 512}


def _generator(arm, max_positions):
  ddim = {"method": "ddim", "num_steps": 50, "guidance": 7.5}
  return {
    "name": "text_to_video",
    "model": config.backbone(
      "5B", dit=arm == "dit", max_positions=max_positions, position_growth="extend"
    ),
    "text": TEXT,
    "objective": "v_prediction" if arm == "diffusion" else "flow_matching",
    "sampler": ddim if arm == "diffusion" else {},
  }


def get_config(arm="flow_matching"):
  if arm not in VARIANTS:
    raise config.ConfigError(f"unknown arm {arm!r}: use one of {', '.join(VARIANTS)}")
  train = {
    "kind": "train",
    "ema_decay": 0.9999,
    "log_every": 10,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "threads": 16,
  }
  adamw = {"warmup_steps": 1000, "weight_decay": 0.1}
  return config.experiment(
    name=f"t2v_5b_{arm}",
    data={"videos": "data/videos", "held_out": 0.001, "fps_range": (16.0, 32.0)},
    stages={
      "ingest": {"kind": "ingest"},
      "autoencoder": {
        **train,
        "task": {"name": "autoencoder", "model": {"dtype": "bfloat16"}},
        "steps": 50_000,
        "buckets": {
          "b1x256x256": {"batch": 512, "weight": 1.0},
          "b16x256x256": {"batch": 512, "weight": 3.0},
        },
        "optimizer": {**adamw, "lr": 1e-4, "weight_decay": 0.0},
      },
      "encode": {
        "kind": "encode",
        "buckets": (IMAGE, CLIP),
        "batch": 8,
        "text": config.encoded_text(TEXT),
      },
      "t2i": {
        **train,
        "task": _generator(arm, (1, 12, 22)),
        "latents": "encode",
        "steps": 96_000,
        "buckets": {f"b{IMAGE}": {"batch": 9216}},
        "optimizer": {**adamw, "lr": 3e-4},
      },
      "t2v": {
        **train,
        "task": _generator(arm, (16, 12, 22)),
        "latents": "encode",
        "init_from": "t2i",
        "steps": 100_000,
        "buckets": {
          f"b{IMAGE}": {"batch": 4096, "weight": 0.02},
          f"b{CLIP}": {"batch": 256, "weight": 1.0},
        },
        "optimizer": {**adamw, "lr": 5e-5},
        "mesh": {"tensor": 2},  # 256 clips do not divide over 512 devices
      },
    },
  )
