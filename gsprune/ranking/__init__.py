"""What is pruned first: patterns of selection groups, the exact selection, passes over large tensors."""
