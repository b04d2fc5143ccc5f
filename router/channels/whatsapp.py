"""The WhatsApp Cloud API channel: signature, parsing, and the split of one body into items. Pure: no
I/O and no clock. What Meta signed is never refused here, it is put into a bucket with a reason.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b, sha256
from typing import Any

from actors.messages import Bucket, Delivery, Incoming, Kind, StatusUpdate
from router.json_text import encode, parse

OBJECT = "whatsapp_business_account"
MAX_BODY_BYTES = 3_145_728  # Meta's own limit for one webhook body
MAX_ID_CHARS = 512  # far above any id that Meta sends; ids are keys of btree indexes

_NOTHING: Mapping[str, Any] = {}
_RARE_IN_MESSAGE = frozenset({"from_user_id", "from_parent_user_id", "group_id"})
_RARE_IN_CONTACT = frozenset({"user_id", "parent_user_id"})
_NAMING = frozenset(
    {
        "from", "from_user_id", "from_parent_user_id", "wa_id", "new_wa_id", "user_id", "parent_user_id",
        "recipient_id", "recipient_user_id", "recipient_parent_user_id", "customer",
    }
)  # fmt: skip
_LISTS = {"m": "messages", "s": "statuses", "e": "errors"}
_MESSAGE = Kind.MESSAGE  # looked up once: an enum's members are slow to reach in Python 3.11

# Where a status stands on its way; it only moves forward. `deleted` and `played` are ends of their own.
STATUS_RANK = {"sent": 1, "delivered": 2, "failed": 2, "read": 3, "played": 4, "deleted": 5}


class AppSecret:
    """An app secret, ready to sign with: HMAC (RFC 2104) with both of its keyed hash states made once.
    Keying them for each body would cost more than hashing it.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, secret: bytes) -> None:
        key = secret if len(secret) <= sha256().block_size else sha256(secret).digest()
        padded = key.ljust(sha256().block_size, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in padded))

    def signature(self, body: bytes) -> bytes:
        """What `X-Hub-Signature-256` has to say of this body."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(body)
        outer.update(inner.digest())
        return b"sha256=" + outer.hexdigest().encode()


def signature_is_valid(header: str | bytes | None, body: bytes, app_secrets: Iterable[AppSecret]) -> bool:
    """Whether `X-Hub-Signature-256` is the HMAC-SHA256 of these bytes under one of the secrets.

    Compared in constant time, and under every secret, so that time does not tell which one is live.
    """
    given = header.encode("latin-1", "replace") if isinstance(header, str) else header or b""
    valid = False
    for secret in app_secrets:
        valid |= hmac.compare_digest(given, secret.signature(body))
    return valid


class Splitter:
    """Splits the bodies of one app. `dedup_key` keys the ledger's hashes; `is_ours(number)` says whether
    a phone_number_id may be signed for by this app.
    """

    def __init__(
        self,
        app: str,
        *,
        dedup_key: bytes,
        is_ours: Callable[[str], bool],
        random_key: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self._app = app
        self._keyed = {kind: blake2b(digest_size=16, key=dedup_key, person=kind) for kind in (b"m", b"s")}
        self._is_ours = is_ours
        self._random_key = random_key

    def delivery(
        self,
        body: bytes,
        *,
        correlation_id: str,
        traceparent: str | None,
        settle: Callable[[bool], None],
    ) -> Delivery:
        """The body with its items. Never raises for anything that the bytes hold."""
        try:
            items = self.split(parse(body))
        except ValueError:
            items = [self._bucketed(Kind.BODY, "", Bucket.MALFORMED, "unparseable")]

        return Delivery(self._app, body, items, correlation_id, traceparent, self._cut, settle)

    def _cut(self, delivery: Delivery, positions: frozenset[int]) -> Delivery | None:
        items = delivery.items
        if len(positions) == len(items):
            return None
        # Parsed again: to keep every document until its flush has committed costs more.
        left = cut(parse(delivery.body), {items[position].path for position in positions})
        if left is None:
            return None
        rest = self.delivery(
            encode(left),
            correlation_id=delivery.correlation_id,
            traceparent=delivery.traceparent,
            settle=delivery.settle,
        )
        rest.partial = True
        return rest

    def split(self, document: Any) -> list[Incoming]:
        """Every item of a parsed body, in the order it stands there; never an empty list."""
        if not isinstance(document, dict):
            return [self._bucketed(Kind.BODY, "", Bucket.MALFORMED, "not_an_object")]
        if document.get("object") != OBJECT:
            return [self._bucketed(Kind.BODY, "", Bucket.MALFORMED, "wrong_object")]
        entries = document.get("entry")
        if not isinstance(entries, list) or not entries:
            return [self._bucketed(Kind.BODY, "", Bucket.MALFORMED, "no_entry")]
        items: list[Incoming] = []
        for e, entry in enumerate(entries):
            changes = entry.get("changes") if isinstance(entry, dict) else None
            if not isinstance(changes, list) or not changes:
                items.append(self._bucketed(Kind.CHANGE, f"{e}", Bucket.MALFORMED, "no_changes"))
                continue
            for c, change in enumerate(changes):
                self._split_change(change, f"{e}.{c}", items)
        return items

    def _split_change(self, change: Any, path: str, items: list[Incoming]) -> None:
        if not isinstance(change, dict):
            items.append(self._bucketed(Kind.CHANGE, path, Bucket.MALFORMED, "not_an_object"))
            return
        field, value = change.get("field"), change.get("value")
        if field != "messages":
            reason = field if isinstance(field, str) and _storable(field) else "unknown_field"
            items.append(self._bucketed(Kind.CHANGE, path, Bucket.HANDLED, reason))
            return
        if not isinstance(value, dict):
            items.append(self._bucketed(Kind.CHANGE, path, Bucket.MALFORMED, "no_value"))
            return
        metadata = value.get("metadata")
        number = _name(metadata, "phone_number_id") if isinstance(metadata, dict) else None
        wrong = None
        if number is None:
            wrong = "no_phone_number_id"
        elif not self._is_ours(number):
            wrong = "foreign_number"
        before = len(items)
        messages = value.get("messages")
        if isinstance(messages, list) and messages:
            contacts = _Contacts(value.get("contacts"))
            for index, message in enumerate(messages):
                items.append(self._message(message, f"{path}.m{index}", number, wrong, contacts))
        statuses = value.get("statuses")
        if isinstance(statuses, list):
            for index, status in enumerate(statuses):
                items.append(self._status(status, f"{path}.s{index}", number, wrong))
        errors = value.get("errors")
        if isinstance(errors, list):
            bucket = Bucket.MALFORMED if wrong else Bucket.HANDLED
            for index in range(len(errors)):
                items.append(self._bucketed(Kind.ERROR, f"{path}.e{index}", bucket, wrong or "error", number))
        if len(items) == before:
            items.append(self._bucketed(Kind.CHANGE, path, Bucket.HANDLED, "messages"))

    def _message(
        self, message: Any, path: str, number: str | None, wrong: str | None, contacts: _Contacts
    ) -> Incoming:
        if not isinstance(message, dict):
            return self._bucketed(Kind.MESSAGE, path, Bucket.MALFORMED, "not_an_object", number)
        message_id = _name(message, "id")
        if message_id is None:
            wrong = wrong or ("no_id" if _text(message, "id") is None else "unstorable_id")
        if wrong is not None or number is None or message_id is None:
            item = self._bucketed(Kind.MESSAGE, path, Bucket.MALFORMED, wrong, number)
            item.message_id = message_id
            return item
        contact = contacts.of(message)
        wa_id, user_id, names = _names(message, contact)
        item = Incoming(
            _MESSAGE,
            self.message_key(number, message_id),
            True,
            path,
            message_id,
            number,
            names,
            wa_id,
            user_id,
            _name(message, "type"),
            None,
            None,
            message,
            contact,
        )
        if not names:
            item.bucket, item.reason = Bucket.MALFORMED, "no_sender"
        return item

    def _status(self, status: Any, path: str, number: str | None, wrong: str | None) -> Incoming:
        if not isinstance(status, dict):
            return self._bucketed(Kind.STATUS, path, Bucket.MALFORMED, "not_an_object", number)
        message_id, name = _text(status, "id"), _text(status, "status")
        if wrong is None and (
            message_id is None or name is None or not _storable(message_id) or not _storable(name)
        ):
            wrong = "no_id" if message_id is None else "no_status" if name is None else "unstorable_id"
        if wrong is not None or message_id is None or name is None or number is None:
            return self._bucketed(Kind.STATUS, path, Bucket.MALFORMED, wrong, number)
        stamp = status.get("timestamp")
        return Incoming(
            Kind.STATUS,
            self.status_key(message_id, name, str(stamp)),
            True,
            path=path,
            message_id=message_id,
            phone_number_id=number,
            type=name,
            bucket=Bucket.HANDLED,
            reason="status",
            status=StatusUpdate(name, STATUS_RANK.get(name, 0), _seconds(stamp)),
        )

    def message_key(self, number: str, message_id: str) -> bytes:
        """The ledger's 16-byte hash of a message; also the body of its idempotency key."""
        return self._hash(b"m", f"{number}\0{message_id}")

    def status_key(self, message_id: str, status: str, timestamp: str) -> bytes:
        """The ledger's hash of a status."""
        return self._hash(b"s", f"{message_id}\0{status}\0{timestamp}")

    def _hash(self, kind: bytes, named: str) -> bytes:
        # A copy of a keyed state costs a third of keying a new one.
        state = self._keyed[kind].copy()
        state.update(named.encode("utf-8", "surrogatepass"))
        return state.digest()

    def _bucketed(
        self, kind: Kind, path: str, bucket: Bucket, reason: str | None, number: str | None = None
    ) -> Incoming:
        return Incoming(
            kind, self._random_key(), False, path=path, phone_number_id=number, bucket=bucket, reason=reason
        )


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
    return message, _Contacts(value.get("contacts")).of(message)


