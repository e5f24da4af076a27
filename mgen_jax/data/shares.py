"""How buckets share the steps: the batch of each, how often it comes, and the table of both.

Examples of a long bucket cost more than those of a short one, so batches are chosen for an equal
number of tokens, and steps in proportion to batches give every example the same number of epochs.
Not here: the order of the steps (`pipeline`), which clip goes to which bucket (`buckets`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError

By = Literal["weight", "examples"]


def batch_for(bucket: Bucket, tokens: int, tokens_per_step: int, multiple: int) -> int:
  """The largest batch of at most `tokens_per_step` tokens that is a multiple of `multiple`.

  It depends on the config and never on the number of devices or hosts: a run that moves to others
  goes on with the same batches.

  Args:
    bucket: for messages.
    tokens: of one example.
    tokens_per_step: of a global batch, at most.
    multiple: what the batch must divide by.

  Raises:
    UserError: not even the smallest batch fits.
  """
  batch = tokens_per_step // tokens // multiple * multiple
  if batch < 1:
    raise UserError(
      f"tokens_per_step is {tokens_per_step:,}, but {multiple} examples (batch_multiple) of bucket "
      f"{bucket.name} have {multiple * tokens:,} tokens: raise it to that, or lower batch_multiple."
    )
  return batch


@dataclasses.dataclass(frozen=True)
class Part:
  """How one bucket takes part in a stage.

  Attributes:
    examples: that it has.
    batch: examples of one global batch.
    weight: its own; by "examples" it multiplies how often each of its examples is drawn.
    tokens: of one example.
  """

  examples: int
  batch: int
  weight: float = 1.0
  tokens: int = 0


def of_steps(
  parts: Mapping[Bucket, Part], *, by: By = "weight", images_to_videos: float | None = None
) -> dict[Bucket, float]:
  """The share of the steps of each bucket; they sum to 1.

  Args:
    parts: of each bucket.
    by: "weight": in proportion to the weights. "examples": to weight x examples / batch, so that
      with equal weights every example is drawn equally often.
    images_to_videos: steps on image buckets for one step on a video bucket (Movie Gen: 0.1); None:
      as the above says. Without buckets of both kinds there is nothing to balance.
  """
  raw = {
    bucket: part.weight * (part.examples / part.batch if by == "examples" else 1.0)
    for bucket, part in parts.items()
  }
  groups = [[b for b in parts if b.is_image], [b for b in parts if not b.is_image]]
  if images_to_videos is not None and all(groups):
    for group, share in zip(groups, (images_to_videos, 1.0), strict=True):
      total = sum(raw[bucket] for bucket in group)
      raw |= {bucket: raw[bucket] / total * share for bucket in group}
  total = sum(raw.values())
  return {bucket: value / total for bucket, value in raw.items()}


def table(parts: Mapping[Bucket, Part], share: Mapping[Bucket, float], steps: int) -> str:
  """What a stage of so many steps draws from each bucket, one line each, for people."""
  header = ("bucket", "examples", "batch", "tokens/step", "share of steps", "epochs")
  rows = [header]
  for bucket in sorted(parts):
    part = parts[bucket]
    epochs = steps * share[bucket] * part.batch / part.examples if part.examples else 0.0
    rows.append(
      (
        bucket.name,
        f"{part.examples:,}",
        f"{part.batch:,}",
        f"{part.batch * part.tokens:,}",
        f"{100 * share[bucket]:.1f} %",
        f"{epochs:.2f}",
      )
    )
  widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
  return "\n".join(
    "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows
  )
