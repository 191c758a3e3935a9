"""Which structures a network has: traced, grouped, proven. The only room that imports torch-pruning."""
