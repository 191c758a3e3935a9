"""Build the docs as a site: `python docs/build_site.py site` (extra `docs`); a warning is an error.

The pages are the Markdown files of docs/ and those in BESIDE, read by Sphinx with MyST, in the order of NAVIGATION. The
reference is made of docstrings, schemas and the comments of conf/: in docs/reference/, a list item that is one name is
replaced by what that name says:

    - `gsprune.cut`                   the signature and docstring of a class or function
    - `conf/trainer/default.yaml`     keys, defaults and comments of a file
    - `schema gsprune_pruner`         keys and defaults of a schema, with what the docstrings of its classes say
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BESIDE = {  # in the repository -> on the site
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/faults.md": "benchmarks/faults.md",
}
NAVIGATION = {
    "Start": "getting_started examples concepts coming_from",
    "Prune": "trained_networks train_and_prune partners networks choosing deploy faq",
    "The application": "application command sweeps cut_jobs mlflow long_runs",
    "Reference": "reference/library reference/settings",
    "The project": "benchmarks/README benchmarks/faults CHANGELOG CONTRIBUTING",
}
SETTINGS = {
    "project": "gsprune",
    "html_title": "gsprune",
    "html_theme": "furo",
    "extensions": ["myst_parser"],
    "myst_heading_anchors": 4,
    "html_copy_source": False,
    "html_show_sphinx": False,
    "smartquotes": False,
    "html_show_copyright": False,
}
SECTIONS = {"Args", "Attributes", "Example", "Examples", "Raises", "Returns", "Source", "Yields"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the docs as a site; a warning is an error.")
    parser.add_argument("output", type=Path, help="folder of the site")
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        write_pages(source)
        try:
            app = Sphinx(
                source, None, output, Path(folder, "doctrees"), "html", SETTINGS, status=None, warningiserror=True
            )
            app.build()
        except SphinxError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{output / 'index.html'}: {len(list(output.rglob('*.html')))} pages")
    return int(app.statuscode)


def write_pages(folder: Path) -> None:
    """The Markdown that Sphinx reads: pages of the repository, where the site has them."""
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    pages = {
        f"docs/{page}": str(page)
        for page in sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    }
    for source, uri in {**pages, **BESIDE}.items():
        text = (ROOT / source).read_text(encoding="utf8")
        if uri.startswith("reference/"):
            text = re.sub(r"^- `([^`\n]+)`\n", lambda found: entry(found[1]), text, flags=re.MULTILINE)
        (folder / uri).parent.mkdir(parents=True, exist_ok=True)
        (folder / uri).write_text(
            turned(text, source, uri) + (_navigation() if uri == "index.md" else ""), encoding="utf8"
        )


def turned(text: str, source: str, uri: str) -> str:
    """The links of the file `source` of the repository, as they are on the page `uri` of the site."""

    def turn(found: re.Match[str]) -> str:
        target, mark, anchor = found[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = BESIDE.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(path, posixpath.dirname(uri) or '.')}{mark}{anchor})"

    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", turn, text)


def _navigation() -> str:
    parts = []
    for caption, pages in NAVIGATION.items():
        parts += ["", "```{toctree}", ":hidden:", f":caption: {caption}", *pages.split(), "```"]
    return "\n".join(parts) + "\n"


# ---- entries


def entry(name: str) -> str:
    """The Markdown that stands in the place of that name.

    Raises:
        AttributeError, KeyError, OSError: there is no such name, schema or file.
    """
    if name.startswith("schema "):
        return _schema(name.removeprefix("schema "))
    return _file(name) if name.endswith(".yaml") else _object(name)


def _object(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    parts = [f"### `{name}`", "", *_signature(found, attribute), *markdown_of(inspect.getdoc(found) or "")]
    if inspect.isclass(found):
        for method, function in vars(found).items():
            inner = function.__func__ if isinstance(function, classmethod | staticmethod) else function
            if not method.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
                parts += [
                    "",
                    f"**`{method}`**",
                    "",
                    *_signature(inner, method),
                    *markdown_of(inspect.getdoc(inner) or ""),
                ]
    return "\n".join(parts) + "\n"


def _signature(found: Any, name: str) -> list[str]:
    try:
        parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "cls")]
    except (TypeError, ValueError):
        return []
    rows, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            rows.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = str(parameter.replace(annotation=parameter.empty))
        rows.append(re.sub(r"<factory>|<object object at [^>]*>|<function (\w+)[^>]*>", r"\1", text))
    text = f"{name}({', '.join(rows)})"
    if len(text) > 90:
        text = f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + ")"
    return ["```python", text, "```", ""]


def _file(name: str) -> str:
    """Keys of a YAML file, with their defaults and comments; nested keys have dots."""
    lines = (ROOT / name).read_text(encoding="utf8").splitlines()
    about = " ".join(line[1:].strip() for line in lines[: _until(lines)] if "@" not in line)
    rows, above = [], list[tuple[int, str]]()
    for line in lines:
        found = re.match(r"^( *)([\w/.]+):(?: +(.*?))?(?: +# (.*))?$", line)
        if not found:
            continue
        above = [part for part in above if part[0] < len(found[1])]
        key = ".".join([*(part[1] for part in above), found[2]])
        above.append((len(found[1]), found[2]))
        hidden = above[0][1] in ("defaults", "hydra") or found[2].startswith("_")
        if found[3] and not found[3].startswith("#") and not hidden:
            rows.append((key, found[3], found[4] or ""))
    head = [f"### `{name}`", "", about.replace("<", "&lt;"), ""]
    return "\n".join([*head, *_table(("Key", "Default", "Means"), rows)]) + "\n"


def _schema(name: str) -> str:
    """Keys of a schema; what they mean is in the docstrings of the classes that it was made of."""
    from gsprune.conf.schemas import SCHEMAS

    made = SCHEMAS[name]
    target = made().__dict__.get("_target_", "")  # "???": the option of the group names the class
    classes = {"gsprune.Pruner": ["gsprune.Pruner", "gsprune.Rule"]}.get(target, [target] if "." in target else [])
    classes = classes or {
        "gsprune_gate": ["gsprune.criteria.Weighted"],
        "gsprune_ramp": ["gsprune.schedules.Ramp"],
    }.get(name, [])
    meaning: dict[str, str] = {}
    for dotted in classes:
        module, _, attribute = dotted.rpartition(".")
        for part in inspect.getmro(getattr(importlib.import_module(module), attribute))[:-1]:
            meaning = {**dict(arguments(inspect.cleandoc(part.__doc__ or ""))), **meaning}
    rows = []
    for field in dataclasses.fields(made):
        if not field.name.startswith("_"):
            made_default = field.default_factory() if callable(field.default_factory) else field.default
            default = (
                "null"
                if dataclasses.is_dataclass(made_default)
                else "null"
                if made_default is None
                else f"{made_default}"
            )
            rows.append((field.name, default, meaning.get(field.name, "")))
    return "\n".join(_table(("Key", "Default", "Means"), rows)) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [
        [f"`{key}`", f"`{default}`".replace("|", "\\|"), text.replace("|", "\\|").replace("<", "&lt;")]
        for key, default, text in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (list(heads), ["---"] * len(heads), *cells)] + [""]


# ---- docstrings


def markdown_of(text: str) -> Iterator[str]:
    """A docstring as Markdown: sections, lists of names, doctests and indented blocks.

    >>> list(markdown_of("Cut it.\\n\\nArgs:\\n    model: stays\\n        as it is.\\n\\n>>> 1 + 1\\n2"))
    ['Cut it.', '', '**Args**', '', '- `model`: stays as it is.', '', '```pycon', '>>> 1 + 1', '2', '```', '']
    """
    for block in re.split(r"\n{2,}", text.strip("\n")):
        lines = block.split("\n")
        head = re.fullmatch(r"(\w+):(?: (.*))?", lines[0])
        if head and head[1] in SECTIONS and head[2]:
            yield from (f"**{head[1]}**: {head[2]}", *lines[1:], "")
            continue
        if head and head[1] in SECTIONS:
            yield from (f"**{head[1]}**", "")
            lines = inspect.cleandoc("\n" + "\n".join(lines[1:])).split("\n") if lines[1:] else []
            if head[1] in ("Args", "Attributes", "Raises"):
                yield from (*(f"- `{name}`: {about}" if name else f"- {about}" for name, about in _items(lines)), "")
                continue
        if lines:
            yield from _block(lines)


def _block(lines: list[str]) -> Iterator[str]:
    plain = inspect.cleandoc("\n" + "\n".join(lines)).split("\n")
    columns = [re.fullmatch(r"([\w, ()]+?) {2,}(\S.*)", line) for line in plain]
    if plain[0].startswith(">>>"):
        yield from ("```pycon", *plain, "```", "")
    elif columns[0] and not lines[0].startswith(" "):
        yield from (*(f"- `{name}`: {about}" for name, about in _columns(plain)), "")
    elif lines[0].startswith("    "):
        yield from ("```text", *plain, "```", "")
    else:
        yield from (*lines, "")


def _items(lines: list[str]) -> list[tuple[str, str]]:
    """`name, name: text`, continued on lines that are indented further."""
    found: list[tuple[str, str]] = []
    for line in lines:
        start = re.match(r"(\*{0,2}\w+(?:, *\*{0,2}\w+)*): (.*)", line)
        if start:
            found.append((start[1], start[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            found.append(("", line.strip()))
    return found


def _columns(lines: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in lines:
        start = re.fullmatch(r"([\w, ()]+?) {2,}(\S.*)", line)
        if start and not line.startswith(" "):
            found.append((start[1], start[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def arguments(text: str) -> Iterator[tuple[str, str]]:
    """What a docstring says of each argument; of several in one line, the same of each."""
    found = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    for names, about in _items(inspect.cleandoc("\n" + found[1]).split("\n")) if found else []:
        for name in re.split(r", *", names):
            yield name, about


def _until(lines: list[str]) -> int:
    """How many lines at the start are comments."""
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


if __name__ == "__main__":
    sys.exit(main())
