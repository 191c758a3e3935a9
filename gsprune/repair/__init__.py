"""Repair of a cut network without training: weights refitted to the dense network's outputs, BatchNorm statistics."""

from gsprune.repair.least_squares import least_squares
from gsprune.repair.report import LayerRepair, RepairReport

__all__ = ["LayerRepair", "RepairReport", "least_squares"]
