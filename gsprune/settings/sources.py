"""The code behind a dotted name: the source of the user's own modules, the versions of installed packages.

A class leads to the module that defines it, and from there to every module of the user's own that its source imports,
anywhere in it. Modules that the process has imported besides do not count, so that equal code has an equal mark in
every process.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import pydoc
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["code", "targets", "versions"]

OURS = ("gsprune", "hydra_plugins")
INSTALLED = ("site-packages", "dist-packages")
_BY_NAME = re.compile(rb"import_module|__import__|pkgutil")  # modules that the source does not name


class _Module(NamedTuple):
    name: str
    file: Path | None
    places: tuple[str, ...]  # where its submodules are, if it is a package

    @property
    def is_own(self) -> bool:
        """Neither Python's, nor this package's, nor installed."""
        top, parts = self.name.partition(".")[0], self.file.parts if self.file else self.places
        known = top in OURS or top in sys.stdlib_module_names
        return not known and not any(folder in INSTALLED for part in parts for folder in Path(part).parts)


def targets(node: Any) -> Iterator[str]:
    """The dotted names in a plain configuration: each `_target_`, and the `path` of Hydra's `get_class` and the like.

    >>> list(targets({"a": [{"_target_": "torch.optim.SGD"}], "_target_": "hydra.utils.get_class", "path": "app.Net"}))
    ['torch.optim.SGD', 'hydra.utils.get_class', 'app.Net']
    """
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(value)
    if isinstance(node, dict) and isinstance(name := node.get("_target_"), str) and re.fullmatch(r"[\w.]+", name):
        yield name
        if name.startswith("hydra.utils.get_") and isinstance(node.get("path"), str):
            yield node["path"]


def code(target: str) -> str | None:
    """sha256 of the source behind a name such as `package.module.Class`; None if the version of gsprune fixes it.

    For an installed package that gsprune does not require, it is the sha256 of the package's list of files.
    """
    files, _ = _source(target)
    if files:
        found = hashlib.sha256()
        for name in sorted(files):
            found.update(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n".encode())
        return found.hexdigest()
    return _listed(target.partition(".")[0])


def versions(targets: Iterable[str]) -> dict[str, str]:
    """Package -> version, of the installed packages that these names, or the user's own code behind them, import."""
    found = {}
    for target in targets:
        for top in {target.partition(".")[0], *_source(target)[1]} - {*OURS, *sys.stdlib_module_names}:
            for name in _distributions(top):
                found[name] = importlib.metadata.version(name)
    return found


def _source(target: str) -> tuple[dict[str, bytes], set[str]]:
    """The user's own modules behind a name, with their source, and the top names of other modules that they import."""
    waiting, files, others = _roots(target), dict[str, bytes](), set[str]()
    seen = set(waiting)
    while waiting:
        module = _find(waiting.pop())
        if module is None:
            continue
        if not module.is_own:
            others.add(module.name.partition(".")[0])
            continue
        for name in _read(module, files):
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    return files, others


def _read(module: _Module, files: dict[str, bytes]) -> Iterable[str]:
    """Add the source of a module to `files`; returns what the module imports, and its parent packages."""
    parents = [module.name[: dot.start()] for dot in re.finditer(r"[.]", module.name)]
    if module.file is None or not module.file.is_file():
        return parents
    files[module.name] = content = module.file.read_bytes()
    if module.file.suffix != ".py":
        return parents
    if _BY_NAME.search(content) and (top := _find(module.name.partition(".")[0])):
        for place in top.places:
            files.update({str(path.relative_to(place)): path.read_bytes() for path in Path(place).rglob("*.py")})
    return [*parents, *_imports(content, module.name, bool(module.places))]


def _roots(target: str) -> list[str]:
    """Every module that the name may lead through, and the module that defines its object."""
    parts = target.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    top = _find(parts[0])
    if top is not None and top.is_own:
        with contextlib.suppress(Exception):  # building the object reports it
            names.append(inspect.unwrap(pydoc.locate(target)).__module__)  # type: ignore[arg-type]
    return names


def _find(name: str) -> _Module | None:
    """Where a module is, without importing it."""
    top, *rest = name.split(".")
    module = _top(top)
    for part in rest:
        if module is None or not module.places:
            return None
        spec = PathFinder.find_spec(f"{module.name}.{part}", list(module.places))
        module = _Module(f"{module.name}.{part}", *_places(spec)) if spec else None
    return module


def _top(name: str) -> _Module | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module made at run time, or `__main__`
        file = getattr(sys.modules.get(name), "__file__", None)
        return _Module(name, Path(file), ()) if file else None
    return _Module(name, *_places(spec)) if spec else None


def _places(spec: importlib.machinery.ModuleSpec) -> tuple[Path | None, tuple[str, ...]]:
    file = Path(spec.origin) if spec.has_location and spec.origin else None
    return file, tuple(spec.submodule_search_locations or ())


@functools.lru_cache(maxsize=4096)
def _imports(content: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    """
    >>> _imports(b"import a.b, c\\nfrom . import d\\ndef f():\\n    from ..e import g", "p.q.r", False)
    ('a.b', 'c', 'p.q', 'p.q.d', 'p.e', 'p.e.g')
    """
    try:
        return tuple(_named(ast.parse(content), module.split(".") if is_package else module.split(".")[:-1]))
    except (SyntaxError, ValueError):
        return ()


def _named(tree: ast.AST, package: list[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


# --- what is installed -------------------------------------------------------------------------------------


@functools.cache
def _distributions(top: str) -> tuple[str, ...]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return (importlib.metadata.distribution(top).metadata["Name"],)
    return tuple(sorted(set(_all_distributions().get(top, ()))))


@functools.cache
def _all_distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@functools.cache
def _required() -> frozenset[str]:
    """What gsprune requires, extras included."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.requires("gsprune") or ()
        return frozenset(_plain(re.split(r"[^\w.-]", text)[0]) for text in required)
    return frozenset()


@functools.cache
def _listed(top: str) -> str | None:
    """sha256 of an installed package's list of files, which holds the hash of each file."""
    if top in OURS or top in sys.stdlib_module_names:
        return None
    names = [name for name in _distributions(top) if _plain(name) not in _required()]
    texts = [importlib.metadata.distribution(name).read_text("RECORD") or "" for name in names]
    return hashlib.sha256("".join(texts).encode()).hexdigest() if any(texts) else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
