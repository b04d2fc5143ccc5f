"""The values that pass between phones, traffic and ledger: what one webhook body holds. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field

MESSAGE = "message"
STATUS = "status"


@dataclass(frozen=True)
class SentItem:
    """One message or status inside a body.

    `kind` is "message" or "status". `message_id` is the wamid of the message, or of the message that a
    status is about. `sender` is the phone number, or the business-scoped user id of a phone that hides it.
    `domain` is the one that should get a message; None means that any may. `ordinal` counts the messages of
    (phone_number_id, sender) from 1; it is 0 for a status. `text` is the body, caption or title of a
    message and the name of a status.
    """

    kind: str
    message_id: str = field(repr=False)
    phone_number_id: str
    sender: str = field(repr=False)
    domain: str | None
    ordinal: int
    text: str


@dataclass(frozen=True)
class Delivery:
    """One webhook body and its items, in the order in which they stand in it.

    `serial` is the same each time the same delivery is attempted; `attempt` counts from 1. `duplicate` says
    that messages were put in deliberately which an earlier delivery has carried.
    """

    serial: int
    body: bytes = field(repr=False)
    items: tuple[SentItem, ...]
    attempt: int = 1
    duplicate: bool = False
