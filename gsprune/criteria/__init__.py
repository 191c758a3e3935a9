"""How much the loss would feel a removal: gradients and weights in, scores out.

One file a family: `elementwise` (single weights), `gates` (units: `Abs`, `Weighted`), `baselines`.
"""

from gsprune.criteria.base import Criterion
from gsprune.criteria.baselines import Magnitude, Random
from gsprune.criteria.elementwise import Elementwise
from gsprune.criteria.gates import Abs, Gate, Weighted

__all__ = ["Abs", "Criterion", "Elementwise", "Gate", "Magnitude", "Random", "Weighted"]
