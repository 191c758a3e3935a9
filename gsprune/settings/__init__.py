"""A composed configuration: the objects it describes, what of it may be recorded, and what it hashes to."""
