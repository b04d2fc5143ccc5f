"""What a log line may not show, and how it is replaced: pure functions over the fields of one event.

Phone numbers, names, texts, signatures and secrets go; our own ids, times, sizes and counts stay readable.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

MASKED: Final = "[masked]"


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


_MAX_DEPTH: Final = 8
_SHORTEST_PHONE: Final = 1_000_000  # seven digits: the shortest subscriber number that is dialled as one

_PERSONAL: Final = _words(
    "name names profile profiles contact contacts body bodies text texts payload payloads caption answer "
    "reply replies message messages first_name last_name full_name formatted_name profile_name "
    "contact_name display_name sender_name verified_name user_name username email emails wa_id sender "
    "recipient recipient_id phone phones phone_number display_phone_number msisdn dsn"
)
_COUNTED: Final = _words("bodies contacts messages names profiles replies texts")
_PERSONAL_ENDINGS: Final = _words("body text payload caption")
_SECRET_PARTS: Final = _words(
    "secret secrets token tokens password passwords passwd authorization cookie signature signatures"
)
_NUMERIC_ENDINGS: Final = _words(
    "port ports seq pid tid fd count counts total size rows bytes ns us ms seconds hours epoch generation "
    "offset limit capacity attempt attempts version line shard timestamp time received delivered "
    "duplicates events"
)
_TIME_ENDINGS: Final = _words("at time timestamp date day since until")
_ID_KEYS: Final = _words("correlation_id request_id trace_id span_id parent_id flush_id run_id")

_HEX_ID = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}", re.ASCII)
_ISO_TIME = re.compile(
    r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
    r"(?:[T ][0-2]\d:[0-5]\d(?::[0-6]\d(?:\.\d{1,9})?)?(?:Z|[+-][01]\d:?[0-5]\d)?)?",
    re.ASCII,
)

# Everything that is recognised inside a string, tried in this order at each place. Our ids come first, so
# that the digits in them are not taken for a number.
_PATTERN = re.compile(
    r"""
    (?P<ours>(?<![0-9A-Za-z])(?:
        msg_[0-9a-f]{32}(?:_r[0-9]{1,6})?
      | [0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}
      | [0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}
      | (?=[0-9]*[a-f])[0-9a-f]{32}
    )(?![0-9A-Za-z]))
  | (?P<wamid>wamid\.[\w+/=%.\\-]+|(?<![A-Za-z0-9+/])HBg[A-Za-z0-9+/=\\]{13,})
  | (?P<whsec>whsec_[\w+/=-]+)
  | (?P<digest>sha256=)[0-9A-Za-z]+
  | (?P<scheme>\b(?:[Bb]earer|BEARER|[Bb]asic|BASIC)[ \t]+)[^\s"',;]+
  | (?P<login>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s:/@"']{0,128}:)[^\s"']{0,512}(?=@)
  | (?P<assigned>\b(?:[\w.]{0,40}(?:[Tt]oken|TOKEN|[Ss]ecret|SECRET)|[Pp]assword|PASSWORD|[Ss]ignature)=)
        [^\s&"']+
  | (?P<field>\\{0,3}["']
        (?:name|first_name|last_name|formatted_name|body|text|caption|profile|payload|title|token|secret)
        \\{0,3}["']\s*:\s*)(?:\\+"[^"]*"?|"(?:[^"\\]|\\.)*(?:"|\\?\Z)|'(?:[^'\\]|\\.)*(?:'|\\?\Z))
  | (?P<ip>(?<![\w.+-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)
        (?::\d{1,5})?(?![\w.-]))
  | (?P<phone>\+?\d(?:[ \t\xa0\u202f\-\xad\u2010-\u2015\u2212()./\u200b-\u200f\u202a-\u202e\u2060-\u2069]{0,3}
        \d){6,})
    """,
    re.VERBOSE | re.DOTALL,
)


def mask(event: Mapping[str, Any]) -> dict[str, Any]:
    """`event` with everything personal or secret replaced, at every depth; the given mapping is not changed.

    Values come back as what a log line can hold: str, int, float, bool, None, lists and dicts of these. An
    object of an unknown type becomes its type's name, because its repr may show anything.
    """
    return _mask_mapping(event, 0)


def mask_text(text: str) -> str:
    """`text` without phone numbers, wamids, credentials and quoted personal fields. Idempotent."""
    return _PATTERN.sub(_replacement, text)


def format_exception(error: BaseException) -> str:
    """The masked traceback of `error`, its causes and groups included."""
    return mask_text("".join(traceback.format_exception(error)).rstrip("\n"))


def _replacement(match: re.Match[str]) -> str:
    kind, found = match.lastgroup, match.group()
    if kind in ("ours", "ip"):
        return found
    if kind == "phone":
        return f"***{found[-2:]}" if found[-2:].isdigit() else f"***{found[-1]}"
    if kind == "wamid":
        return "wamid.***"
    if kind == "whsec":
        return "whsec_***"
    return f"{match.group(str(kind))}{MASKED}"


def _mask_mapping(values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    masked: dict[str, Any] = {}
    for key, value in values.items():
        name = key if isinstance(key, str) else str(_mask_value("", key, depth + 1))
        shown = mask_text(name)
        while shown in masked:
            shown += "'"
        masked[shown] = _mask_value(_normal(name), value, depth + 1)
    return masked


def _normal(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(".", "_")


def _mask_value(key: str, value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _is_hidden(key):
        small = isinstance(value, int) and abs(value) < _SHORTEST_PHONE
        return value if small and key in _COUNTED else MASKED
    if depth > _MAX_DEPTH:
        return "[...]"
    if isinstance(value, Enum):
        return _mask_value(key, value.value, depth + 1)
    if isinstance(value, str):
        return _mask_string(key, value)
    if isinstance(value, (int, float)):
        return _mask_number(key, value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return mask_text(bytes(value).decode("utf-8", "backslashreplace"))
    if isinstance(value, Mapping):
        return _mask_mapping(value, depth)
    if isinstance(value, BaseException):
        return mask_text("".join(traceback.format_exception_only(value)).strip())
    if is_dataclass(value) and not isinstance(value, type):
        return _mask_mapping({f.name: getattr(value, f.name) for f in fields(value) if f.repr}, depth)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _mask_mapping(dict(zip(value._fields, value, strict=True)), depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_mask_value(key, item, depth + 1) for item in value]
    return _mask_other(value)


def _mask_other(value: object) -> str:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (UUID, timedelta, IPv4Address, IPv6Address)):
        return str(value)
    if isinstance(value, (PurePath, Decimal)):
        return mask_text(str(value))
    return f"<{type(value).__name__}>"


def _mask_string(key: str, text: str) -> str:
    if key.rpartition("_")[2] in _TIME_ENDINGS and _ISO_TIME.fullmatch(text):
        return text
    if key in _ID_KEYS and _HEX_ID.fullmatch(text):
        return text
    return mask_text(text)


def _mask_number(key: str, number: int | float) -> int | float | str:
    if key.rpartition("_")[2] in _NUMERIC_ENDINGS and abs(number) < 10**18:
        return number
    if abs(number) < _SHORTEST_PHONE:
        return number
    return f"***{int(abs(number)) % 100:02}" if abs(number) < 10**300 else MASKED


def _is_hidden(key: str) -> bool:
    parts = key.split("_")
    if parts[-1] in _NUMERIC_ENDINGS:
        return False
    return key in _PERSONAL or parts[-1] in _PERSONAL_ENDINGS or not _SECRET_PARTS.isdisjoint(parts)
