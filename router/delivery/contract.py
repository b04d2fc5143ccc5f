"""What is posted to a service and the answer read from it: version 1, docs/delivery.schema.json. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import orjson

from actors.messages import UNCHANGED, Ack, Envelope, Reply, Session, SessionChange
from actors.ports import Unreadable
from router.json_text import encode, is_storable

from .connection import Origin

VERSION = 1
_ACK = Ack()  # what most services say
_SESSION = ("key", "phone_number_id", "wa_id", "user_id", "active_service", "state", "version")
KnownDomain = Callable[[str], bool]


def body_of(envelope: Envelope) -> bytes:
    """The JSON body of one attempt."""
    return encode(as_object(envelope))


def request_of(
    origin: Origin,
    envelope: Envelope,
    body: bytes,
    *,
    timestamp: int,
    signature: str | None,
    shadow: bool = False,
) -> bytes:
    """The whole request of one attempt: `timestamp` in Unix seconds, `signature` is that of
    `webhook-signature`, None: it is not signed. `shadow`: it is a copy, and says so.
    """
    head = (
        f"POST {origin.path} HTTP/1.1\r\nHost: {origin.authority}\r\nUser-Agent: postroom\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"webhook-id: {envelope.id}\r\nwebhook-timestamp: {timestamp}\r\nIdempotency-Key: {envelope.id}\r\n"
        f"X-Correlation-ID: {envelope.correlation_id}\r\ntraceparent: {traceparent(envelope)}\r\n"
    )
    if signature is not None:
        head += f"webhook-signature: {signature}\r\n"
    if shadow:
        head += "X-Postroom-Shadow: true\r\n"
    return head.encode("latin-1") + b"\r\n" + body


def traceparent(envelope: Envelope) -> str:
    """W3C trace context of one attempt: the sender's trace, else one made of the idempotency key, so
    that every attempt of a message is in one trace.
    """
    trace, flags = envelope.id[4:36], "01"
    if envelope.traceparent is not None:
        _, trace, _, flags = envelope.traceparent.split("-")
    span_id = format((int(envelope.id[4:20], 16) + envelope.attempt) & (2**64 - 1) or 1, "016x")
    return f"00-{trace}-{span_id}-{flags}"


def as_object(envelope: Envelope) -> dict[str, Any]:
    """That body before it is written."""
    session = envelope.session
    return {
        "version": VERSION,
        "id": envelope.id,
        "message_id": envelope.message_id,
        "domain": envelope.domain,
        "attempt": envelope.attempt,
        "redelivered": envelope.redelivered,
        "replay": envelope.replay,
        "received_at": envelope.received_at.isoformat(),
        "correlation_id": envelope.correlation_id,
        "session": {
            "key": session.key,
            "phone_number_id": session.phone_number_id,
            "wa_id": session.wa_id,
            "user_id": session.user_id,
            "active_service": session.active_service,
            "state": session.state,
            "version": session.version,
        },
        "contact": envelope.contact,
        "message": envelope.message,
    }


def envelope_of(delivery: Mapping[str, Any]) -> Envelope:
    """The envelope that `as_object` was made of, but for its trace context, which travels beside it.

    Raises:
        ValueError: it is no delivery of a version that is known here.
    """
    try:
        if delivery["version"] != VERSION:
            raise ValueError(f"a delivery of version {delivery['version']!r}, not {VERSION}")
        session = delivery["session"]
        return Envelope(
            id=delivery["id"],
            message_id=delivery["message_id"],
            domain=delivery["domain"],
            session=Session(**{name: session[name] for name in _SESSION}),
            message=delivery["message"],
            contact=delivery["contact"],
            received_at=datetime.fromisoformat(delivery["received_at"]),
            correlation_id=delivery["correlation_id"],
            attempt=delivery["attempt"],
            redelivered=delivery["redelivered"],
            replay=delivery["replay"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no delivery: {error!r}") from None


def answer_of(ack: Ack) -> dict[str, Any]:
    """The answer that says what this Ack does."""
    answer: dict[str, Any] = {}
    if ack.replies:
        answer["replies"] = [reply.as_message() for reply in ack.replies]
    change = ack.session
    if change is not None:
        said = (("active_service", change.active_service), ("state", change.state))
        answer["session"] = {name: value for name, value in said if value is not UNCHANGED}
    return answer


def read_answer(body: bytes, known_domain: KnownDomain) -> Ack | Unreadable:
    """What a 2xx answer says. Nothing, or an empty object, is an Ack without more."""
    if body == b"{}" or not body.strip():
        return _ACK
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Unreadable("the answer is not JSON")
    return read_object(answer, known_domain)


def read_object(answer: Any, known_domain: KnownDomain) -> Ack | Unreadable:
    """The same of an answer that was parsed."""
    if not isinstance(answer, dict):
        return Unreadable("the answer is not an object")
    replies = _replies(answer.get("replies"))
    if isinstance(replies, Unreadable):
        return replies
    session = _session(answer.get("session"))
    if isinstance(session, Unreadable):
        return session
    return checked(Ack(replies, session), known_domain)


def checked(ack: Ack, known_domain: KnownDomain) -> Ack | Unreadable:
    """The same Ack, when everything in it can be stored and means something. Takes nothing for granted:
    a handler is not type-checked.
    """
    replies: object = ack.replies
    if not isinstance(replies, tuple | list):
        return Unreadable("replies is not a tuple")
    for reply in replies:
        if not isinstance(reply, Reply) or not _is_object(reply.as_message()):
            return Unreadable("a reply cannot be stored as JSON")
    change: object = ack.session
    if change is None:
        return ack
    if not isinstance(change, SessionChange):
        return Unreadable("session is not a SessionChange")
    active: object = change.active_service
    if active is not None and active is not UNCHANGED and not _is_domain(active, known_domain):
        return Unreadable("session.active_service names no domain")
    state = change.state
    if state is UNCHANGED:
        return ack
    if not _is_object(state):
        return Unreadable("session.state cannot be stored as JSON")
    return ack if isinstance(state, dict) else replace(ack, session=replace(change, state=dict(state)))


def _is_domain(name: object, known_domain: KnownDomain) -> bool:
    return isinstance(name, str) and known_domain(name)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and is_storable(dict(value))


def _replies(listed: Any) -> tuple[Reply, ...] | Unreadable:
    if listed is None:
        return ()
    if not isinstance(listed, list):
        return Unreadable("replies is not a list")
    replies = []
    for one in listed:
        if not isinstance(one, dict):
            return Unreadable("a reply is not an object")
        if isinstance(one.get("type"), str) and "to" not in one:
            replies.append(Reply(message=one))
        elif isinstance(one.get("text"), str) and set(one) == {"text"}:
            replies.append(Reply(one["text"]))
        else:
            return Unreadable("a reply is neither {text} nor a message object without `to`")
    return tuple(replies)


def _session(change: Any) -> SessionChange | Unreadable | None:
    if change is None:
        return None
    if not isinstance(change, dict):
        return Unreadable("session is not an object")
    active = change.get("active_service", UNCHANGED)
    if active is not UNCHANGED and active is not None and not isinstance(active, str):
        return Unreadable("session.active_service is neither null nor a name")
    state = change.get("state", UNCHANGED)
    if state is not UNCHANGED and not isinstance(state, dict):
        return Unreadable("session.state is not an object")
    return SessionChange(active_service=active, state=state)
