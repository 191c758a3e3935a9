"""What of a configuration may be written down or hashed: no password, nothing that only the environment knows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gsprune.text import redact
from gsprune.text.redact import (
    MASK,
    by_shape,
    cleaned,
    is_certain,
    is_open,
    is_secret,
    opens_a_door,
    password_of,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["address_with_password", "hashable", "hide", "recorded", "variables"]

# --- configurations ----------------------------------------------------------------------------------------

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*(\$\{[^{}]*\}|[^,{}\s]+)")
_REFERENCE = re.compile(r"\$\{(\.*[\w\-]+(?:\.[\w\-]+)*)\}")


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as it goes on record: what it takes from elsewhere (`${oc.env:...}` and every other resolver)
    stays as it was written, its references to itself are followed as far as that, and secrets are masked.

    >>> from omegaconf import OmegaConf
    >>> recorded(OmegaConf.create({"a": {"n": 3, "token": "abc"}, "b": "${a.n}", "c": "${oc.env:HOME}", "d": "${c}"}))
    {'a': {'n': 3, 'token': '***'}, 'b': 3, 'c': '${oc.env:HOME}', 'd': '${oc.env:HOME}'}
    """
    found = _followed(_written(cfg), (), _written(cfg), depth=0)
    assert isinstance(found, dict)
    return {str(key): value for key, value in cleaned(found).items()}


def _written(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg


def _followed(node: Any, path: tuple[Any, ...], root: Any, *, depth: int) -> Any:
    if isinstance(node, dict):
        return {key: _followed(value, (*path, key), root, depth=depth) for key, value in node.items()}
    if isinstance(node, list):
        return [_followed(value, (*path, index), root, depth=depth) for index, value in enumerate(node)]
    if not isinstance(node, str) or "${" not in node or depth > 20:
        return node
    if whole := _REFERENCE.fullmatch(node):
        return _target(whole[1], path, root, depth, otherwise=node)

    def inside(found: re.Match[str]) -> str:
        value = _target(found[1], path, root, depth, otherwise=found[0])
        return found[0] if isinstance(value, (dict, list)) or value is None else str(value)

    return _REFERENCE.sub(inside, node)


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
    return _followed(node, tuple(parts), root, depth=depth + 1)


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else None
    if pairs is None:
        yield path, node
        return
    for key, value in pairs:
        yield from _leaves(value, (*path, str(key)))


def hide(cfg: DictConfig | None = None) -> None:
    """Remember what texts of this process may not hold: values with a name like a secret's in the configuration and in
    the environment, passwords in its addresses, and for `told` what else it takes from the environment."""
    for name, value in os.environ.items():
        if is_secret(name) and is_certain(name) and not os.path.exists(value):
            redact.hidden.add(value, MASK, least=8)
    for path, value in _leaves(_written(cfg)) if cfg is not None else ():
        text = str(value)
        if any(map(is_secret, path)):
            found = _resolved(cfg, path) if "${" in text else value
            if found is not None and not isinstance(found, bool) and not is_open(str(found)):
                redact.hidden.add(str(found), MASK, least=4)
        for name in variables(text, path, cfg):
            _hide_variable(name)
        if isinstance(value, str) and (password := password_of(value)):
            redact.hidden.add(password, MASK, least=4)


def variables(text: str, path: tuple[str, ...] = (), cfg: Any = None) -> Iterator[str]:
    """The environment's variables that a value takes, also where it refers to their names."""
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


def _resolved(cfg: Any, path: Sequence[str]) -> Any:
    from omegaconf.errors import OmegaConfBaseException

    try:
        for part in path:
            cfg = cfg[int(part)] if part.isdigit() and part not in cfg else cfg[part]
    except (OmegaConfBaseException, KeyError, IndexError, TypeError, ValueError):
        return None
    return cfg


def address_with_password(cfg: DictConfig) -> tuple[str, str] | None:
    """The first key with an address that holds a password (or, of a web server, a user), and the address without it."""
    for path, value in _leaves(_written(cfg)):
        if path[:2] == ("hydra", "overrides") or path[-1:] == ("override_dirname",):  # which repeat what others have
            continue
        if isinstance(value, str) and opens_a_door(value):
            return ".".join(path), by_shape(value)
    return None


def hashable(resolved: Any, cfg: DictConfig) -> Any:
    """A resolved configuration, to be hashed.

    The hash is on record beside all else that goes into it, so a short secret in it could be guessed. One that only
    opens a door is left out (with another one it is the same job); a `key`, which may be a name of something in the
    data, costs whoever guesses a slow hash for each try. All else counts as it is resolved.
    """
    written = dict(_leaves(_written(cfg)))
    certain: dict[str, str] = {}

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: visit(value, (*path, str(key))) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [visit(value, (*path, str(index))) for index, value in enumerate(node)]
        taken = variables(str(written.get(path, "")), path, cfg)
        names = [name for name in (*path, *taken) if is_secret(name)]
        if not names or node is None or isinstance(node, bool) or not str(node):
            return by_shape(node) if isinstance(node, str) else node
        if not any(is_certain(name, node) for name in names):
            return hashlib.scrypt(str(node).encode(), salt=b"gsprune", n=2**14, r=8, p=1).hex()
        certain[str(node)] = MASK
        return MASK

    return _without(visit(resolved, ()), [value for value in certain if len(value) >= 4])


def _without(node: Any, values: Sequence[str]) -> Any:
    """The same without texts that hold one of the values: a reference has brought them there."""
    if not values:
        return node
    if isinstance(node, Mapping):
        return {key: _without(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_without(value, values) for value in node]
    return MASK if isinstance(node, str) and any(value in node for value in values) else node