def sender(message: Mapping[str, Any], contact: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """(wa_id, user_id) of a message's sender."""
    wa_id, user_id, _ = _names(message, contact)
    return wa_id, user_id


def people(part: Any) -> set[str]:
    """What the persons are known by that a body, or a part of one, is of or about."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found.update(name for key in _NAMING & one.keys() if isinstance(name := one[key], str) and name)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return found


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
        named = _Contacts(contacts)
        needed = {id(named.of(message)) for message in kept_messages if isinstance(message, dict)}
        left["contacts"] = [one for one in contacts if isinstance(one, dict) and id(one) in needed]
        if not left["contacts"]:
            del left["contacts"]
    return {**change, "value": left}


class _Contacts:
    """The contacts of one change, by what they are known by: a body may have a thousand."""

    __slots__ = ("_listed", "_positions")

    def __init__(self, contacts: Any) -> None:
        self._listed: list[Any] = contacts if isinstance(contacts, list) else []
        self._positions: dict[tuple[str, str], int] | None = None

    def of(self, message: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The first contact that names this message's sender, by number or by business-scoped id."""
        if len(self._listed) == 1:  # nearly always
            only = self._listed[0]
            return only if isinstance(only, dict) and _shares_a_name(message, only) else None
        if self._positions is None:
            self._positions = {}
            for position, contact in enumerate(self._listed):
                if isinstance(contact, dict):
                    for key in ("wa_id", "user_id"):
                        if (name := _text(contact, key)) is not None:
                            self._positions.setdefault((key, name), position)
        positions = [
            self._positions[key, name]
            for key, name in (("wa_id", _text(message, "from")), ("user_id", _text(message, "from_user_id")))
            if name is not None and (key, name) in self._positions
        ]
        return self._listed[min(positions)] if positions else None


def _shares_a_name(message: Mapping[str, Any], contact: Mapping[str, Any]) -> bool:
    name = message.get("from")
    if name and isinstance(name, str) and name == contact.get("wa_id"):
        return True
    name = message.get("from_user_id")
    return bool(name) and isinstance(name, str) and name == contact.get("user_id")


def _names(
    message: Mapping[str, Any], contact: Mapping[str, Any] | None
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """(wa_id, user_id, names). A group is one conversation whoever writes in it."""
    found = contact if contact is not None else _NOTHING
    wa_id = _name(message, "from") or _name(found, "wa_id")
    if _RARE_IN_MESSAGE.isdisjoint(message) and _RARE_IN_CONTACT.isdisjoint(found):
        return wa_id, None, () if wa_id is None else (wa_id,)
    user_id = (
        _name(message, "from_user_id")
        or _name(found, "user_id")
        or _name(message, "from_parent_user_id")
        or _name(found, "parent_user_id")
    )
    group = _name(message, "group_id")
    if group is not None:
        return wa_id, user_id, (f"group:{group}",)
    if wa_id is None:
        return wa_id, user_id, () if user_id is None else (user_id,)
    return wa_id, user_id, (wa_id,) if user_id is None else (wa_id, user_id)


def _name(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    return value if value and isinstance(value, str) and _storable(value) else None


def _text(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    return value if value and isinstance(value, str) else None


def _storable(text: str) -> bool:
    """Postgres text takes neither NUL nor lone surrogates, and an index entry has a limit."""
    return len(text) <= MAX_ID_CHARS and (
        text.isprintable()  # neither of them is, and ids are
        or ("\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text))
    )


def _seconds(value: Any) -> int | None:
    """Unix seconds as Meta sends them, as text; None when they are no time that Postgres could hold."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    try:
        seconds = int(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 253_402_300_800 else None  # before the year 10000


def challenge(query: Sequence[tuple[str, str]], verify_token: str) -> str | None:
    """The answer to Meta's handshake, or None when it must be refused."""
    asked = dict(query)
    token = asked.get("hub.verify_token", "")
    answer = asked.get("hub.challenge")
    if asked.get("hub.mode") != "subscribe" or answer is None:
        return None
    matches = hmac.compare_digest(token.encode("utf-8", "replace"), verify_token.encode("utf-8"))
    return answer if matches else None
