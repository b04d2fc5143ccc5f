"""One person taken out of what was stored: what is theirs is replaced whole, where others mention them their
names are. Pure.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from router.channels.bodies import ERASED, items_of, named_by, without
from router.json_text import encode, parse

MIN_NAME: Final = 5
"""Characters. A shorter name would be found in everything."""
REDACTED: Final = "[erased]"

_CONTAINERS = frozenset({"entry", "changes", "messages", "statuses"})
_RUN = re.compile(r"[A-Za-z0-9+/_=-]{8,}")
ESCAPES: Final = tuple(b"\\u00%d" % high for high in range(3, 8))
"""How JSON may write what names are made of, digits and Latin letters: who hides so is found by parsing."""


@dataclass(frozen=True, slots=True)
class Redacted:
    """A body without the person: `paths` are those of the items that are gone whole."""

    body: bytes
    paths: frozenset[str]


class Redaction:
    """One person by all names. Names of fewer than MIN_NAME characters are looked for where a field names a
    person, and in no text."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        long = sorted((name for name in self.names if len(name) >= MIN_NAME), key=len, reverse=True)
        # A number is not part of a longer one, a name not of a longer word.
        self._named = [(name, _bounded(name), _bounded_bytes(name)) for name in long]
        self._encoded = [form for name in long for form in _base64_forms(name)]
        self.needles = [*(name.encode() for name in long), *(form.encode() for form in self._encoded)]
        """What a text that mentions the person contains, unless it hides it behind escapes."""

    def mentions(self, data: bytes) -> bool:
        """Whether these bytes hold a name as it is, or in base64."""
        return any(needle in data for needle in self.needles)

    def may_concern(self, body: bytes) -> bool:
        """Whether this JSON may name the person; false says that it does not."""
        return self.mentions(body) or any(escape in body for escape in ESCAPES)

    def concerns(self, body: bytes) -> bool:
        """Whether this JSON, or whatever it is, names the person."""
        return self.may_concern(body) and self.body(body) is not None

    def body(self, body: bytes) -> Redacted | None:
        """A stored body without the person; None: it does not name them."""
        try:
            document = parse(body)
        except ValueError:
            return Redacted(encode(ERASED), frozenset({""})) if self.mentions(body) else None
        after = self.part(without(document, items_of(document, self.names)))
        if encode(after) == encode(document):
            return None
        if not isinstance(document, dict) or not isinstance(document.get("entry"), list):
            return Redacted(encode(ERASED), frozenset({""}))  # one item, whatever it is
        return Redacted(encode(after), frozenset(_erased_paths(after)) - frozenset(_erased_paths(document)))

    def part(self, part: Any) -> Any:
        """Any JSON value without the person."""
        if isinstance(part, str):
            return self.text(part)
        if isinstance(part, list):
            listed = []
            for one in part:  # loops: a comprehension would be a second frame for each level
                listed.append(ERASED if self._is_of(one) else self.part(one))
            return listed
        if isinstance(part, dict):
            fields = {}
            for key, one in part.items():
                fields[self.text(key)] = ERASED if self._is_of(one) else self.part(one)
            return fields
        if isinstance(part, int) and not isinstance(part, bool) and str(part) in self.names:
            return REDACTED
        return part

    def text(self, text: str) -> str:
        """A text in which the names of the person, and what holds them in base64, are replaced."""
        for name, pattern, _ in self._named:
            if name in text:
                text = pattern.sub(REDACTED, text)
        if any(form in text for form in self._encoded):
            text = _RUN.sub(lambda run: REDACTED if self._hides_in(run.group()) else run.group(), text)
        return text

    def _is_of(self, part: Any) -> bool:
        """Whether this object is the person's, by its own fields; never one that holds items of others."""
        if not isinstance(part, dict) or not _CONTAINERS.isdisjoint(part):
            return False
        if any(name.lstrip("+") in self.names for name in named_by(part)):
            return True
        identity = part.get("id")  # of a message, it has the number of whoever it is from or to
        if isinstance(identity, str) and self.text(identity) != identity:
            return True
        phones = part.get("phones")  # of a contact card
        return isinstance(phones, list) and any(self._is_of(phone) for phone in phones)

    def _hides_in(self, run: str) -> bool:
        for start in range(4):
            aligned = run[start:].rstrip("=")
            with suppress(binascii.Error, ValueError):
                aligned = aligned[: len(aligned) - (len(aligned) % 4 == 1)]
                decoded = base64.b64decode(aligned + "=" * (-len(aligned) % 4))
                if any(pattern.search(decoded) for _, _, pattern in self._named):
                    return True
        return False


def _bounded(name: str) -> re.Pattern[str]:
    edge = r"\d" if name.isdecimal() else r"[^\W_]"
    return re.compile(f"(?<!{edge}){re.escape(name)}(?!{edge})")


def _bounded_bytes(name: str) -> re.Pattern[bytes]:
    edge = (rb"(?<!\d)", rb"(?!\d)") if name.isdecimal() else (b"", b"")
    return re.compile(edge[0] + re.escape(name.encode()) + edge[1])


def _base64_forms(name: str) -> list[str]:
    """What base64 of anything that holds the name contains, by where it begins there."""
    forms = []
    data = name.encode()
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data).decode()
        forms.append(encoded[-(-before * 8 // 6) : (before + len(data)) * 8 // 6])
    return forms


def _erased_paths(document: Mapping[str, Any]) -> list[str]:
    """The paths of items in whose place ERASED stands."""
    found = []
    for e, entry in enumerate(document["entry"]):
        if entry == ERASED:
            found.append(f"{e}")
            continue
        changes = entry.get("changes") if isinstance(entry, dict) else None
        for c, change in enumerate(changes if isinstance(changes, list) else ()):
            value = change.get("value") if isinstance(change, dict) else None
            if ERASED in (change, value):
                found.append(f"{e}.{c}")
            elif isinstance(value, dict):
                for letter, listed in (("m", "messages"), ("s", "statuses"), ("e", "errors")):
                    if isinstance(value.get(listed), list):
                        found += [
                            f"{e}.{c}.{letter}{i}" for i, one in enumerate(value[listed]) if one == ERASED
                        ]
    return found
