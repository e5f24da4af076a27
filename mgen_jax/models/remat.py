"""What a layer keeps for its backward pass, by name: the memory of activations against FLOPs.

  none              everything is kept, nothing is computed again
  full              only the layer's input is kept
  save_attention    and the output of the attentions, the most expensive part of a long sequence
  save_projections  and their queries, keys and values
  save_dots         the result of every matrix product without a batch dimension
  offload           like full, the layer's input waits in the host's memory
  save:a,b          only the activations with these names are kept
  offload:a,b       likewise, in the host's memory

The names: those in NAMES. `add_policy` adds a policy under a name of its own.
"""

from collections.abc import Callable
from typing import Any

import jax

from mgen_jax.errors import ConfigError
from mgen_jax.parallel.attention import kernels

Policy = Callable[..., Any]

# Of activations, as given to `checkpoint_name` in the layers.
NAMES = ("block_input", "projection", "attention", "mlp_projection")

_policies = jax.checkpoint_policies


def _save(*names: str) -> Policy:
  named = _policies.save_only_these_names(*names)
  if kernels.SAVED_NAME not in names:
    return named

  def cudnn(primitive, *_, **__):
    return primitive.name == kernels.CUDNN_PRIMITIVE

  return _policies.save_from_both_policies(named, cudnn)


def _offload(*names: str) -> Policy:
  return _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(names),
    offload_src="device",
    offload_dst="pinned_host",
  )


POLICIES: dict[str, Policy | None] = {
  "none": None,
  "full": _policies.nothing_saveable,
  "save_attention": _save("attention"),
  "save_projections": _save("attention", "projection"),
  "save_dots": _policies.dots_with_no_batch_dims_saveable,
  "offload": _offload("block_input"),
}


def add_policy(name: str, policy: Policy | None) -> None:
  """Makes a policy of `jax.checkpoint_policies`, or a function like them, available by name.

  Raises:
    ConfigError: the name is taken or means something already.
  """
  if name in POLICIES or ":" in name:
    raise ConfigError(f"the remat policy {name!r} exists already or has a colon: name it otherwise")
  POLICIES[name] = policy


def policy(name: str) -> Policy | None:
  """The policy of a name; None keeps everything.

  Raises:
    ConfigError: there is none.
  """
  kind, _, names = name.partition(":")
  if kind in ("save", "offload") and names:
    wanted = names.split(",")
    if not set(wanted) <= set(NAMES):
      raise ConfigError(f"remat {name!r} names an activation other than {', '.join(NAMES)}")
    return _save(*wanted) if kind == "save" else _offload(*wanted)
  if name not in POLICIES:
    raise ConfigError(
      f"unknown remat policy {name!r}: use one of {', '.join(sorted(POLICIES))}, or "
      f'"save:" and names out of {", ".join(NAMES)}'
    )
  return POLICIES[name]
