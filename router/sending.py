"""Messages that services send by themselves: what can be sent, and what became of it. They wait in the
outbox.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from actors.messages import JsonObject
from router.config import AppConfig
from router.json_text import encode, is_storable
from router.postgres.rows import identity_of, reference_of

_PHONE = re.compile(r"\+?([0-9]{5,20})", re.ASCII)
_NUMBER = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
_USER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)  # business-scoped, opaque


class NotSent(Exception):
    """Nothing was put into the outbox. `code` is "to", "phone_number_id", "message", "no_sender" or
    "idempotency_key_reused"."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A message in the outbox. `status`: pending, sent or failed, and what the channel said since: delivered,
    read and the like; `created`: it was not there before; `message_id`: what the channel calls it.
    """

    id: str
    status: str
    created: bool = False
    message_id: str | None = None
    error: str | None = None


class OutboxOfServices(Protocol):
    """The part of the outbox that services use. Its methods raise JournalUnavailable."""

    async def send(
        self,
        service: str,
        *,
        key: str,
        request_sha256: bytes,
        number: str,
        recipient: str,
        payload: str,
        correlation_id: str,
    ) -> Mapping[str, Any]: ...

    async def sent(self, service: str, identity: int) -> Mapping[str, Any] | None: ...


class Sending:
    """`is_ours` tells whether a phone_number_id may be sent from; `sends`: whether there is a sender."""

    def __init__(
        self,
        outbox: OutboxOfServices,
        apps: tuple[AppConfig, ...],
        *,
        is_ours: Callable[[str], bool],
        sends: bool,
    ) -> None:
        self._outbox = outbox
        self._is_ours = is_ours
        self._sends = sends
        numbers = {number for app in apps for number in app.numbers}
        is_all = all(app.numbers for app in apps)
        self._only_number = next(iter(numbers)) if len(numbers) == 1 and is_all else None

    async def send(
        self,
        service: str,
        *,
        to: str,
        message: JsonObject,
        idempotency_key: str,
        phone_number_id: str | None,
        correlation_id: str,
    ) -> SentMessage:
        """Raises NotSent, JournalUnavailable."""
        if not self._sends:
            raise NotSent("no_sender", "this router has no [sender], so that nothing would be sent")
        number = self._only_number if phone_number_id is None else phone_number_id
        if number is None:
            raise NotSent("phone_number_id", "phone_number_id is missing: say from which number it goes")
        if not _NUMBER.fullmatch(number) or not self._is_ours(number):
            raise NotSent("phone_number_id", "phone_number_id is of no app of this router")
        recipient = _recipient(to)
        payload, request = _written(number, recipient, dict(message))
        row = await self._outbox.send(
            service,
            key=idempotency_key,
            request_sha256=hashlib.sha256(request.encode()).digest(),
            number=number,
            recipient=recipient,
            payload=payload,
            correlation_id=correlation_id,
        )
        if not row["is_same"]:
            raise NotSent("idempotency_key_reused", "another message was sent under this Idempotency-Key")
        return SentMessage(reference_of(row["id"]), row["status"], created=row["created"])

    async def sent(self, service: str, identity: str) -> SentMessage | None:
        """None: the service sent no such message. Raises JournalUnavailable."""
        number = identity_of(identity)
        row = None if number is None else await self._outbox.sent(service, number)
        if row is None:
            return None
        status = row["furthest"] or row["status"]
        return SentMessage(identity, status, message_id=row["message_id"], error=row["error_message"])


def _written(number: str, recipient: str, message: dict[str, Any]) -> tuple[str, str]:
    """The message as it is stored, and all of the request, however its keys are ordered."""
    wrong = NotSent("message", "message is not a Graph API message object, with a type and without `to`")
    try:
        if not isinstance(message.get("type"), str) or "to" in message or not is_storable(message):
            raise wrong
        return encode(message).decode(), json.dumps([number, recipient, message], sort_keys=True)
    except (RecursionError, TypeError):
        raise wrong from None


def _recipient(to: str) -> str:
    phone = _PHONE.fullmatch(to)
    if phone is not None:
        return phone[1]
    if not _USER_ID.fullmatch(to):
        raise NotSent("to", "to is neither a phone number with its country code nor a user id")
    return to
