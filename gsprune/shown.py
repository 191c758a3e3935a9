"""A stranger's text before it is shown: one function for each place that shows it.

Names, errors and overrides come out of files that anybody may have written. None of them reaches a terminal, an error,
a cell of a table, a picture or MLflow but through here. Imports the standard library.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["cell", "label", "line", "markdown", "tag"]


def line(text: str, length: int = 600) -> str:
    """For a terminal, a log or an error: printable, on one line, the middle of a long text left out.

    Escape sequences, newlines and signs that turn the direction of writing are shown as codes.

    >>> print(line("a\\nb \\x1b[2J \\u202e"), line("0123456789", 5))
    a\\nb \\x1b[2J \\u202e 01 ... 89
    """
    if len(text) > length:
        text = f"{text[: length // 2]} ... {text[-(length // 2) :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


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


def markdown(text: str) -> str:
    """For a sentence or a cell of a table in Markdown, which MLflow's page renders: nothing in it is a mark.

    >>> print(markdown("<b>a|b</b> `x` [y](javascript:z)"))
    &lt;b&gt;a\\|b&lt;/b&gt; \\`x\\` \\[y\\](javascript:z)
    """
    marked = line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", marked)


def tag(text: str, length: int = 5000) -> str:
    """For the value of a tag or a parameter, or the name of a run: lines stay, what would steer a terminal is a code.

    >>> tag("a\\nb \\x1b[2J")
    'a\\nb \\\\x1b[2J'
    """
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)[:length]
