"""What a pruner would do, without training, and how that is shown."""
