"""mgen_jax: open, JAX-native training of media foundation models."""
