"""The record of a run: on the local disk always, in MLflow where that is reachable, uploaded later where not.

`gsprune.tracking.log(pruner, step=...)` writes into a run of MLflow that somebody else has started.
"""

from gsprune.moved import handed_on
from gsprune.tracking.live import log as log

__getattr__ = handed_on(__name__)
