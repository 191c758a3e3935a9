"""The training loop: optimizers and schedules, the guard, the position, checkpoints, several processes."""
