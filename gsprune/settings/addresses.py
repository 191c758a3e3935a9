"""Tracking addresses: which are allowed, the file of a SQLite address, and the directory of relative paths."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import sys
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from gsprune.text.redact import redacted

__all__ = ["SCHEMES", "check_address", "command_directory", "database_file", "database_uri", "resolve_tracking_uri"]

_SQLITE = "sqlite:///"
# Where MLflow keeps runs; SQLAlchemy's driver may follow the name of a database, as in postgresql+psycopg2.
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


def command_directory() -> Path:
    """The directory of the command; Hydra may start a job in another one (`hydra.job.chdir=true`).

    The working directory if Hydra does not run, or if the command's directory is on another machine.
    """
    module = sys.modules.get("hydra.core.hydra_config")
    with contextlib.suppress(Exception):  # Hydra raises several errors for a configuration without that value
        if module is not None and module.HydraConfig.initialized():
            cwd = Path(module.HydraConfig.get().runtime.cwd)
            return cwd if cwd.is_dir() else Path.cwd()
    return Path.cwd()


def resolve_tracking_uri(uri: str | None) -> str:
    """MLflow's address with an absolute path, as the working directory of a run may change.

    Args:
        uri: None takes `MLFLOW_TRACKING_URI`, else `mlflow.db` in `command_directory`.

    Raises:
        ValueError: MLflow cannot track there.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return database_uri(command_directory() / "mlflow.db")
    check_address(uri)
    file = database_file(uri)
    return uri if file is None else database_uri(file) + _split(uri)[1]


def check_address(uri: str) -> None:
    """Check the address of a tracking server or database.

    Raises:
        ValueError: it is none; the message has the nearest one.

    >>> check_address("htp://foo")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: the tracking address htp://foo is not allowed: did you mean http://foo? It must begin with http://, ...
    """
    plugins = [entry.name for entry in entry_points(group="mlflow.tracking_store")]
    if re.match(r"(?:databricks|uc)(?::|$)", uri) or uri.partition(":")[0] in plugins or _is_address(uri):
        return
    *most, last = (f"{scheme}:///" if scheme == "sqlite" else f"{scheme}://" for scheme in SCHEMES)
    given, near = redacted(uri), redacted(_nearest(uri))
    raise ValueError(
        f"the tracking address {given} is not allowed: did you mean {near}? "
        f"It must begin with {', '.join(most)} or {last}"
    )


def _is_address(uri: str) -> bool:
    scheme, separator, rest = uri.partition("://")
    dialect = scheme.lower().partition("+")[0]
    if not separator or dialect not in SCHEMES or not rest:
        return False
    if dialect == "sqlite":
        return rest.startswith("/") and rest != "/"
    return dialect not in ("http", "https") or _host_of(uri) is not None


def _host_of(uri: str) -> str | None:
    """None without a host, or with a port that is no number."""
    try:
        parts = urlsplit(uri)
        return parts.hostname if parts.port != 0 else None
    except ValueError:
        return None


def _nearest(uri: str) -> str:
    found = re.fullmatch(r"([A-Za-z][\w+]*)(?::/*|//+)(.*)", uri)
    if found is None or found[1].lower() == "file":  # a folder: MLflow's former file store
        return f"sqlite:///{(found[2] if found else uri).rstrip('/')}/mlflow.db"
    dialect, plus, driver = found[1].lower().partition("+")
    near = next(iter(get_close_matches(dialect, SCHEMES, n=1)), "http")
    if near == "sqlite":
        return f"sqlite:///{found[2] or 'mlflow.db'}"
    if near in ("http", "https") and _host_of(f"{near}://{found[2]}") is None:
        return f"{near}://{found[2].partition(':')[0] or 'host'}:5000"
    return f"{near}{plus}{driver}://{found[2] or 'host'}"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite address, None for servers and other databases.

    Text after a `?` is options if it has the form `name=value`, else it is part of the path.

    >>> database_file("sqlite:////data/mlflow.db").as_posix(), database_file("http://host:5000")
    ('/data/mlflow.db', None)
    >>> database_file("sqlite:////data/a%3Fb/mlflow.db?timeout=20").name
    'mlflow.db'
    """
    path = _split(uri)[0].removeprefix(_SQLITE)
    if not uri.startswith(_SQLITE) or not path or ":memory:" in path or path.startswith("file:"):
        return None
    return Path(os.path.abspath(command_directory() / (unquote(path) if _decoded() else path)))


def database_uri(file: Path) -> str:
    """The SQLite address of a file, for any names of folders.

    SQLAlchemy reads `%20` as a space and everything from a `?` on as options, so both are percent-encoded, and the
    slashes after them too, as MLflow creates the folders of an address as it is written.

    Raises:
        ValueError: the path has a `?`, and the installed SQLAlchemy does not decode percent-encoding.

    >>> database_uri(Path("/data/my runs/mlflow.db"))
    'sqlite:////data/my runs/mlflow.db'
    """
    path = file.as_posix()
    if not _decoded():
        if "?" in path:
            raise ValueError(
                f"SQLAlchemy before 2.1 cannot open {path}, for the ? in it: install 2.1, or give another path in "
                "tracking.tracking_uri"
            )
        return _SQLITE + path
    special = re.search("[%?]", path)
    head = path.rfind("/", 0, special.start()) + 1 if special else len(path)
    return _SQLITE + path[:head] + re.sub("[%?/]", lambda found: quote(found[0], safe=""), path[head:])


def _split(uri: str) -> tuple[str, str]:
    """An address without its options, and the options with their question mark."""
    path, mark, options = uri.rpartition("?")
    return (path, mark + options) if mark and re.match(r"\w+=", options) else (uri, "")


@functools.cache
def _decoded() -> bool:
    """Whether SQLAlchemy decodes `%20` in the path of an address, as it does from 2.1 on."""
    try:
        version = importlib.metadata.version("sqlalchemy")
    except importlib.metadata.PackageNotFoundError:
        return True
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 1)
