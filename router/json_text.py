"""JSON as bytes: lenient in what is read, because a signed body is never refused, and in what is written."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

# A surrogate pair is one character, and jsonb takes it; NUL and half of a pair it does not take. A
# backslash that is itself escaped begins no escape.
_ESCAPES = re.compile(
    r"\\\\|\\u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
)


def _replaced(match: re.Match[str]) -> str:
    escape = match.group()
    return escape if escape == "\\\\" or len(escape) == 12 else "\\ufffd"


def parse(body: bytes) -> Any:
    """The JSON value. The lenient parser takes what the fast one refuses: lone surrogates, NaN.

    Raises:
        ValueError: it is not JSON, or nested too deep.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {type(error).__name__}") from None


def encode(value: Any) -> bytes:
    """JSON bytes of a parsed value, also where a text in it has no UTF-8 form."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def storable(value: Any) -> str:
    """JSON text that jsonb takes: NUL and lone surrogates, which it has no room for, become U+FFFD."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=str)
    return _ESCAPES.sub(_replaced, text) if "\\u" in text else text


def is_storable(value: Any) -> bool:
    """Whether jsonb keeps this value as it is (and it is JSON at all)."""
    try:
        text = orjson.dumps(value)
    except TypeError:
        return False
    return b"\\u0000" not in text or all(
        match.group() == "\\\\" or len(match.group()) == 12 for match in _ESCAPES.finditer(text.decode())
    )
