"""What a pruner would do, without training."""
