"""What hangs together: units, their tensors, the example a network is called with, a float64 copy to try things on."""

from gsprune.moved import handed_on

__getattr__ = handed_on(__name__)
