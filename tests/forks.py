"""`python train.py` without the imports: a process that has made them forks for every command.

Imports take several times what a tiny run does. Nothing is computed before the fork, so no thread is lost in it; what
the command sees is its own: directory, environment, arguments, files for what it prints, and modules of ours.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STORE = "mlflow.store.tracking.sqlalchemy_store"  # MLflow imports it, with SQLAlchemy and Alembic, for a database
HEAVY = ("torch", "torchvision", "mlflow", STORE, "matplotlib.figure", "sklearn.datasets", "hydra", "rich")


class Forks:
    """The process that has imported what train.py needs; it is started by the first command."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        if self._process is None or self._process.poll() is not None:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            settings = {"env": {**environment, "OMP_NUM_THREADS": "1"}, "cwd": ROOT}
            self._process = subprocess.Popen([sys.executable, __file__], **pipes, **settings)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as texts:
            request = {"cwd": str(folder), "argv": list(arguments), "env": dict(environment), "texts": texts}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            out, err = (Path(texts, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(["train.py", *arguments], code, out, err)


def serve() -> None:
    """One request a line from standard input, one exit code a line to standard output."""
    for module in HEAVY:
        __import__(module)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """The rest of this process is the command, its end included."""
    new = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name in enumerate((os.devnull, f"{request['texts']}/out", f"{request['texts']}/err")):
        os.dup2(os.open(name, new if number else os.O_RDONLY), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [str(ROOT / "train.py"), *request["argv"]]
    sys.path[:1] = [str(ROOT), *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
