"""Which groups go: patterns of selection groups, the one exact selection, passes over large tensors."""
