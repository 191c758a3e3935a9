"""`gsprune doctor`: versions, devices, the tracking database, and what is missing with the command that brings it.

It imports nothing that may be missing, so that it runs in any environment.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gsprune.extras import EXTRAS, distribution, is_installed
from gsprune.text.redact import redacted
from gsprune.text.table import labelled, noun, size, terminal_width

CORE = ("torch", "numpy", "safetensors", "hydra", "omegaconf")
SECONDS = 3.0  # that a tracking server has to answer
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
FREE = 1_000_000_000  # bytes of room that a run should find


def make_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="gsprune doctor",
        description="Show versions, devices and the tracking database; say what is missing, and the command for it.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`gsprune doctor`: 0, or 1 where something is broken; an extra that is not installed is no fault."""
    make_parser().parse_args(arguments)
    faults: list[str] = []
    pairs = [
        ("gsprune", f"{_version('gsprune') or 'not installed as a package'}, in {Path(__file__).parents[1]}"),
        ("python", f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"),
        *_packages(faults),
        *_devices(),
        *_database(faults),
        *_disk(faults),
    ]
    print("\n".join(labelled(pairs, width=terminal_width())))
    for fault in faults:
        print(f"\nFault: {fault}")
    print("" if faults else "\nNothing is wrong.", end="" if faults else "\n")
    return 1 if faults else 0


def _packages(faults: list[str]) -> Iterator[tuple[str, str]]:
    yield "library", ", ".join(_package(name, faults, extra="") for name in CORE)
    for extra, names in EXTRAS.items():
        missing = [distribution(name) for name in names if not is_installed(name)]
        if missing and extra == "app" and len(missing) < len(names):
            faults.append(f"{', '.join(missing)} of the extra app is missing: pip install 'gsprune[app]'")
        if missing:
            yield f"[{extra}]", f"not installed ({', '.join(missing)}): pip install 'gsprune[{extra}]'"
        else:
            yield f"[{extra}]", ", ".join(_package(name, faults, extra=extra) for name in names)


def _package(module: str, faults: list[str], *, extra: str) -> str:
    """A package with its version; a fault where it is missing, or its version is not one that gsprune takes."""
    name = distribution(module)
    found = _version(name)
    more = f"[{extra}]" if extra else ""
    if found is None:
        faults.append(f"{name} is missing: pip install 'gsprune{more}'")
        return f"{name} missing"
    specifier = _wanted(extra).get(_plain(name))
    if specifier is not None and not specifier.contains(found, prereleases=True):
        told = f"{name} {found} is not of the versions that gsprune takes"
        faults.append(f"{told} ({specifier}): pip install '{name}{specifier}'")
    return f"{name} {found}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted(extra: str) -> dict[str, Any]:
    """Package -> the versions that gsprune, or an extra of it, takes; empty where nothing can read them."""
    try:
        requirements = importlib.import_module("packaging.requirements")
        listed = importlib.metadata.requires("gsprune") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    found = [requirements.Requirement(text) for text in listed]
    mine = [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {_plain(one.name): one.specifier for one in mine if str(one.specifier)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _devices() -> Iterator[tuple[str, str]]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        yield "devices", f"unknown: {error}"
        return
    cores = noun(os.cpu_count() or 1, "core")
    yield "devices", f"cpu ({cores}, torch uses {noun(torch.get_num_threads(), 'thread')})"
    for number in range(torch.cuda.device_count()):
        memory = size(torch.cuda.get_device_properties(number).total_memory)
        yield "", f"cuda:{number} {torch.cuda.get_device_name(number)}, {memory}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        yield "", "mps"


def _database(faults: list[str]) -> Iterator[tuple[str, str]]:
    """Where runs started here are tracked, and whether that answers."""
    if not is_installed("omegaconf") or not is_installed("mlflow"):
        yield "tracking", "without MLflow runs keep their local record: pip install 'gsprune[app]', then gsprune sync"
        return
    from gsprune.settings.addresses import database_file, resolve_tracking_uri

    whose = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "the default here"
    try:
        uri = resolve_tracking_uri(None)
    except ValueError as error:
        faults.append(str(error))
        yield "tracking", f"not usable ({whose})"
        return
    file = database_file(uri)
    state = _file_state(file) if file is not None else _server_state(uri)
    if state.startswith("not "):
        faults.append(f"the tracking store {redacted(uri)} is {state}")
    yield "tracking", f"{redacted(uri)} ({whose}): {state}"


def _file_state(file: Path) -> str:
    if not file.exists():
        folder = next(path for path in file.parents if path.exists())
        writable = os.access(folder, os.W_OK)
        return "made by the first run" if writable else f"not reachable: {folder} cannot be written"
    try:
        with sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=SECONDS) as database:
            runs = database.execute("select count(*) from runs").fetchone()[0]
    except sqlite3.Error as error:
        return f"not reachable: {error}"
    return f"reachable, with {noun(runs, 'run')}" if os.access(file, os.W_OK) else "not writable"


def _server_state(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.hostname is None:
        return "its client will say whether it answers"
    port = parts.port or PORTS.get(parts.scheme.partition("+")[0], 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        return f"not reachable: {error.strerror or error}"
    return f"{parts.hostname} answers on port {port}"


def _disk(faults: list[str]) -> Iterator[tuple[str, str]]:
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    if not writable:
        faults.append(f"{Path.cwd()} cannot be written: start runs elsewhere, or give hydra.run.dir")
    if free < FREE:
        faults.append(f"only {size(free)} are free in {Path.cwd()}")
    yield "directory", f"{Path.cwd()}, {size(free)} free{'' if writable else ', not writable'}"
