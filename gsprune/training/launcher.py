"""Start processes that train one network together, on one machine or several, and end them together.

`launch` starts them with torch's launcher; `taking_part` joins processes that torchrun started. For what they send each
other see `gsprune.collectives`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gsprune.collectives import world_size
from gsprune.text.redact import last_line, redacted_message
from gsprune.training.signals import SIGNALS, Interrupted

__all__ = ["ProcessFailed", "Processes", "launch", "taking_part", "under_torchrun", "undisturbed"]

Result = TypeVar("Result")
BEGUN = "begun"  # a file: the processes are connected and work
LINGER = 5.0  # seconds
STOPPED = tuple(128 + number for number in SIGNALS)  # exit codes of processes that a signal stopped


class ProcessFailed(RuntimeError):
    """One of several processes failed, for another reason than a mistake of the user; the others were stopped."""


@dataclass(frozen=True)
class Processes:
    """The number of processes, and how they connect.

    Attributes:
        devices: processes on this machine (node).
        nodes: machines; the same command is started on each.
        rendezvous: "host:port" of one machine, which listens there. Required for more than one node.
        timeout_minutes: how long a process waits for the others before it fails.
        name: name of the job; only processes with the same name connect.
    """

    devices: int
    nodes: int = 1
    rendezvous: str | None = None
    timeout_minutes: float = 30.0
    name: str = ""


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several that are not connected yet."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return named and int(os.environ["WORLD_SIZE"]) > 1 and world_size() == 1


@contextlib.contextmanager
def taking_part(device: str, *, timeout_minutes: float) -> Iterator[None]:
    """Join the processes that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, ...), as torchrun sets it.

    Args:
        device: with "cuda" the process uses GPU number LOCAL_RANK. NCCL sends tensors on a GPU, gloo all others.
    """
    local, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(local)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // beside))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for collectives that the others still run


def launch(processes: Processes, device: str, work: Callable[..., Result], *arguments: Any) -> Result:
    """Call `work(*arguments)` in each of several new, connected processes, and wait for them.

    If one fails, the others are stopped, and its error is raised here, on every machine: a ValueError unchanged, any
    other as a `ProcessFailed` with the traceback of that process. A signal that stops them stops this process.

    Args:
        device: as for `taking_part`.
        work: a function of a module, which each process imports; arguments and result are pickled.

    Returns:
        The result of `work` in the process of this machine with the lowest rank.

    Raises:
        ValueError: `work` raised one, or the machines did not connect.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone, patience = processes.nodes == 1, 60 * processes.timeout_minutes
    if not alone:
        _check_rendezvous(processes)
    with tempfile.TemporaryDirectory(prefix="gsprune-") as folder, _quiet_launcher():
        config = LaunchConfig(
            min_nodes=processes.nodes,
            max_nodes=processes.nodes,
            nproc_per_node=processes.devices,
            run_id=uuid.uuid4().hex if alone else processes.name,
            rdzv_backend="c10d",
            rdzv_endpoint=processes.rendezvous or "localhost:0",
            # a connection is tried twice
            rdzv_configs={"join_timeout": max(1, round(patience)), "read_timeout": max(1, round(patience / 2))},
            local_addr="localhost" if alone else None,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            returned = elastic_launch(config, _member)(folder, device, processes.timeout_minutes, work, arguments)
        except ChildFailedError as error:
            if (code := error.get_first_failure()[1].exitcode) in STOPPED:
                raise Interrupted(code - 128) from None
            told = _first_told(Path(folder), error)
            told = told if alone else _first_of_all(processes, told)
            failed = ValueError if told["mistake"] else ProcessFailed
            raise failed(told["text"]) from (_Traceback(told["traceback"]) if told["traceback"] else None)
        except RendezvousError as error:
            if Path(folder, BEGUN).exists():
                raise ProcessFailed(
                    f"the machine at trainer.rendezvous={processes.rendezvous} no longer answers, which ended the run"
                ) from None
            raise ValueError(_not_met(processes, late=isinstance(error, RendezvousTimeoutError))) from None
        except SignalException as error:
            raise Interrupted(error.sigval) from None
    return returned[min(returned)]  # type: ignore[no-any-return]


def _member(
    folder: str, device: str, timeout_minutes: float, work: Callable[..., Result], arguments: Sequence[Any]
) -> Result:
    """One of the processes. An error is written to a file, because the launcher passes on only text of a traceback."""
    signal.signal(signal.SIGTERM, _end)
    Path(folder, BEGUN).touch()
    try:
        with taking_part(device, timeout_minutes=timeout_minutes):
            return work(*arguments)
    except Exception as error:
        number, mistake = int(os.environ["RANK"]), isinstance(error, ValueError)
        told = {
            "rank": number,
            "time": time.time(),
            "mistake": mistake,
            "follows": isinstance(error, RuntimeError),  # often because another process ended
            "text": redacted_message(str(error)) if mistake else f"process {number} failed: {last_line(error)}",
            "traceback": redacted_message(traceback.format_exc()),
        }
        Path(folder, f"error-{number}.json").write_text(json.dumps(told))
        if told["follows"]:
            time.sleep(2.0)  # the launcher must see the other failure first
        raise


def _end(number: int, _: object) -> None:
    """After a failure the launcher stops the other processes: they exit through their `finally` blocks."""
    raise SystemExit(128 + number)


def undisturbed() -> None:
    """Ignore signals from now on, because this process already ends."""
    if world_size() > 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _check_rendezvous(processes: Processes) -> None:
    """Raise a ValueError if another program listens at the address.

    torch would wait for its answer without limit, so the check runs in a process that can be stopped.
    """
    try:
        socket.create_connection(_address(processes), timeout=LINGER).close()
    except (OSError, OverflowError):
        return  # nothing listens there yet
    greet = "import sys, torch.distributed as d; d.TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False)"
    try:
        command = [sys.executable, "-c", greet, *map(str, _address(processes))]
        subprocess.run(command, capture_output=True, timeout=min(30.0, 60 * processes.timeout_minutes), check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"trainer.rendezvous={processes.rendezvous} is in use by another program: choose another port"
        ) from None


def _address(processes: Processes) -> tuple[str, int]:
    host, _, port = (processes.rendezvous or "").rpartition(":")
    return host, int(port)


def _not_met(processes: Processes, *, late: bool) -> str:
    where, minutes = f"trainer.rendezvous={processes.rendezvous}", f"{processes.timeout_minutes:g} minutes"
    if late:
        return (
            f"not all of {processes.nodes} machines connected to {where} within {minutes}: start the same command on "
            f"each of them, or raise trainer.timeout_minutes"
        )
    return f"{where} did not answer for {minutes}: check the name of the host, and that the port is open"


def _first_told(folder: Path, error: Any) -> dict[str, Any]:
    """The error of the process of this machine that failed first."""
    number, failure = error.get_first_failure()
    told: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if any(one["rank"] == number for one in told):
        return min(told, key=lambda one: float(one["time"]))
    code = failure.exitcode  # it wrote no file
    how = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
    return {"mistake": False, "follows": False, "text": f"process {number} {how}", "traceback": None}


def _first_of_all(processes: Processes, told: dict[str, Any]) -> dict[str, Any]:
    """The error of the machine that failed first: each writes its error to the common store and waits for the others.

    An error that may be caused by another machine is written last.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in every build

    with contextlib.suppress(RuntimeError):  # the store is gone
        met = TCPStore(*_address(processes), is_master=False, timeout=timedelta(seconds=LINGER))
        store = PrefixStore(f"gsprune {processes.name}", met)
        if told["follows"]:
            with contextlib.suppress(RuntimeError):
                store.wait(["first"], timedelta(seconds=LINGER))
        told = json.loads(store.compare_set("first", "", json.dumps(told)))
        left, end = store.add("left", 1), time.monotonic() + LINGER
        while left < processes.nodes and time.monotonic() < end:  # the machine with the store must exit last
            time.sleep(0.1)
            left = store.add("left", 0)
    return told


class _Traceback(Exception):
    """The traceback of another process, printed above the error that it ended with."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Mute the log of torch's launcher, and restore the signal handlers that it replaces."""
    level = logging.root.manager.disable  # its loggers set their own levels; nothing else logs here
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        for number, handler in handlers.items() if main else ():
            signal.signal(number, handler)
