"""JSON as bytes: lenient in what is read, because a signed body is never refused, and in what is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

# Levels of objects and arrays. Meta's own bodies have about a dozen; what is read must also be written
# again inside another object, and Python's recursion limit of 1,000 frames bounds the writer.
MAX_NESTING = 400

# A surrogate pair is one character, and jsonb takes it; NUL and half of a pair it does not take. A
# backslash that is itself escaped begins no escape.
_ESCAPES = re.compile(
    r"\\\\|\\u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
)


def _replaced(match: re.Match[str]) -> str:
    escape = match.group()
    return escape if escape == "\\\\" or len(escape) == 12 else "\\ufffd"


# What the fast writer has a form of its own for is left to the other one.
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_WRITER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
_ANY_WRITER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)


def parse(body: bytes) -> Any:
    """The JSON value. The lenient parser takes what the fast one refuses: lone surrogates, NaN.

    Raises:
        ValueError: it is not JSON, or nested deeper than MAX_NESTING.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {type(error).__name__}") from None
    # Each level takes two bytes at least, so that a usual body is not counted.
    if len(body) > 2 * MAX_NESTING and body.count(b"[") + body.count(b"{") > MAX_NESTING and _is_deep(value):
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return True


def encode(value: Any) -> bytes:
    """JSON bytes of a parsed value, also where a text in it has no UTF-8 form, or it is nested deeper
    than the fast writer goes (254). NaN and infinities are written as null.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return _written(_WRITER, value).encode("ascii")


def storable(value: Any) -> str:
    """JSON text that jsonb takes: NUL and lone surrogates, which it has no room for, become U+FFFD, NaN
    and infinities null.
    """
    try:
        written = orjson.dumps(value, option=_PLAIN)
        text = written.decode() if written.isascii() else _written(_ANY_WRITER, value)
    except TypeError:
        text = _written(_ANY_WRITER, value)
    return _ESCAPES.sub(_replaced, text) if "\\u" in text else text


def is_storable(value: Any) -> bool:
    """Whether jsonb keeps this value as it is (and it is JSON at all)."""
    try:
        text = orjson.dumps(value)
        _WRITER.encode(value)  # refuses NaN, and the dates and objects that orjson has a form for
    except (TypeError, ValueError):
        return False
    return b"\\u0000" not in text or all(
        match.group() == "\\\\" or len(match.group()) == 12 for match in _ESCAPES.finditer(text.decode())
    )


def _written(writer: json.JSONEncoder, value: Any) -> str:
    try:
        return writer.encode(value)
    except ValueError:
        return writer.encode(_finite(value))


def _finite(value: Any) -> Any:
    # Loops, where comprehensions would be a second frame for each level.
    if isinstance(value, Mapping):
        fields = {}
        for key, one in value.items():
            fields[key] = _finite(one)
        return fields
    if isinstance(value, list | tuple):
        listed = []
        for one in value:
            listed.append(_finite(one))
        return listed
    return None if isinstance(value, float) and not math.isfinite(value) else value
