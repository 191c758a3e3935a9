"""Untrusted text made safe to show: one function for each place that shows it.

Names, errors and overrides come from files that anybody may have written. They reach a terminal, an error, a table, a
picture or MLflow only through these functions.
"""

from __future__ import annotations

import html
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

__all__ = ["cell", "code", "first_line", "html_table", "label", "logger", "one_line", "percent", "quoted", "tag"]

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter


def one_line(text: str, length: int = 600) -> str:
    """For a terminal, a log or an error: printable, on one line, a long text without its middle.

    Escape sequences, newlines and marks of writing direction become codes.

    >>> print(one_line("a\\nb \\x1b[2J \\u202e"), one_line("0123456789", 5))
    a\\nb \\x1b[2J \\u202e 01 ... 89
    """
    if len(text) > length:
        text = f"{text[: length // 2]} ... {text[-(length // 2) :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """Of an error's message; its class where it has none.

    >>> first_line(ValueError("one\\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def label(text: str, length: int) -> str:
    """For a page or a table: printable, on one line, cut at its end; unprintable characters become spaces.

    >>> label("abs,\\n0.5 \\x1b[2J", 60), label("0123456789", 5)
    ('abs, 0.5  [2J', '0123…')
    """
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def quoted(value: object, length: int = 60) -> str:
    """A value as an error quotes it: its `repr`, cut at its end.

    >>> quoted("abc"), quoted([0] * 100, 20)
    ("'abc'", '[0, 0, 0, 0, 0, 0, …')
    """
    return label(repr(value), length)


def cell(value: object, length: int = 2000) -> object:
    """For a cell of a table: numbers as they are, text so that no spreadsheet evaluates it as a formula.

    Spreadsheets skip leading spaces, and read full-width signs as the plain ones.

    >>> [cell(value) for value in (-0.5, "-0.5", "=1+1", "abs", " @x", "\\uff1d1", "|cmd", "-inf")]
    [-0.5, '-0.5', "'=1+1", 'abs', "' @x", "'\uff1d1", "'|cmd", '-inf']
    """
    if not isinstance(value, str):
        return value
    text = label(value, length)
    try:
        float(text)
    except ValueError:
        first = unicodedata.normalize("NFKC", text).lstrip(" '\"")[:1]
        return f"'{text}" if first and first in "=+-@|%" else text
    return text


def code(text: str) -> str:
    """For a command in Markdown, which MLflow's page renders: all of it is code.

    >>> print(code("python a.py"), code("a`b"))
    `python a.py` `` a`b ``
    """
    shown = one_line(text, 4000)
    fence = "`" * (1 + max((len(found) for found in re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if fence == "`" else f"{fence} {shown} {fence}"


def tag(text: str, length: int = 5000) -> str:
    """For a tag, a parameter or the name of a run: lines stay, control characters become codes.

    >>> tag("a\\nb \\x1b[2J")
    'a\\nb \\\\x1b[2J'
    """
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)[:length]


def logger(name: str) -> Adapter:
    """`logging.getLogger(name)` whose messages take texts, paths and errors through `one_line`."""
    return _Logger(logging.getLogger(name), {})


_FRAMES = 1 if sys.version_info >= (3, 11) else 3  # before 3.11 the frames of `logging` itself count


class _Logger(Adapter):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + _FRAMES  # the caller's line, not this one
            kinds = (str, BaseException, os.PathLike)
            super().log(level, msg, *(one_line(str(x), 4000) if isinstance(x, kinds) else x for x in args), **kwargs)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for notebooks, with every text escaped.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) for tag, line in lines)
    return f"<table>{''.join(f'<tr>{cell}</tr>' for cell in cells)}</table>"


def text_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Lines of a table for a terminal, the first row its head; texts stand to the left, or to the right.

    >>> text_table([["a", "bb"], ["ccc", "d"]])
    ['a    bb', 'ccc  d']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    placed = str.rjust if right else str.ljust
    return ["  ".join(map(placed, row, widths)).rstrip() for row in rows]


def percent(share: float) -> str:
    """One decimal, but "100.0 %" and "0.0 %" only for exactly that.

    >>> percent(0.5), percent(0.9999), percent(0.0001), percent(1.0)
    ('50.0 %', '>99.9 %', '<0.1 %', '100.0 %')
    """
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
