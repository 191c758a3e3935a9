"""The part of a configuration that may be recorded or hashed: no secret, and no value of the environment."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gsprune.text import redact
from gsprune.text.nested import leaves, mapped
from gsprune.text.redact import (
    MASK,
    by_shape,
    gives_access,
    is_certain,
    is_open,
    is_secret,
    password_of,
    redacted_data,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["address_with_password", "hashable", "hide", "recorded", "variables"]

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*(\$\{[^{}]*\}|[^,{}\s]+)")
_REFERENCE = re.compile(r"\$\{(\.*[\w\-]+(?:\.[\w\-]+)*)\}")


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as it goes on record.

    References to itself are resolved, `${oc.env:...}` and every other resolver stay as written, secrets are redacted.

    >>> from omegaconf import OmegaConf
    >>> recorded(OmegaConf.create({"a": {"n": 3, "token": "abc"}, "b": "${a.n}", "c": "${oc.env:HOME}", "d": "${c}"}))
    {'a': {'n': 3, 'token': '***'}, 'b': 3, 'c': '${oc.env:HOME}', 'd': '${oc.env:HOME}'}
    """
    written = _written(cfg)
    return {str(key): value for key, value in redacted_data(_resolved(written, (), written, depth=0)).items()}


def _written(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg


def _resolved(node: Any, path: tuple[Any, ...], root: Any, *, depth: int) -> Any:
    """A part of the configuration with its references to the rest resolved, at most 20 of them one after another."""

    def resolved(leaf: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(leaf, str) or "${" not in leaf or depth > 20:
            return leaf
        if whole := _REFERENCE.fullmatch(leaf):
            return _target(whole[1], path, root, depth, otherwise=leaf)
        return _REFERENCE.sub(lambda found: inside(found, path), leaf)

    def inside(found: re.Match[str], path: tuple[Any, ...]) -> str:
        value = _target(found[1], path, root, depth, otherwise=found[0])
        return found[0] if isinstance(value, (dict, list)) or value is None else str(value)

    return mapped(node, resolved, path)


def _target(reference: str, path: tuple[Any, ...], root: Any, depth: int, *, otherwise: str) -> Any:
    dots = len(reference) - len(reference.lstrip("."))
    parts = [*(path[: len(path) - dots] if dots else ()), *reference[dots:].split(".")]
    if any(is_secret(str(part)) for part in parts):
        return otherwise
    node = root
    for part in parts:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return otherwise
    return _resolved(node, tuple(parts), root, depth=depth + 1)


def hide(cfg: DictConfig | None = None) -> None:
    """Remember the secrets that no text of this process may hold.

    These are values with a secret's name in the configuration and the environment, passwords in addresses, and for
    `mentioned` the other values that the configuration takes from the environment.
    """
    for name, value in os.environ.items():
        if is_secret(name) and is_certain(name) and not os.path.exists(value):
            redact.hidden.add(value, MASK, least=8)
    for path, value in leaves(_written(cfg)) if cfg is not None else ():
        text = str(value)
        if any(map(is_secret, path)):
            found = _value(cfg, path) if "${" in text else value
            if found is not None and not isinstance(found, bool) and not is_open(str(found)):
                redact.hidden.add(str(found), MASK, least=4)
        for name in variables(text, path, cfg):
            _hide_variable(name)
        if isinstance(value, str) and (password := password_of(value)):
            redact.hidden.add(password, MASK, least=4)


def variables(text: str, path: tuple[str, ...] = (), cfg: Any = None) -> Iterator[str]:
    """The environment variables that a value reads, also if it refers to their names."""
    for name in _ENVIRONMENT.findall(text):
        if whole := _REFERENCE.fullmatch(name):
            name = str(_target(whole[1], path, _written(cfg), depth=0, otherwise=name))
        yield name.strip("'\"")


def _hide_variable(name: str) -> None:
    value = os.environ.get(name, "")
    if is_secret(name):
        redact.hidden.add(value, MASK, least=4)
    elif not os.path.exists(value) and not value.isdigit() and value not in os.getcwd():
        redact.mentioned.add(value, f"${{oc.env:{name}}}", least=6)
    if password := password_of(value):
        redact.hidden.add(password, MASK, least=4)


def _value(cfg: Any, path: Sequence[str]) -> Any:
    """The resolved value at a path; None if there is none."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        for part in path:
            cfg = cfg[int(part)] if part.isdigit() and part not in cfg else cfg[part]
    except (OmegaConfBaseException, KeyError, IndexError, TypeError, ValueError):
        return None
    return cfg


def address_with_password(cfg: DictConfig) -> tuple[str, str] | None:
    """The first key whose address holds a password (or, for a web server, a user), and the address without it."""
    for path, value in leaves(_written(cfg)):
        if path[:2] == ("hydra", "overrides") or path[-1:] == ("override_dirname",):  # copies of other values
            continue
        if isinstance(value, str) and gives_access(value):
            return ".".join(path), by_shape(value)
    return None


def hashable(resolved: Any, cfg: DictConfig) -> Any:
    """A resolved configuration, to be hashed.

    The hash is on record beside everything else that goes into it, so a short secret in it could be guessed. A secret
    that only gives access is left out: another one makes the same job. A `key`, which may name something in the data,
    goes through a slow hash. Everything else counts as it is.
    """
    written = dict(leaves(_written(cfg)))
    certain: dict[str, str] = {}

    def safe(leaf: Any, path: tuple[Any, ...]) -> Any:
        path = tuple(map(str, path))
        taken = variables(str(written.get(path, "")), path, cfg)
        names = [name for name in (*path, *taken) if is_secret(name)]
        if not names or leaf is None or isinstance(leaf, bool) or not str(leaf):
            return by_shape(leaf) if isinstance(leaf, str) else leaf
        if not any(is_certain(name, leaf) for name in names):
            return hashlib.scrypt(str(leaf).encode(), salt=b"gsprune", n=2**14, r=8, p=1).hex()
        certain[str(leaf)] = MASK
        return MASK

    found = mapped(resolved, safe)
    copied = [value for value in certain if len(value) >= 4]  # a reference may have copied them to other places
    return mapped(found, lambda x, _: MASK if isinstance(x, str) and any(value in x for value in copied) else x)
