"""Files: written whole or not at all, locks between processes, the names of what runs and sweeps leave."""

from gsprune.moved import handed_on

__getattr__ = handed_on(__name__)
