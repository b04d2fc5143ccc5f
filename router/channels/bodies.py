"""A body of the WhatsApp Cloud API by its parts: who is named in it, what stands at the path of an item
(`entry.change.list+index`, as `0.0.m3`), and the body without some of them. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

MAX_ID_CHARS = 512  # far above any id that Meta sends; ids are keys of btree indexes

ERASED: Final[Mapping[str, Any]] = {"erased": True}
"""Stands in a stored body for what was erased there: the paths of the others stay what they are."""

_NOTHING: Mapping[str, Any] = {}
_RARE_IN_MESSAGE = frozenset({"from_user_id", "from_parent_user_id", "group_id"})
_RARE_IN_CONTACT = frozenset({"user_id", "parent_user_id"})
_NAMING = frozenset(
    {
        "from", "from_user_id", "from_parent_user_id", "wa_id", "new_wa_id", "user_id", "parent_user_id",
        "recipient_id", "recipient_user_id", "recipient_parent_user_id", "customer", "to",
    }
)  # fmt: skip
_LISTS = {"m": "messages", "s": "statuses", "e": "errors"}


def item_at(document: Any, path: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The message that a path (`entry.change.m+index`) names in a stored body, and its contact.

    Raises:
        LookupError: there is no message at that path.
    """
    try:
        e, c, m = path.split(".")
        value = document["entry"][int(e)]["changes"][int(c)]["value"]
        message = value["messages"][int(m[1:])]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LookupError(f"no message at {path!r}") from error
    if not m.startswith("m") or not isinstance(message, dict):
        raise LookupError(f"no message at {path!r}")
    return message, Contacts(value.get("contacts")).of(message)


