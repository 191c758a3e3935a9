"""Keeps secrets out of files, records, logs and errors: passwords, and values that only the environment holds.

`redacted` puts `***` in the place of what looks like a secret in a text (userinfo and queries of addresses,
`name=value` and `"name": "value"` with a secret's name) and of the values that `settings.recorded.hide` remembers;
`redacted_data` does so in nested data. `write_json`, the tracker, log records and the terminal of `train.py` use them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import quote, unquote

from gsprune.text.display import label, tag
from gsprune.text.nested import mapped

__all__ = [
    "RedactedStream",
    "is_secret",
    "last_line",
    "redact_logs",
    "redacted",
    "redacted_data",
    "redacted_message",
    "redacted_texts",
]

MASK = "***"


# --- names -------------------------------------------------------------------------------------------------

_ENDS = (
    *("password", "passwd", "passphrase", "passwort", "secret", "token", "credential", "passwords", "secrets"),
    *("apikey", "accesskey", "privatekey", "secretkey"),
)
_WORDS = {"pwd", "pass", "pw", "key", "credentials", "creds", "auth", "authorization", "bearer", "cookie", "jwt", "otp"}
_OPENS = {
    *("api", "access", "secret", "private", "auth", "account", "admin", "encryption", "signing", "ssh", "license"),
    *("hf", "hub", "bearer", "refresh", "session"),
}
_SIGNS = {"sig", "signature", "code"}  # give access in the query of an address
# Words before `token` and `key` in names of no secret: special tokens of a tokenizer, counts, keys of data.
_TOKENS = {
    *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "class", "image", "start", "end", "max", "min", "num", "n"),
    *("dist", "distillation", "prompt", "special", "register", "sos", "blank", "patch", "per", "first", "last"),
}
_KEYS = {
    *("sort", "text", "label", "image", "input", "output", "target", "primary", "foreign", "group", "data", "metric"),
    "share",  # MLflow's viewStateShareKey
}


def is_secret(name: str) -> bool:
    """Whether a value with this name (of a dotted one the last part) is a secret.

    >>> [is_secret(name) for name in ("model.hf_token", "apiKeys", "DB_PASSWORD", "+extra.secret", "key")]
    [True, True, True, True, True]
    >>> [is_secret(name) for name in ("max_tokens", "pad_token", "viewStateShareKey", "forward_pass", "seed")]
    [False, False, False, False, False]
    """
    words = _words(name)
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "token":
        return before not in _TOKENS
    if last == "key":
        return before not in _KEYS
    if last in ("keys", "tokens"):  # others are counts and vocabularies
        return before in _OPENS
    if last == "pass":
        return before not in ("forward", "backward", "single", "first", "second", "by")
    return last.endswith(_ENDS) or last in _WORDS


def is_certain(name: str, value: object = "") -> bool:
    """Whether a secret's name is beyond doubt, so that its value only gives access and changes no result.

    A `key` may be that of a table, a `pass` or a number of a `token` one of many.
    """
    words = _words(name)
    doubtful = words[-1] in ("key", "pass") or (words[-1] == "token" and not isinstance(value, str))
    return not doubtful or (len(words) > 1 and words[-2] in _OPENS)


def _words(name: str) -> list[str]:
    last = re.split(r"[.\[\]@/:]", name.strip().rstrip("]"))[-1]
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", last)
    return [word.lower() for word in found]


# --- texts -------------------------------------------------------------------------------------------------

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,30})://((?:(?!\w://)[^\n])+)")
_PORT = re.compile(r"[^\s/?#@:]*:\d{1,5}(?:[/?#\s'\",;)\]}]|$)")
_HOST = re.compile(r"(?:localhost|\[[0-9a-fA-F:.]+\]|[\w\-]*\.[\w.\-]+)(?::\d+)?/|[\w.\-]+:\d{1,5}/")
_CONTAINERS = ("wasb", "wasbs", "abfs", "abfss")  # container@account: no user
_IN_QUOTES = r"""(?P<quote>["'])(?P<value>(?:(?!(?P=quote))[^\\]|\\.)*)(?P=quote)"""
_VALUE = r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|"""  # in quotes, or what follows
# A name and its value, as overrides and addresses, as dicts of Python and JSON, as flows and lines of YAML have them.
_PAIR = re.compile(
    r"(?<![\w.\-/@])(?P<name>[+~]*[\w.\-/@]*\w)="
    + _VALUE
    + r"""\$\{(?:[^{}]|\{[^{}]*\})*\}|(?:[^\s&#,;'"()\[\]{}]|,(?=\S)(?![\w.+/@\-]*=))+)"""
)
_QUOTED = re.compile(r"""(['"])(?P<name>[\w.\-]*\w)\1\s*:\s*""" + _IN_QUOTES)
_FLOW = re.compile(r"[{,]\s*(?P<name>[\w.\-]*\w)\s*:\s*" + _VALUE + r"""[^\s,{}\[\]"']+)""")
_GROUP = re.compile(r"""(['"]?)(?<![\w.\-/@])([+~]*[\w.\-/@]*\w)\1\s*[:=]\s*(?=[\[{(])""")
_QUERY = re.compile(r"[?&;](?P<name>[\w.\-]*\w)=(?P<value>[^\s&#;,'\"(){}]+)")
_LINE = re.compile(r"(?m)^[ \t]*(?:- )?(?P<name>[\w.\-]*\w)[ \t]*[:=][ \t]+(?P<value>\S.*)$")
_SPOKEN = re.compile(r"(?i)\b([\w.\-]{0,40}(?:password|passwd|passphrase|passwort)[ \t]*[:=][ \t]+)([^\s'\"{\[($*]\S*)")
_HEADER = re.compile(r"(?i)((?:authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)|\bbearer)\s+)[\w.\-+/=~]{4,}")
_DEFAULT = re.compile(r"\$\{\s*oc\.env\s*:[^,{}]*,\s*(?!(?:null|None|''|\"\")\s*\})[^\s${}]")  # a default value
_INTERPOLATION = re.compile(r"\$\{(?:[^{}]|\{[^{}]*\})*\}")
_ISSUED = re.compile(  # tokens with the mark of their issuer
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-)(?=[\w\-]{0,80}\d)[A-Za-z0-9_\-]{16,}"
)
_SPAN = 300  # characters of a password with spaces in it


def redacted(text: str) -> str:
    """The text without its secrets. Redacting it again changes nothing.

    >>> redacted("http://ann:secret@host:5000"), redacted("https://host/x?a=1&Token=abc")
    ('http://***@host:5000', 'https://host/x?a=1&Token=***')
    >>> redacted("http://ann:p@ss/w@rd's@host:5000/x"), redacted("+db.password='a b' seed=1")
    ('http://***@host:5000/x', '+db.password=*** seed=1')
    >>> redacted("sqlite:////home/me@work/m.db"), redacted("token=${oc.env:MY_TOKEN}")
    ('sqlite:////home/me@work/m.db', 'token=${oc.env:MY_TOKEN}')
    """
    text = by_shape(text)
    return hidden.sub(text) if hidden.pattern else text


def redacted_message(text: str) -> str:
    """`redacted` for people: values from the environment are replaced by the names of their variables."""
    text = redacted(text)
    return mentioned.sub(text) if mentioned.pattern else text


def last_line(error: BaseException) -> str:
    """The type of an error and the last line of its text, without passwords.

    >>> last_line(RuntimeError("a long story\\nits end")), last_line(KeyboardInterrupt())
    ('RuntimeError: its end', 'KeyboardInterrupt')
    """
    lines = redacted_message(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def by_shape(text: str) -> str:
    """The text without what looks like a secret, whatever its value."""
    if "://" in text:
        text = _ADDRESS.sub(lambda m: f"{m[1]}://{_without_userinfo(m[1], m[2])}", text)
    if "=" in text or ":" in text:
        text = _without_groups(text)
    if "=" in text:
        text = _QUERY.sub(_redacted_sign, _PAIR.sub(_redacted_value, text))
    if ":" in text:
        text = _FLOW.sub(_redacted_value, _QUOTED.sub(_redacted_value, text))
    text = _HEADER.sub(rf"\g<1>{MASK}", text)
    if ": " in text or "= " in text:
        text = _SPOKEN.sub(rf"\g<1>{MASK}", _LINE.sub(_redacted_line, text))
    return _ISSUED.sub(MASK, text)


def _without_groups(text: str) -> str:
    """The text without bracketed lists and mappings that have a secret's name."""
    parts, done = [], 0
    for found in _GROUP.finditer(text):
        if found.start() < done or not is_secret(found[2]):
            continue
        end = _end_of_group(text, found.end())
        if not is_open(text[found.end() : end]):
            parts += [text[done : found.end()], MASK]
            done = end
    return "".join([*parts, text[done:]])


def _end_of_group(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[\[\](){}]").finditer(text, start):
        depth += 1 if found[0] in "[({" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _without_userinfo(scheme: str, rest: str) -> str:
    end = _end_of_userinfo(scheme, rest)
    if end is None or re.fullmatch(r"[^:@\s]*:?\$\{[^}]*\}", rest[:end]):  # nothing, or what the environment has
        return rest
    return f"{MASK}@{rest[end + 1 :]}"


def _end_of_userinfo(scheme: str, rest: str) -> int | None:
    """The position of the `@` before the host, in the text after `://`; None without one.

    It is the last `@` before the path. As passwords may hold characters that end an authority, the search continues if
    no host follows it, or no port follows the colon.
    """
    word = re.match(r"\S*", rest)[0]  # type: ignore[index]
    authority = re.match(r"[^/?#]*", word)[0]  # type: ignore[index]
    last, at = word.rfind("@"), authority.rfind("@")
    if at < 0:
        if ":" not in authority or _PORT.match(rest):
            return None
        return last if last >= 0 else (found if (found := rest.rfind("@", 0, _SPAN)) >= 0 else None)
    if ":" not in authority[:at]:
        return None if scheme.lower() in _CONTAINERS else at
    return at if last == at or authority.startswith(f"{MASK}@") or _HOST.match(word[at + 1 :]) else last


def is_open(value: str) -> bool:
    """Whether the value is empty or only names its source (`${oc.env:NAME}`)."""
    bare = value.strip("'\"")
    if _DEFAULT.search(bare):
        return False
    own = _INTERPOLATION.sub("", bare)  # without its interpolations
    return not re.search(r"\w", own) or own.lower() in ("null", "none", "true", "false")


def _redacted_match(found: re.Match[str]) -> str:
    """The match without its value."""
    start, end = (place - found.start() for place in found.span("value"))
    return f"{found[0][:start]}{MASK}{found[0][end:]}"


def _redacted_sign(found: re.Match[str]) -> str:
    words = _words(found["name"])
    return _redacted_match(found) if words and words[-1] in _SIGNS else found[0]


def _redacted_value(found: re.Match[str]) -> str:
    return _redacted_match(found) if is_secret(found["name"]) and not is_open(found["value"]) else found[0]


def _redacted_line(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    return _redacted_value(found) if is_secret(name) and is_certain(name) and not value.endswith(MASK) else found[0]


class _Values:
    """Values to replace wherever they are a word of their own, plain or encoded."""

    def __init__(self) -> None:
        self._by: dict[str, str] = {}
        self.pattern: re.Pattern[str] | None = None

    def add(self, value: str, by: str, *, least: int) -> None:
        if len(value) < least or MASK in value:
            return
        forms = {value, quote(value, safe=""), unquote(value), repr(value)[1:-1], json.dumps(value)[1:-1]}
        new = {form: by for form in forms if len(form) >= least and form not in self._by}
        if new:
            self._by |= new
            longest_first = sorted(self._by, key=len, reverse=True)
            self.pattern = re.compile("|".join(map(_as_a_word, longest_first)))

    def sub(self, text: str) -> str:
        assert self.pattern is not None
        return self.pattern.sub(lambda found: self._by[found[0]], text)


def _as_a_word(value: str) -> str:
    before, after = (r"(?<!\w)" if value[0].isalnum() else ""), (r"(?!\w)" if value[-1].isalnum() else "")
    return f"{before}{re.escape(value)}{after}"


hidden, mentioned = _Values(), _Values()


# --- nested data -------------------------------------------------------------------------------------------


def redacted_data(data: Any) -> Any:
    """Nested data without their secrets; texts in lists may be overrides.

    >>> redacted_data({"hub": {"token": "abc", "name": "bert"}, "overrides": ["+hub.token='a, b'", "seed=0"]})
    {'hub': {'token': '***', 'name': 'bert'}, 'overrides': ['+hub.token=***', 'seed=0']}
    """
    if isinstance(data, Mapping):
        return {k: _redacted_leaves(value) if is_secret(str(k)) else redacted_data(value) for k, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_override(item) if isinstance(item, str) else redacted_data(item) for item in data]
    return redacted(data) if isinstance(data, str) else data


def redacted_texts(data: Any) -> Any:
    """Nested data with `redacted` texts, for data of our own, in which no key is a secret's name."""
    return mapped(data, lambda leaf, _: redacted(leaf) if isinstance(leaf, str) else leaf)


def _redacted_leaves(data: Any) -> Any:
    def replaced(leaf: Any, _: object) -> Any:
        if isinstance(leaf, str) and is_open(leaf):
            return redacted(leaf)
        return leaf if leaf is None or isinstance(leaf, bool) else MASK

    return mapped(data, replaced)


def _override(text: str) -> str:
    found = re.fullmatch(r"([+~]*[\w./@\-:\[\]]+)=(.*)", text, re.DOTALL)
    if found and is_secret(found[1]) and not is_open(found[2]):
        return f"{found[1]}={MASK}"
    return redacted(text)


def password_of(text: str) -> str:
    """The password in an address, or a user without a password; empty without both."""
    found = _ADDRESS.search(text)
    end = _end_of_userinfo(found[1], found[2]) if found else None
    if found is None or end is None:
        return ""
    user, colon, password = found[2][:end].partition(":")
    return password if colon else user


def gives_access(text: str) -> bool:
    """Whether the text is an address that holds a secret (or, of a web server, a user)."""
    found = _ADDRESS.search(text)
    if found is None or by_shape(text) == text:
        return False
    end = _end_of_userinfo(found[1], found[2])
    userinfo, rest = ("", found[2]) if end is None else (found[2][:end], found[2][end:])
    named = userinfo not in ("", MASK) and (":" in userinfo or found[1].lower() in ("http", "https"))
    return named or by_shape(rest) != rest


# --- logs and terminals ------------------------------------------------------------------------------------


def redact_logs() -> None:
    """From now on redact every log record of this process, for all handlers."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        return _redacted_record(make(*args, **kwargs))

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)


def _redacted_record(record: logging.LogRecord) -> logging.LogRecord:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # wrong arguments, which logging reports itself
        return record
    if (shown := redacted_message(text)) != text:
        record.msg, record.args = shown, None
    if record.exc_info and record.exc_info[0] is not None:
        full = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        shown = tag(redacted_message(full), length=max(len(full), 100_000))  # it may quote an untrusted file
        if shown != full:
            record.exc_info, record.exc_text = None, shown
    return record


# Control characters of terminals, but for those of a progress bar: colours, moving and erasing within its lines.
_STEERS = re.compile(
    "\x1b(?!\\[[\\d;?]*[A-DKhlm])|[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


class RedactedStream:
    """A terminal's stream that replaces secrets and control characters in everything written to it, tracebacks too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_STEERS.sub(lambda found: repr(found[0])[1:-1], redacted_message(text)))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str, file: Any = None) -> None:
    """Print a line that may hold untrusted text."""
    stream = file or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(shown_text(text, 1000).encode(encoding, "replace").decode(encoding), file=stream)


def shown_text(text: str, length: int) -> str:
    """An untrusted text on one line, printable, at most `length` characters long, without its secrets.

    >>> shown_text("tracking.tracking_uri=http://ann:secret@host:5000\\n", 60)
    'tracking.tracking_uri=http://***@host:5000 '
    """
    return label(redacted(text[: length + 1000]), length)
