"""How a task is trained: loop, step, state, optimizer, checkpoints, metrics. Knows no model."""
