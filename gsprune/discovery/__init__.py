"""Which structures a network has: traced, grouped, proven. The only package that imports torch-pruning."""
