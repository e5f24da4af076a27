"""Pure Flax modules; they know shapes and logical axis names, nothing else."""
