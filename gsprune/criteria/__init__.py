"""Criteria: weights and gradients in, scores out. A score estimates how much a removal changes the loss.

One file a family: `elementwise`, `movement` (single weights), `gate_gradients` (units: `Abs`, `Weighted`), `fisher`
(units, squared), `platon` (both, with a second average), `surgeon` (units, with refitted readers), `activations`
(single weights, by what layers read), `baselines`.
"""

from gsprune.criteria.activations import Activations, SparseGPT, Wanda
from gsprune.criteria.base import Criterion
from gsprune.criteria.baselines import Magnitude, Random
from gsprune.criteria.elementwise import Elementwise
from gsprune.criteria.fisher import Fisher
from gsprune.criteria.gate_gradients import Abs, GateGradient, Weighted
from gsprune.criteria.movement import Movement
from gsprune.criteria.platon import PLATON
from gsprune.criteria.surgeon import OBS
from gsprune.moved import handed_on

__all__ = [
    "OBS",
    "PLATON",
    "Abs",
    "Activations",
    "Criterion",
    "Elementwise",
    "Fisher",
    "GateGradient",
    "Magnitude",
    "Movement",
    "Random",
    "SparseGPT",
    "Wanda",
    "Weighted",
]

__getattr__ = handed_on(__name__)
