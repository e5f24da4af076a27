"""The families of generators whose weights come in and go out; those of encoders are beside them
(`mgen_jax/encoders/families.py`)."""

from mgen_jax.weights import autoencoder_kl, latte
from mgen_jax.weights.rules import Family

FAMILIES: dict[str, Family] = {
  family.name: family
  for family in (
    *(latte.LATTE, latte.DIT, latte.TEXT_LATTE, latte.PIXART),
    autoencoder_kl.FAMILY,
  )
}
