"""What each value of a configuration means, for `--help`: from the comments of its files and the docstrings behind it.

Nothing is imported for it: the files are read as text.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gsprune.conf.signatures import docstrings

__all__ = ["register", "values"]

RESOLVER = "gsprune_values"
WIDTH, COLUMN = 110, 38  # of the page; of its first column
HIDDEN = ("_target_", "_partial_", "_convert_", "_recursive_")
FORMER = "pruner.target."  # what `pruner.budget` was called
_YAML = {"None": "null", "True": "true", "False": "false"}  # docstrings speak Python
OURS = Path(__file__).parent


def register(conf: Path) -> None:
    """Let `${gsprune_values:}` in a help text be the values of the composed configuration, with what they mean.

    Args:
        conf: the directory of the application's configuration.
    """
    newer = "replace" in inspect.signature(OmegaConf.register_resolver).parameters  # OmegaConf 2.4
    enter: Any = OmegaConf.register_resolver if newer else OmegaConf.register_new_resolver
    enter(RESOLVER, lambda _root_: _escaped(values(_root_, conf)), replace=True)


def _escaped(text: str) -> str:
    """Hydra fills in what follows a dollar."""
    return text.replace("$", "$$")


def values(config: DictConfig, conf: Path) -> str:
    """Lines of "key=value   what it means" for every value, as a command would set it."""
    choices = OmegaConf.select(config, "hydra.runtime.choices") or {}
    meanings = _comments(conf / "config.yaml")
    for group, choice in choices.items():
        if not str(group).startswith("hydra/") and choice is not None:
            meanings |= _of_group(str(group), str(choice), (OURS, conf))
    lines: list[str] = []
    for key in config:
        if key == "hydra":
            continue
        lines += [*_lines(config, str(key), meanings), ""]
    return "\n".join(lines).rstrip()


def _lines(config: DictConfig, key: str, meanings: Mapping[str, str]) -> Iterator[str]:
    said = set[str]()
    for name, text in _leaves(config._get_node(key), key):
        if name.startswith(FORMER):
            continue
        shown, told, above = f"{name}={text}", meanings.get(name, ""), name.rpartition(".")[0]
        if not told and above not in said:  # several settings may have one meaning
            said.add(above)
            told = meanings.get(above, "")
        told = re.sub(r"\b(None|True|False)\b", lambda word: _YAML[word[0]], told)
        parts = textwrap.wrap(told, WIDTH - COLUMN, break_on_hyphens=False)
        if len(shown) >= COLUMN and parts:
            yield shown
            shown = ""
        yield f"{shown:<{COLUMN}}{parts[0] if parts else ''}".rstrip()
        yield from (" " * COLUMN + part for part in parts[1:])


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation() and len(node):
        for key in map(str, node):
            if key not in HIDDEN:
                yield from _leaves(node._get_node(key), f"{name}.{key}")
    elif isinstance(node, ListConfig) and any(isinstance(item, DictConfig) for item in node._content or ()):
        for number in range(len(node)):
            yield from _leaves(node._get_node(number), f"{name}.{number}")
    else:
        yield name, _text(node)


def _text(node: Any) -> str:
    value = node._content if isinstance(node, ListConfig) else node._value()
    if isinstance(value, list):
        return f"[{','.join(_text(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _of_group(group: str, choice: str, places: tuple[Path, ...]) -> dict[str, str]:
    """What the settings of a group mean: its docstrings first, then the comments of the chosen file."""
    found: dict[str, str] = {}
    for place in places:
        path = place / group / f"{choice}.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf8")
            package = "" if re.search(r"^# @package _global_", text, re.MULTILINE) else f"{group.replace('/', '.')}."
            for inner, target in _targets(text):
                above = f"{package}{inner}".rstrip(".")
                found |= {f"{above}.{name}": told for name, told in _arguments(target).items()}
            found |= {f"{package}{name}": told for name, told in _comments(path).items()}
    return found


def _targets(text: str) -> Iterator[tuple[str, str]]:
    """The place and the dotted name of each `_target_`; a pruner takes the settings of a rule, too."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)(?:- )?(\w+):(.*)", line)
        if found is None:
            continue
        depth = len(found[1])
        above = [part for part in above if part[0] < depth]
        if found[2] == "_target_":
            target, place = found[3].partition("#")[0].strip(), "".join(f"{name}." for _, name in above)
            yield place, target
            yield from ((place, "gsprune.Rule"),) if target == "gsprune.Pruner" else ()
        above.append((depth, found[2]))


def _arguments(target: str) -> dict[str, str]:
    """The first sentence about each argument, from the docstrings of a class or function of this package."""
    found: dict[str, str] = {}
    if not target.startswith("gsprune."):
        return found
    for text in docstrings(target):
        section = re.search(r"^Args:\n((?:(?: +.*)?(?:\n|\Z))+?)(?=\S|\Z)", text, re.MULTILINE)
        body = textwrap.dedent(section[1]) if section else ""
        for entry in re.finditer(r"^([\w, ]+): (.*(?:\n[ ]+.*)*)", body, re.MULTILINE):
            told = " ".join(entry[2].split())
            first = re.split(r"(?<=[^.])\. (?=[A-Z\"])", told)[0].rstrip(".")
            found |= {name.strip(): first for name in entry[1].split(",")}
    return found


def _comments(path: Path) -> dict[str, str]:
    """What stands behind a value in a file, by the name of the value.

    A comment that runs on in the next line is not read: one line says what a value means.
    """
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
        key = re.match(r"( *)(\w+):", line)
        if key is None:
            continue
        above = [part for part in above if part[0] < len(key[1])]
        above.append((len(key[1]), key[2]))
        if (comment := re.search(r"\s# (.+)$", line)) is not None:
            found[".".join(name for _, name in above)] = comment[1]
    return found
