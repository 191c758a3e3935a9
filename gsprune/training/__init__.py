"""The training loop: optimizers, learning-rate schedules, guard, loop state, checkpoints, several processes."""
