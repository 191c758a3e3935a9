"""Repair of a cut network without training: weights refitted to the dense network's outputs, BatchNorm statistics.

And recovery by a little training with the dense network as teacher.
"""

from gsprune.repair.batchnorm import batchnorm
from gsprune.repair.calibrated import Repair
from gsprune.repair.distill import distill, distillation_loss
from gsprune.repair.least_squares import least_squares
from gsprune.repair.report import LayerRepair, RepairReport
from gsprune.repair.support import masked_least_squares

__all__ = [
    "LayerRepair",
    "Repair",
    "RepairReport",
    "batchnorm",
    "distill",
    "distillation_loss",
    "least_squares",
    "masked_least_squares",
]