def sender(message: Mapping[str, Any], contact: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """(wa_id, user_id) of a message's sender."""
    wa_id, user_id, _ = names_of(message, contact)
    return wa_id, user_id


def items_of(document: Any, names: frozenset[str]) -> list[str]:
    """The paths of the messages whose sender has one of these names, also where only the contact says so."""
    found = []
    entries = document.get("entry") if isinstance(document, dict) else None
    for e, entry in enumerate(entries if isinstance(entries, list) else ()):
        changes = entry.get("changes") if isinstance(entry, dict) else None
        for c, change in enumerate(changes if isinstance(changes, list) else ()):
            value = change.get("value") if isinstance(change, dict) else None
            if isinstance(value, dict) and isinstance(value.get("messages"), list):
                contacts = Contacts(value.get("contacts"))
                for m, message in enumerate(value["messages"]):
                    if isinstance(message, dict) and not names.isdisjoint(
                        sender(message, contacts.of(message))
                    ):
                        found.append(f"{e}.{c}.m{m}")
    return found


def people(part: Any) -> set[str]:
    """What the persons are known by that a body, or a part of one, is of or about."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found |= named_by(one)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return found


def latest_timestamp(part: Any) -> int | None:
    """The latest Unix time that a `timestamp` in there says; None: there is none."""
    latest: int | None = None
    waiting = [part]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            stamp = seconds(one.get("timestamp"))
            latest = stamp if latest is None or (stamp is not None and stamp > latest) else latest
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return latest


def named_by(part: Mapping[str, Any]) -> set[str]:
    """What the persons are known by that the fields of this object name, and none deeper in it."""
    return {name for key in _NAMING & part.keys() if isinstance(name := part[key], str) and name}


def part_at(document: Any, path: str) -> Any:
    """What the path of an item names in a stored body: an entry, a change, a message, a status or an error.

    Raises:
        LookupError: there is nothing at that path.
    """
    try:
        steps = path.split(".") if path else []
        part = document
        for step, name in zip(steps[:2], ("entry", "changes"), strict=False):
            part = part[name][int(step)]
        if len(steps) > 2:
            part = part["value"][_LISTS[steps[2][0]]][int(steps[2][1:])]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LookupError(f"nothing at {path!r}") from error
    return part


def cut(document: Any, paths: set[str]) -> Any:
    """The document without the items at these paths, without contacts that only they had, and without
    changes and entries that are empty then; None when nothing is left.
    """
    entries = []
    for e, entry in enumerate(document["entry"]):
        changes = entry.get("changes") if isinstance(entry, dict) else None
        if not isinstance(changes, list) or not changes:
            if f"{e}" not in paths:
                entries.append(entry)
            continue
        changes = [
            left
            for c, change in enumerate(changes)
            if (left := _cut_change(change, f"{e}.{c}", paths)) is not _GONE
        ]
        if changes:
            entries.append({**entry, "changes": changes})
    return {**document, "entry": entries} if entries else None


def without(document: Any, paths: Collection[str]) -> Any:
    """The document with ERASED in place of the items at these paths, and of contacts that only they had."""
    if "" in paths:
        return ERASED
    if not paths:
        return document
    entries = list(document["entry"])
    for path in paths:
        steps = path.split(".")
        e = int(steps[0])
        if len(steps) == 1:
            entries[e] = ERASED
            continue
        c = int(steps[1])
        changes = list(entries[e]["changes"])
        entries[e] = {**entries[e], "changes": changes}
        if len(steps) == 2:
            changes[c] = {**changes[c], "value": ERASED} if isinstance(changes[c], dict) else ERASED
            continue
        value = dict(changes[c]["value"])
        changes[c] = {**changes[c], "value": value}
        listed = value[_LISTS[steps[2][0]]] = list(value[_LISTS[steps[2][0]]])
        position = int(steps[2][1:])
        contacts = value.get("contacts")
        if isinstance(contacts, list) and isinstance(listed[position], dict):
            gone = Contacts(contacts).of(listed[position])
            listed[position] = ERASED
            named = Contacts(contacts)
            needed = {id(named.of(one)) for one in value.get("messages", []) if isinstance(one, dict)}
            if gone is not None and id(gone) not in needed:
                value["contacts"] = [ERASED if one is gone else one for one in contacts]
        listed[position] = ERASED
    return {**document, "entry": entries}


_GONE = object()  # None is what a change may be that nobody cuts: malformed, and an item all the same


def _cut_change(change: Any, path: str, paths: set[str]) -> Any:
    if path in paths:
        return _GONE
    value = change.get("value") if isinstance(change, dict) else None
    if not isinstance(value, dict):
        return change
    left = dict(value)
    touched = False
    for name, letter in (("messages", "m"), ("statuses", "s"), ("errors", "e")):
        listed = value.get(name)
        if isinstance(listed, list):
            kept = [one for i, one in enumerate(listed) if f"{path}.{letter}{i}" not in paths]
            touched |= len(kept) != len(listed)
            if kept:
                left[name] = kept
            else:
                del left[name]
    if not touched:
        return change
    if not any(name in left for name in ("messages", "statuses", "errors")):
        return _GONE
    contacts = value.get("contacts")
    if isinstance(contacts, list):
        kept_messages = left.get("messages", [])
        named = Contacts(contacts)
        needed = {id(named.of(message)) for message in kept_messages if isinstance(message, dict)}
        left["contacts"] = [one for one in contacts if isinstance(one, dict) and id(one) in needed]
        if not left["contacts"]:
            del left["contacts"]
    return {**change, "value": left}


class Contacts:
    """The contacts of one change, by what they are known by: a body may have a thousand."""

    __slots__ = ("_listed", "_only", "_positions")

    def __init__(self, contacts: Any) -> None:
        self._listed: list[Any] = contacts if isinstance(contacts, list) else []
        self._only: Mapping[str, Any] | None = None
        if len(self._listed) == 1 and isinstance(contacts[0], dict):  # nearly always
            self._only = contacts[0]
        self._positions: dict[tuple[str, str], int] | None = None

    def of(self, message: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The first contact that names this message's sender, by number or by business-scoped id."""
        if self._only is not None:
            name = message.get("from")
            if name and isinstance(name, str) and name == self._only.get("wa_id"):
                return self._only
            name = message.get("from_user_id")
            if name and isinstance(name, str) and name == self._only.get("user_id"):
                return self._only
            return None
        if self._positions is None:
            self._positions = {}
            for position, contact in enumerate(self._listed):
                if isinstance(contact, dict):
                    for key in ("wa_id", "user_id"):
                        if (name := text_in(contact, key)) is not None:
                            self._positions.setdefault((key, name), position)
        positions = [
            self._positions[key, name]
            for key, name in (
                ("wa_id", text_in(message, "from")),
                ("user_id", text_in(message, "from_user_id")),
            )
            if name is not None and (key, name) in self._positions
        ]
        return self._listed[min(positions)] if positions else None


def names_of(
    message: Mapping[str, Any], contact: Mapping[str, Any] | None
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """(wa_id, user_id, names). A group is one conversation whoever writes in it."""
    found = contact if contact is not None else _NOTHING
    wa_id = name_in(message, "from") or name_in(found, "wa_id")
    if _RARE_IN_MESSAGE.isdisjoint(message) and _RARE_IN_CONTACT.isdisjoint(found):
        return wa_id, None, () if wa_id is None else (wa_id,)
    user_id = (
        name_in(message, "from_user_id")
        or name_in(found, "user_id")
        or name_in(message, "from_parent_user_id")
        or name_in(found, "parent_user_id")
    )
    group = name_in(message, "group_id")
    if group is not None:
        return wa_id, user_id, (f"group:{group}",)
    if wa_id is None:
        return wa_id, user_id, () if user_id is None else (user_id,)
    return wa_id, user_id, (wa_id,) if user_id is None else (wa_id, user_id)


def name_in(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    if not value or not isinstance(value, str):
        return None
    if value.isascii() and "\0" not in value and len(value) <= MAX_ID_CHARS:  # nearly always
        return value
    return value if is_storable(value) else None


def text_in(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    return value if value and isinstance(value, str) else None


def is_storable(text: str) -> bool:
    """Postgres text takes neither NUL nor lone surrogates, and an index entry has a limit."""
    return (
        len(text) <= MAX_ID_CHARS
        and "\0" not in text
        and (text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text))
    )


def seconds(value: Any) -> int | None:
    """Unix seconds as Meta sends them, as text; None when they are no time that Postgres could hold."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    try:
        seconds = int(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 253_402_300_800 else None  # before the year 10000
