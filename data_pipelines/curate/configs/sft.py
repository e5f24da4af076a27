"""Movie Gen's finetuning set, as far as programs choose it (6.4, step 1): strict thresholds, clips
of 10.6 to 16 s, few shots, landscape.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/sft.py \\
    --input=videos --output=curated/sft

The paper gives no numbers for its "strict thresholds"; these are ours. Balance by concepts is
`concepts`; what people then choose and rewrite is a batch file of captions
(`captions.first.kind=batch`). Small subjects need a detector, which is not here.
"""

from data_pipelines.curate import config


def get_config():
  return config.complete(
    name="sft",
    resolution={"min_side": 768},
    scan={"shots": 0.1},
    split={"min_seconds": 10.6, "max_seconds": 16.0, "clips_per_source": 1},
    motion={"min_at_30": 2.5},
    aesthetics={"min_score": 5.5},
    text={"max_score": 0.3},
    human_share={"share": 0.6},
    aspect_mix={"landscape": 0.8},
  )
