"""Messages that come from the embedding program, as if Meta had sent them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from actors.messages import Envelope, Session
from router.channels.whatsapp import OBJECT
from router.clock import utc_now
from router.json_text import encode


def body_of(envelope: Envelope) -> bytes:
    """The body that Meta would have sent for this message."""
    value: dict[str, Any] = {
        "messaging_product": "whatsapp",
        "metadata": {
            "display_phone_number": "",
            "phone_number_id": envelope.session.phone_number_id,
        },
        "messages": [dict(envelope.message)],
    }
    if envelope.contact is not None:
        value["contacts"] = [dict(envelope.contact)]
    change = {"field": "messages", "value": value}
    return encode({"object": OBJECT, "entry": [{"id": "submitted", "changes": [change]}]})


def inbound(
    *,
    phone_number_id: str,
    message: Mapping[str, Any],
    contact: Mapping[str, Any] | None = None,
    correlation_id: str | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Envelope:
    """An envelope for `submit`, around a message object as Meta sends it."""
    return Envelope(
        id="",
        message_id=str(message.get("id", "")),
        domain="",
        session=Session(key="", phone_number_id=phone_number_id),
        message=message,
        contact=contact,
        received_at=clock(),
        correlation_id=correlation_id or secrets.token_hex(16),
    )
