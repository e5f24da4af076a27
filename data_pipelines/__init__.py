"""Data before training: nothing in mgen_jax imports this."""
