"""The learning rate that follows the validation loss: halved whenever that is flat.

Its memory is part of the training state, so a run that was interrupted goes on with it. Not here:
when the loss is measured (`validation.py`) and where the factor enters (`step.py`).
"""

import flax.struct
import jax
import jax.numpy as jnp

from mgen_jax.config import PlateauConfig


@flax.struct.dataclass
class Plateau:
  """What is remembered between validations."""

  factor: jax.Array  # float32 []: of the learning rate
  best: jax.Array  # float32 []: validation loss that counts as progress when it is undercut
  waited: jax.Array  # int32 []: validations without progress


def start() -> Plateau:
  """Before the first validation."""
  return Plateau(jnp.ones(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))


def observe(plateau: Plateau, loss: jax.Array, config: PlateauConfig) -> Plateau:
  """After a validation; a loss that is not a number is no progress."""
  better = loss < plateau.best * (1 - config.threshold)
  waited = jnp.where(better, 0, plateau.waited + 1)
  flat = waited >= config.patience
  lowered = jnp.maximum(plateau.factor * config.factor, config.floor)
  return Plateau(
    factor=jnp.where(flat, lowered, plateau.factor),
    best=jnp.where(better, loss, plateau.best),
    waited=jnp.where(flat, 0, waited),
  )
