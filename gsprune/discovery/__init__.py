"""Which structures a network has: labels on the tensors of one forward pass, classes of them, the proof."""
