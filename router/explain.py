"""What `postroom explain` prints: the very decision that the router makes, for messages given by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from actors.messages import Item, Session
from router.channels.whatsapp import Splitter
from router.config import Config
from router.domains import canonical_domain
from router.json_text import parse
from router.routing import Routes


class ExplainError(ValueError):
    """There is nothing to explain; the message says why."""


def explain_all(
    config: Config, *, text: str | None, payload: bytes | None, active_service: str | None
) -> list[dict[str, Any]]:
    """For each message: `domain` (None when the router answers itself), `rule`, `reason`.

    Raises:
        ExplainError: the payload is no body and no message, or the active service is no domain.
    """
    if active_service is not None:
        active_service = canonical_domain(active_service)
        if active_service not in config.services:
            raise ExplainError(
                f"--active-service {active_service!r} is not one of {', '.join(config.services)}"
            )
    routes = Routes(config.routing, config.services)
    messages = [{"type": "text", "text": {"body": text}}] if text is not None else _messages(payload or b"")
    return [_explain(routes, message, active_service) for message in messages]


def _explain(routes: Routes, message: dict[str, Any], active_service: str | None) -> dict[str, Any]:
    sender = message.get("from")
    wa_id = sender if isinstance(sender, str) else None
    item = Item(
        seq=0,
        key="",
        message_id=None,
        session_key="",
        phone_number_id="",
        wa_id=wa_id,
        user_id=None,
        received_at=datetime(1970, 1, 1, tzinfo=UTC),
        correlation_id="",
        traceparent=None,
        message=message,
        contact=None,
    )
    route = routes.decide(item, Session(key="", phone_number_id="", active_service=active_service))
    return {"domain": route.domain, "rule": route.rule, "reason": route.reason}


def _messages(payload: bytes) -> list[dict[str, Any]]:
    if not payload.strip():
        raise ExplainError("nothing on standard input; give --text, or a payload")
    try:
        document = parse(payload)
    except ValueError as error:
        raise ExplainError(f"the payload is {error}") from None
    if isinstance(document, dict) and "type" in document and "entry" not in document:
        return [document]
    items = Splitter("explain", dedup_key=b"explain", is_ours=lambda _: True).split(document)
    messages = [dict(item.message) for item in items if item.message is not None and item.bucket is None]
    if not messages:
        reasons = ", ".join(sorted({f"{item.bucket}: {item.reason}" for item in items}))
        raise ExplainError(f"the payload has no message that is routed ({reasons})")
    return messages
