"""How one of several processes ends while the others wait for it. A started process imports this file: little else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from gsprune.collectives import broadcast, rank
from gsprune.training.signals import Interrupted


def gone(how: str, folder: str) -> None:
    """Process 1 ends in some way, while process 0 waits for it in a collective operation."""
    try:
        dist.barrier()  # both are connected: one that dies before ends the other while it connects
        if rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "mistake":
                raise ValueError("this is the user's mistake, in one sentence")
            if how == "error":
                raise KeyError("what went wrong")
            if how == "stopped":
                raise Interrupted(signal.SIGTERM)
            time.sleep(600)
        broadcast(0)
        dist.barrier()
    except BaseException:
        (Path(folder) / f"left-{rank()}").touch()
        raise
