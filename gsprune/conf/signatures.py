"""Names, types and defaults of a class's settings, read from its source.

A default is written in one place, the signature of the class. Its source is parsed and not imported, because Hydra
composes the configuration for `--help` and for shell completion too, and importing torch takes seconds.

>>> [tuple(setting) for setting in settings("gsprune.criteria.Weighted")]
[('decay', <class 'float'>, 0.95), ('normalize', bool | None, None)]
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field
from importlib import import_module, resources
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

REQUIRED: Any = object()  # the default of a setting without one


class Setting(NamedTuple):
    """A parameter of a class, or a field of a dataclass: its type as `config_type` has it, its default or REQUIRED."""

    name: str
    type: Any
    default: Any


def settings(target: str, *, without: Collection[str] = ()) -> list[Setting]:
    """The settings of the class with the dotted name `target`, in the order of its signature.

    A dataclass has its fields, any other class the parameters of its own or an inherited `__init__`. Types of other
    packages are `object`; parameters in `without` are not looked at.
    """
    module, _, name = target.rpartition(".")
    parts = {part[1]: part for part in _parts(_Source.of(module), name) if part[1] not in without}
    return [_setting(*part) for part in parts.values()]


def docstrings(target: str) -> Iterator[str]:
    """Those of a class or function with the dotted name `target`, and of the classes that it inherits from.

    >>> any("decay:" in text for text in docstrings("gsprune.criteria.Fisher"))
    True
    """
    module, _, name = target.rpartition(".")
    with contextlib.suppress(OSError, SyntaxError):
        yield from _docstrings(_Source.of(module), name)


def _docstrings(source: _Source, name: str) -> Iterator[str]:
    node = source.nodes.get(name)
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gsprune."):
        yield from _docstrings(_Source.of(str(node.module)), name)
    elif isinstance(node, ast.ClassDef | ast.FunctionDef):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            yield from _docstrings(source, ast.unparse(base))
        yield ast.get_docstring(node) or ""


def config_type(hint: Any) -> Any:
    """The part of a type that a configuration can hold; Any for a type that it cannot.

    A literal becomes its type and a sequence a list. A mapping whose keys are literals, and a `TypedDict`, become a
    dict from each key to the type of its value. Members of a union that a configuration cannot hold are left out.

    >>> [config_type(hint) for hint in (Literal["local", "global"] | None, Sequence[str], str | object, object)]
    [str | None, list[str], <class 'str'>, typing.Any]
    >>> config_type(Mapping[Literal["heads", "neurons"], int] | None)
    {'heads': <class 'int'>, 'neurons': <class 'int'>}
    >>> config_type(TypedDict("Budget", {"macs": float, "runtime": Literal["eager"]}) | None)
    {'macs': <class 'float'>, 'runtime': <class 'str'>}
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str):
        return hint
    if origin is Literal:
        return type(args[0])
    if origin is Sequence:
        return list[config_type(args[0])]  # type: ignore[misc]
    if origin is Mapping and get_origin(args[0]) is Literal:
        return dict.fromkeys(get_args(args[0]), config_type(args[1]))
    if is_typeddict(hint):
        return {key: config_type(value) for key, value in get_type_hints(hint).items()}
    if origin in (Union, UnionType):
        known = [found for arg in args if arg is not NoneType and (found := config_type(arg)) is not Any]
        if len(known) == 1:
            return known[0] | None if NoneType in args and not isinstance(known[0], dict) else known[0]
    return Any


class _Source(dict[str, Any]):
    """The names of one module: `nodes` defines them, the dict has their values once they were looked up."""

    def __init__(self, module: str) -> None:
        *folders, last = module.split(".")
        folder = resources.files("gsprune").joinpath(*folders[1:])  # of a package that is not imported for it
        file = folder / f"{last}.py"
        if not file.is_file():
            file = (folder / last if folders else folder) / "__init__.py"
        tree = ast.parse(file.read_bytes())
        guarded = [part for node in tree.body if isinstance(node, ast.If) for part in node.body]  # if TYPE_CHECKING
        self.nodes: dict[str, ast.stmt] = {}
        for node in [*tree.body, *guarded]:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.nodes |= {alias.asname or alias.name: node for alias in node.names}
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.nodes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.nodes[node.targets[0].id] = node

    @classmethod
    @functools.cache
    def of(cls, module: str) -> _Source:
        return cls(module)

    def __missing__(self, name: str) -> Any:
        node = self.nodes[name]  # a KeyError: eval goes on with the builtins
        if isinstance(node, ast.Assign):
            self[name] = self.value(node.value)
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "TypedDict" for base in node.bases):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            known = {ast.unparse(field.target): self.value(field.annotation) for field in fields}
            self[name] = TypedDict(name, known, total=False)  # type: ignore[operator]
        elif isinstance(node, ast.Import) and name in sys.stdlib_module_names:
            self[name] = import_module(name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("gsprune."):
            self[name] = self.of(str(node.module))[name]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in sys.stdlib_module_names:
            self[name] = getattr(import_module(str(node.module)), name)
        else:
            self[name] = object
        return self[name]

    def value(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "<signature>", "eval"), {}, self)

    def definition(self, name: str) -> tuple[_Source, ast.ClassDef] | None:
        """The class of that name, defined here or imported from a module of this package; None: from elsewhere."""
        node = self.nodes.get(name)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gsprune."):
            return self.of(str(node.module)).definition(name)
        return (self, node) if isinstance(node, ast.ClassDef) else None


Part = tuple[str, ast.expr | None, ast.expr | None]  # name, annotation, default


def _parts(source: _Source, name: str) -> Iterator[tuple[_Source, str, ast.expr | None, ast.expr | None]]:
    if (found := source.definition(name)) is None:
        return
    source, node = found
    made = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if made is None:
        for base in node.bases:
            yield from _parts(source, ast.unparse(base))
    for part in _parameters(made.args) if made else _fields(node):
        yield source, *part


def _setting(source: _Source, name: str, hint: ast.expr | None, default: ast.expr | None) -> Setting:
    assert hint is not None, f"{name} has no type"
    value = REQUIRED if default is None else source.value(default)
    return Setting(name, config_type(source.value(hint)), value.default if isinstance(value, Field) else value)


def _parameters(made: ast.arguments) -> Iterator[Part]:
    """Of an `__init__`, without self and without `**settings`."""
    required: list[ast.expr | None] = [None] * (len(made.args) - len(made.defaults))
    defaults = [*required, *made.defaults, *made.kw_defaults]
    parameters = zip([*made.args, *made.kwonlyargs], defaults, strict=True)
    return ((arg.arg, arg.annotation, default) for arg, default in list(parameters)[1:])


def _fields(node: ast.ClassDef) -> Iterator[Part]:
    """Of a dataclass, its own; `_: KW_ONLY` is none."""
    for part in node.body if node.decorator_list else ():
        if isinstance(part, ast.AnnAssign) and (name := ast.unparse(part.target)) != "_":
            yield name, part.annotation, part.value
