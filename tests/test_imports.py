"""Every module can be the first one that a process imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gsprune

FOLDER = Path(gsprune.__file__).parent
ONE_AFTER_ANOTHER = """
import os, sys
import torch
for name in sys.argv[1:]:
    if not (child := os.fork()):
        status = 1
        try:
            __import__(name)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    paths = [path.relative_to(FOLDER.parent).with_suffix("") for path in FOLDER.rglob("*.py")]
    names = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__")
    run = subprocess.run([sys.executable, "-c", ONE_AFTER_ANOTHER, *names], capture_output=True, text=True, check=True)
    assert run.stdout == "", run.stderr
