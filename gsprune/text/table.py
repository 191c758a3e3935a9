"""Tables, numbers and durations as plain text, for terminals, logs and the `repr` of what is not a single number."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

__all__ = ["WIDTH", "clock", "count", "labelled", "noun", "size", "table", "terminal_width", "until"]

WIDTH = 80  # columns, where no terminal says how many it has
LEAST = 12  # columns of the first column, however narrow the terminal


def terminal_width() -> int:
    """Columns of the terminal; 80 of a file or a pipe, unless the environment has COLUMNS."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> list[str]:
    """Lines of a table: the first column on the left, folded where the width asks for it, the others on the right.

    Args:
        rows: cells of each row; an empty row is a rule across the table.
        width: columns at most, as far as the other columns allow; None: as wide as the cells.

    >>> print("\\n".join(table(["layer", "MACs"], [["conv1", "1.5M"], [], ["all of them", "2M"]])))
    layer        MACs
    -----------------
    conv1        1.5M
    -----------------
    all of them    2M
    """
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [head, *filter(None, rows)]) for i in range(len(head))]
    if width is not None:
        others = sum(widths[1:]) + 2 * (len(widths) - 1)
        widths[0] = max(min(widths[0], width - others), min(widths[0], LEAST))
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = []
    for row in [head, [], *rows]:
        if not row:
            lines.append(rule)
            continue
        first, *folded = _folded(row[0], widths[0])
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines += ["  ".join(cells).rstrip(), *(f"  {text}" for text in folded)]
    return lines


def _folded(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    rest, step = text[width:], max(width - 2, 1)
    return [text[:width], *(rest[i : i + step] for i in range(0, len(rest), step))]


def labelled(pairs: Iterable[tuple[str, str]], *, width: int | None = None) -> list[str]:
    """Lines of "name   text", with the texts folded between words and below each other; "" repeats no name.

    >>> print("\\n".join(labelled([("device", "cpu"), ("data", "1,257 training samples")], width=22)))
    device  cpu
    data    1,257 training
            samples
    """
    import textwrap

    pairs = list(pairs)
    indent = max((len(name) for name, _ in pairs), default=0) + 2
    room = None if width is None else max(width - indent, 20)
    lines = []
    for name, text in pairs:
        parts = [text] if room is None else textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        lines += [f"{(name if i == 0 else '').ljust(indent)}{part}".rstrip() for i, part in enumerate(parts)]
    return lines


def noun(number: int, one: str, many: str = "") -> str:
    """
    >>> noun(1, "job"), noun(2, "job"), noun(1234, "class", "classes")
    ('1 job', '2 jobs', '1,234 classes')
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def count(number: int | None, *, digits: int = 3) -> str:
    """A count in few digits; "?" for None.

    >>> [count(n) for n in (None, 9999, 23_508_032, 999_950, 4_089_000_000)]
    ['?', '9,999', '23.5M', '1.00M', '4.09G']
    >>> [count(n, digits=2) for n in (384, 9999, 9408, 23_508_032, 117_964_800)]
    ['384', '10k', '9.4k', '24M', '118M']
    """
    if number is None:
        return "?"
    if number < 10 ** (digits + 1) and (digits > 2 or number < 1000):
        return f"{number:,}"
    power, value = 0, float(f"{number:.{digits - 1}e}")  # rounded first: 999,950 is 1.00M
    while value >= 1000 and power < 4:
        power, value = power + 1, value / 1000
    exact = number / 1000**power
    return f"{exact:.{max(0, digits - len(str(int(value))))}f}{'kMGT'[power - 1]}"


def size(number: float) -> str:
    """Bytes, as they are read.

    >>> size(812), size(378072), size(40_000_000), size(2.5e9)
    ('812 bytes', '378 kB', '40.0 MB', '2.50 GB')
    """
    if number < 1000:
        return f"{number:.0f} bytes"
    for unit, one, form in (("kB", 1e3, ".0f"), ("MB", 1e6, ".1f")):
        if number < 999.5 * one:
            return f"{number / one:{form}} {unit}"
    return f"{number / 1e9:.2f} GB"


def clock(seconds: float) -> str:
    """A duration as it is read.

    >>> clock(5.2), clock(125), clock(3 * 3600 + 130), clock(50 * 3600)
    ('6 s', '2:05 min', '3 h 02 min', '2 d 02 h')
    """
    whole = int(seconds) + (seconds % 1 > 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = whole // 60
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def until(left: float, *, now: datetime | None = None) -> str:
    """How long something still takes, and when it will have ended.

    >>> until(600.0, now=datetime(2026, 5, 4, 13, 55)), until(86400.0, now=datetime(2026, 5, 4, 13, 55))
    ('10:00 min left, until about 14:05', '24 h 00 min left, until about 2026-05-05 13:55')
    """
    now = datetime.now() if now is None else now
    end = now + timedelta(seconds=left)
    return f"{clock(left)} left, until about {end:{'%H:%M' if end.date() == now.date() else '%Y-%m-%d %H:%M'}}"
