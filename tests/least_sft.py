"""What experiments/t2v_sft.py is to the quickstart, for tests/least.py: two finetunings of what
runs/mine has trained, and their average.

python -m mgen_jax.main --config=tests/least_sft.py:toy --workdir=DIR
"""

from mgen_jax import config
from tests import least


def get_config(variant):
  del variant  # the name behind the colon is that of the experiment it stands for
  values = least.get_config().to_dict()
  before = values["stages"]
  autoencoder, t2v = before["autoencoder"]["task"], before["t2v"]
  train = {**t2v, "init_from": "pretrained", "steps": 2}
  average = {"kind": "average", "task": t2v["task"]}
  return config.experiment(
    name="least_sft",
    seed=1,
    data=values["data"],
    stages={
      "ingest": before["ingest"],
      "autoencoder": {"kind": "average", "task": autoencoder, "of": ("runs/none/autoencoder",)},
      "pretrained": {**average, "of": ("runs/none/t2v",), "latents": "encode"},
      "pretrained_early": {**average, "of": ("runs/none/t2v",), "latents": "encode"},
      "encode": before["encode"],
      "sft_a": {**train, "seed": 1},
      "sft_b": {**train, "seed": 2, "init_from": "pretrained_early", "lora": {"rank": 2}},
      "average": {**average, "of": ("sft_a", "sft_b")},
    },
  )
