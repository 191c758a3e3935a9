"""The pruner: the hooks a training loop calls, what it prunes (single weights, units, sharded weights), attaching."""

from gsprune.moved import handed_on

__getattr__ = handed_on(__name__)
