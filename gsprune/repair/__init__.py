"""Repair of a cut network without training: weights refitted to the dense network's outputs, BatchNorm statistics."""
