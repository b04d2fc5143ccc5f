"""`postroom send`: one signed message into a running router, and what became of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from random import SystemRandom
from typing import Any

from actors.errors import JournalUnavailable
from router.config import Config
from router.operations import open_operations
from router.simulator import NotAnswered, WebhookClient, payloads


async def send_one(
    config: Config,
    *,
    url: str,
    secret: str,
    phone: str,
    number: str,
    text: str,
    wait: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Post it to `url` and look in the database of `config` for at most `wait` seconds.

    Returns what was sent, the answer's status and latency, and the item's place, service and rule.

    Raises:
        JournalUnavailable: nothing answers at `url`, or the database cannot be reached.
    """
    message_id = payloads.wamid(phone, SystemRandom())
    head = payloads.Head(id=message_id, timestamp=int(time.time()), sender=phone)
    body = payloads.body(
        payloads.entry(
            "0",
            payloads.change(
                number,
                "15550000000",
                messages=[payloads.text_message(head, text)],
                contacts=[payloads.contact("postroom send", phone)],
            ),
        )
    )
    client = WebhookClient(url, secret)
    try:
        answer = await client.post(body, headers=[("X-Correlation-ID", f"send-{secrets.token_hex(8)}")])
    except NotAnswered as error:
        raise JournalUnavailable(f"{url}: {error}; start `postroom serve`, or use --url") from error
    finally:
        client.close()
    result: dict[str, Any] = {
        "message_id": message_id,
        "answered": answer.status,
        "latency_ms": round(answer.seconds * 1000, 2),
        "correlation": answer.headers.get("x-correlation-id"),
    }
    if answer.status != 200:
        return result | {"detail": answer.body.decode("utf-8", "replace")}
    async with open_operations(config, report=report) as operations:
        found = await operations.ended(number, message_id, within=wait)
    if found is None:
        return result | {"place": "not in this database; is it the router's? see --data-dir, --database-url"}
    return result | {name: found[name] for name in ("place", "service", "rule", "attempts", "seq")}
