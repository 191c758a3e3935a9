"""A real MLflow server on this machine, a proxy before it that makes faults on demand, and a disk that fills up."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Server:
    """`mlflow server` with its database and its artifacts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(command, env=environment, cwd=self.folder, start_new_session=True, **quiet)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self._process.poll() is None, "mlflow server has ended"
            time.sleep(0.2)
        raise TimeoutError("mlflow server does not come up")

    def kill(self) -> None:
        """SIGKILL, the workers too."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


class Proxy:
    """Hands requests on to a server, or does what `mode` says: a delay in seconds, a status, or "refuse".

    `healthy_for` requests are handed on before the mode counts.
    """

    def __init__(self, port: int) -> None:
        self.mode: float | int | str | None = None
        self.healthy_for, self.requests = 0, 0
        self._port, self._lock = port, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self) -> float | int | str | None:
        with self._lock:
            self.requests += 1
            self.healthy_for -= 1
            return None if self.healthy_for >= 0 else self.mode

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body, fault = self.rfile.read(int(self.headers.get("Content-Length") or 0)), proxy.fault()
                if fault == "refuse":
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    return self._answer(fault, b'{"error_code": "INTERNAL_ERROR", "message": "no space left"}', {})
                if isinstance(fault, float):
                    time.sleep(fault)
                connection = http.client.HTTPConnection("127.0.0.1", proxy._port, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name != "Connection"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                self._answer(answer.status, answer.read(), dict(answer.getheaders()))
                connection.close()

            do_POST = do_PUT = do_PATCH = do_GET

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                with contextlib.suppress(OSError):  # nobody listens any more
                    self.send_response(status)
                    self.send_header("Content-Type", headers.get("content-type", "application/json"))
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        return Handler


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: float) -> Iterator[Path]:
    """A file system of that size on `folder`; PermissionError where this user cannot mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    except FileNotFoundError:
        raise PermissionError("there is no mount here") from None
    if done.returncode:
        raise PermissionError(done.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Take all of the disk but so many bytes; returns the file to delete again."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    with filler.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
        file.flush()
    return filler
