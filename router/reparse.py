"""Splits stored bodies again after a fix: what is readable now becomes a body of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.messages import Bucket, Delivery, Incoming
from router.channels.bodies import cut
from router.channels.whatsapp import Splitter
from router.json_text import encode, parse


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A stored event: `paths` say where its malformed items stand in its body."""

    event_id: int
    app: str
    body: bytes
    correlation_id: str
    traceparent: str | None
    paths: Sequence[str]


def readable_again(splitter: Splitter, event: StoredEvent) -> tuple[Delivery | None, list[str]]:
    """What of an event was malformed and is not any more, as a body of its own, and the paths of that. Pure.

    A part that could not be split at all (the body, an entry, a change) counts when all that is found in it
    now is good.
    """
    try:
        document = parse(event.body)
    except ValueError:
        return None, []
    found = splitter.split(document)
    good = [path for path in event.paths if _is_good([item for item in found if _is_in(item.path, path)])]
    others = {item.path for item in found if not any(_is_in(item.path, path) for path in good)}
    left = (cut(document, others) if others else document) if good else None
    if left is None:
        return None, []
    delivery = splitter.delivery(
        encode(left) if others else event.body,
        correlation_id=event.correlation_id,
        traceparent=event.traceparent,
        settle=lambda stored: None,
    )
    delivery.partial = bool(others)
    return delivery, good


def _is_good(found: list[Incoming]) -> bool:
    return bool(found) and all(item.bucket is not Bucket.MALFORMED for item in found)


def _is_in(path: str, part: str) -> bool:
    return part in ("", path) or path.startswith(f"{part}.")
