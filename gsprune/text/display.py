"""A stranger's text before it is shown: one function for each place that shows it.

Names, errors and overrides come out of files that anybody may have written. None of them reaches a terminal, an error,
a cell of a table, a picture or MLflow but through here.
"""

from __future__ import annotations

import html
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

__all__ = ["cell", "code", "first_line", "html_table", "label", "logger", "one_line", "percent", "tag"]

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter


def one_line(text: str, length: int = 600) -> str:
    """For a terminal, a log or an error: printable, on one line, the middle of a long text left out.

    Escape sequences, newlines and signs that turn the direction of writing are shown as codes.

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
    """For a page or a table: printable, on one line, cut at its end; what cannot be printed is a space.

    >>> label("abs,\\n0.5 \\x1b[2J", 60), label("0123456789", 5)
    ('abs, 0.5  [2J', '0123…')
    """
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def cell(value: object, length: int = 2000) -> object:
    """For a cell of a table that a spreadsheet opens: numbers as they are, text never as something it would calculate.

    Spreadsheets look behind spaces, and read signs of full width as the plain ones.

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
    """For a command in Markdown, which MLflow's page renders: code from its first sign to its last.

    >>> print(code("python a.py"), code("a`b"))
    `python a.py` `` a`b ``
    """
    shown = one_line(text, 4000)
    fence = "`" * (1 + max((len(found) for found in re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if fence == "`" else f"{fence} {shown} {fence}"


def tag(text: str, length: int = 5000) -> str:
    """For the value of a tag or a parameter, or the name of a run: lines stay, what would steer a terminal is a code.

    >>> tag("a\\nb \\x1b[2J")
    'a\\nb \\\\x1b[2J'
    """
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)[:length]


def logger(name: str) -> Adapter:
    """`logging.getLogger(name)`, but texts, paths and errors that are filled into a message go through `one_line`."""
    return _Logger(logging.getLogger(name), {})


class _Logger(Adapter):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the caller's line, not this one
            kinds = (str, BaseException, os.PathLike)
            super().log(level, msg, *(one_line(str(x), 4000) if isinstance(x, kinds) else x for x in args), **kwargs)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """For notebooks; every text is escaped.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) for tag, line in lines)
    return f"<table>{''.join(f'<tr>{cell}</tr>' for cell in cells)}</table>"


def percent(share: float) -> str:
    """One decimal, but never "100.0 %" or "0.0 %" for what is only nearly so."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        text = ">99.9"
    if text == "0.0" and share > 0:
        text = "<0.1"
    return f"{text} %"
