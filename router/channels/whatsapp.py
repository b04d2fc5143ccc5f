"""The WhatsApp Cloud API channel: signature, parsing, and the split of one body into items. Pure: no
I/O and no clock. What Meta signed is never refused here, it is put into a bucket with a reason.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

from actors.messages import Bucket, Delivery, Incoming, Kind, StatusUpdate
from router.json_text import encode, parse
from router.mac import HmacSha256

from .bodies import (
    ERASED,
    Contacts,
    cut,
    is_storable,
    latest_timestamp,
    name_in,
    names_of,
    people,
    seconds,
    text_in,
    without,
)
from .tombstones import Tombstones

OBJECT = "whatsapp_business_account"
MAX_BODY_BYTES = 3_145_728  # Meta's own limit for one webhook body

_MESSAGE = Kind.MESSAGE  # looked up once: an enum's members are slow to reach in Python 3.11

# Where a status stands on its way; it only moves forward. `deleted` and `played` are ends of their own.
STATUS_RANK = {"sent": 1, "delivered": 2, "failed": 2, "read": 3, "played": 4, "deleted": 5}


class AppSecret(HmacSha256):
    """An app secret, ready to sign with."""

    __slots__ = ()

    def signature(self, body: bytes) -> bytes:
        """What `X-Hub-Signature-256` has to say of this body."""
        return b"sha256=" + self.digest(body).hex().encode()


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
    a phone_number_id may be signed for by this app. What the `tombstones` cover is stored without content.
    """

    def __init__(
        self,
        app: str,
        *,
        dedup_key: bytes,
        is_ours: Callable[[str], bool],
        tombstones: Tombstones | None = None,
        random_key: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self._app = app
        self._keyed = {kind: blake2b(digest_size=16, key=dedup_key, person=kind) for kind in (b"m", b"s")}
        self._is_ours = is_ours
        self._tombstones = Tombstones() if tombstones is None else tombstones
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
        partial = False
        try:
            document = parse(body)
            items = self.split(document)
            if self._tombstones.newest:
                erased = [item.path for item in items if item.bucket is Bucket.ERASED]
                if erased:
                    body, partial = encode(without(document, erased)), True
        except ValueError:
            items = [self._bucketed(Kind.BODY, "", Bucket.MALFORMED, "unparseable")]

        return Delivery(self._app, body, items, correlation_id, traceparent, self._cut, settle, partial)

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
        if document == ERASED:
            return [self._bucketed(Kind.BODY, "", Bucket.ERASED, None)]
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
            known = isinstance(field, str) and is_storable(field)
            bucket, reason = Bucket.HANDLED, field if known else "unknown_field"
            if value == ERASED or (
                self._tombstones.newest and self._is_erased(people(value), latest_timestamp(value))
            ):
                bucket, reason = Bucket.ERASED, None
            items.append(self._bucketed(Kind.CHANGE, path, bucket, reason))
            return
        if not isinstance(value, dict):
            items.append(self._bucketed(Kind.CHANGE, path, Bucket.MALFORMED, "no_value"))
            return
        metadata = value.get("metadata")
        number = name_in(metadata, "phone_number_id") if isinstance(metadata, dict) else None
        wrong = None
        if number is None:
            wrong = "no_phone_number_id"
        elif not self._is_ours(number):
            wrong = "foreign_number"
        before = len(items)
        messages = value.get("messages")
        if isinstance(messages, list) and messages:
            contacts = Contacts(value.get("contacts"))
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
        self, message: Any, path: str, number: str | None, wrong: str | None, contacts: Contacts
    ) -> Incoming:
        if not isinstance(message, dict):
            return self._bucketed(Kind.MESSAGE, path, Bucket.MALFORMED, "not_an_object", number)
        message_id = name_in(message, "id")
        if message_id is None:
            if message == ERASED:
                return self._bucketed(Kind.MESSAGE, path, Bucket.ERASED, None, number)
            wrong = wrong or ("no_id" if text_in(message, "id") is None else "unstorable_id")
        contact = contacts.of(message)
        wa_id, user_id, names = names_of(message, contact)
        if wrong is not None or number is None or message_id is None:
            if self._tombstones.newest and self._is_erased((wa_id, user_id), message.get("timestamp")):
                return self._bucketed(Kind.MESSAGE, path, Bucket.ERASED, None, number)
            item = self._bucketed(Kind.MESSAGE, path, Bucket.MALFORMED, wrong, number)
            item.message_id = message_id
            return item
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
            name_in(message, "type"),
            None,
            None,
            message,
            contact,
        )
        if not names:
            item.bucket, item.reason = Bucket.MALFORMED, "no_sender"
        elif self._tombstones.newest and self._is_erased((wa_id, user_id), message.get("timestamp")):
            _erase(item)
        return item

    def _is_erased(self, names: Iterable[str | None], stamp: Any) -> bool:
        sent_at = seconds(stamp)
        if sent_at is None or sent_at > self._tombstones.newest:
            return False
        return any(name is not None and self._tombstones.cover(name, sent_at) for name in names)

    def _status(self, status: Any, path: str, number: str | None, wrong: str | None) -> Incoming:
        if not isinstance(status, dict):
            return self._bucketed(Kind.STATUS, path, Bucket.MALFORMED, "not_an_object", number)
        if status == ERASED:
            return self._bucketed(Kind.STATUS, path, Bucket.ERASED, None, number)
        message_id, name = text_in(status, "id"), text_in(status, "status")
        if wrong is None and (
            message_id is None or name is None or not is_storable(message_id) or not is_storable(name)
        ):
            wrong = "no_id" if message_id is None else "no_status" if name is None else "unstorable_id"
        stamp = status.get("timestamp")
        erased = bool(self._tombstones.newest) and self._is_erased(people(status), stamp)
        if wrong is not None or message_id is None or name is None or number is None:
            if erased:
                return self._bucketed(Kind.STATUS, path, Bucket.ERASED, None, number)
            return self._bucketed(Kind.STATUS, path, Bucket.MALFORMED, wrong, number)
        item = Incoming(
            Kind.STATUS,
            self.status_key(message_id, name, str(stamp)),
            True,
            path=path,
            message_id=message_id,
            phone_number_id=number,
            type=name,
            bucket=Bucket.HANDLED,
            reason="status",
            status=StatusUpdate(name, STATUS_RANK.get(name, 0), seconds(stamp)),
        )
        if erased:
            _erase(item)
        return item

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


def _erase(item: Incoming) -> None:
    """What is left is its hash, for the ledger."""
    item.bucket, item.reason, item.names, item.wa_id, item.user_id = Bucket.ERASED, None, (), None, None
    item.message_id = item.message = item.contact = item.status = None


def challenge(query: Sequence[tuple[str, str]], verify_token: str) -> str | None:
    """The answer to Meta's handshake, or None when it must be refused."""
    asked = dict(query)
    token = asked.get("hub.verify_token", "")
    answer = asked.get("hub.challenge")
    if asked.get("hub.mode") != "subscribe" or answer is None:
        return None
    matches = hmac.compare_digest(token.encode("utf-8", "replace"), verify_token.encode("utf-8"))
    return answer if matches else None
