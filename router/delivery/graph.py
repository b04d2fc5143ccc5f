"""Sends replies through Meta's Graph API, and says what its answers mean."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from actors.messages import Later, OutboundMessage, Refused, SendOutcome, Sent
from actors.outbound import OpenSender
from actors.ports import Clock, Sender
from router.json_text import encode, parse

from .connection import HttpConnection, NoAnswer, Origin, Response, retry_after

# What an error's `code` means, where its status does not say it (Cloud API, error codes, 2026).
PAIR_LIMIT: Final = 131056  # this number wrote to this phone too often
_LATER: Final = frozenset(
    {
        *(1, 2, 131000, 131016, 133004),  # trouble of Meta's own
        *(4, 80007, 130429, 131048, 133016),  # too much was sent
        *(0, 3, 10, 190, 131005, 131031, 131042, 368),  # token, permission, account: an operator can mend it
    }
)
_LATER_STATUSES: Final = frozenset({401, 403, 404, 405, 408, 425, 429})  # a wrong URL or token loses no mail
_PHONE_NUMBER = re.compile(r"\+?[0-9]{1,32}", re.ASCII)


class GraphSender:
    """One connection to the Graph API, or to what speaks like it."""

    def __init__(self, connection: HttpConnection, origin: Origin, token: str, *, clock: Clock) -> None:
        self._connection = connection
        self._origin = origin
        self._token = token
        self._clock = clock

    async def send(self, message: OutboundMessage) -> SendOutcome:
        try:
            request = self._request(message)
        except ValueError:  # somebody put it there by hand
            return Refused("it cannot be written as a request")
        try:
            response = await self._connection.exchange(request)
        except NoAnswer as error:
            return Later(str(error))
        return outcome_of(response, self._clock())

    def _request(self, message: OutboundMessage) -> bytes:
        body, origin = body_of(message), self._origin
        path = f"{origin.path.rstrip('/')}/{quote(message.phone_number_id, safe='')}/messages"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {origin.authority}\r\nUser-Agent: postroom\r\n"
            f"Authorization: Bearer {self._token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Correlation-ID: {message.correlation_id}\r\n\r\n"
        )
        return head.encode("latin-1") + body


def body_of(message: OutboundMessage) -> bytes:
    """The JSON body: what the service wrote, with its recipient. A phone number stands under `to`, a
    business-scoped user id under `recipient`. Statuses bring `biz_opaque_callback_data` back.
    """
    to = "to" if _PHONE_NUMBER.fullmatch(message.recipient) else "recipient"
    return encode(
        {
            "biz_opaque_callback_data": message.reference,
            **message.message,
            "messaging_product": "whatsapp",
            "recipient_type": "individual",
            to: message.recipient,
        }
    )


def outcome_of(response: Response, now: datetime) -> SendOutcome:
    """What the answer says about the message. Its id is empty where a 2xx answer does not have it."""
    status = response.status
    answer = None if response.too_large else _parsed(bytes(response.body))
    if 200 <= status < 300:
        return Sent(_message_id(answer))
    code = _error_code(answer)
    reason = f"answered {status}" if code is None else f"answered {status}, error {code}"
    if code == PAIR_LIMIT:
        return Later(reason, only_this_one=True)
    if code in _LATER or status in _LATER_STATUSES or not 400 <= status < 500:
        return Later(reason, retry_after(response.headers.get("retry-after"), now))
    return Refused(reason)


def _parsed(body: bytes) -> Any:
    try:
        return parse(body)
    except (ValueError, RecursionError):
        return None


def _message_id(answer: Any) -> str:
    match answer:
        case {"messages": [{"id": str(message_id)}, *_]}:
            return message_id
    return ""


def _error_code(answer: Any) -> int | None:
    match answer:
        case {"error": {"code": int(code)}}:
            return code
    return None


def open_sender(url: str, token: str, *, clock: Clock) -> OpenSender:
    """Senders to the Graph API at `url`, which ends with its version: https://graph.facebook.com/v23.0."""
    origin = Origin.of(url)
    tls = origin.tls_context()

    @asynccontextmanager
    async def sender() -> AsyncIterator[Sender]:
        connection = HttpConnection(origin, tls=tls)
        try:
            yield GraphSender(connection, origin, token, clock=clock)
        finally:
            await connection.close()

    return sender
