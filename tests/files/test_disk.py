"""JSON from strangers: what is not read, and how an error quotes what is in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gsprune.files import disk
from gsprune.files.disk import number, read_json, refusing
from gsprune.text.display import one_line


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_json_is_read_from_a_file_alone_and_not_from_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} does not exist$"):
        read_json(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} does not exist$"):
        read_json("a.json")  # the folder that was meant is often another one
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a file$"):
        read_json(path)
    monkeypatch.setattr(disk, "_MAX_JSON", 3)
    (tmp_path / "b.json").write_text("[12]")
    with pytest.raises(ValueError, match=r"b.json is too large: it has more than 3 bytes$"):
        read_json(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("[1]")
    assert read_json(tmp_path / "b.json") == [1]


def test_an_integer_beyond_any_float_is_no_number() -> None:
    assert number(2**70) == 2**70
    with pytest.raises(OverflowError):
        number(10**400)


def test_what_an_error_quotes_comes_out_on_one_line_and_short() -> None:
    with pytest.raises(ValueError, match=r"^no \\ud800 in a\\nb$"), refusing():
        raise ValueError("no \ud800 in a\nb")
    with pytest.raises(ValueError, match=r"^x{300} [.]{3} y{300}$"), refusing():
        raise ValueError("x" * 5000 + "y" * 5000)
    with pytest.raises(ValueError, match=r"^the file needs more memory than there is$"), refusing():
        raise MemoryError
    with pytest.raises(ValueError, match=r"^a\\nb cannot be read \(Input/output error\)$"), refusing():
        raise OSError(5, "Input/output error", "a\nb")
    kept = UnicodeError("as it is")
    with pytest.raises(UnicodeError) as error, refusing():
        raise kept
    assert error.value is kept
    assert one_line("a b", 3) == "a b"
