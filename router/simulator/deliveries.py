"""The values that pass between phones, traffic and ledger: what a webhook body holds, and how it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

MESSAGE = "message"
STATUS = "status"

UNSIGNED = "unsigned"
OTHER_SECRET = "other_secret"
OTHER_BYTES = "other_bytes"


@dataclass(frozen=True)
class Manner:
    """How a body is posted.

    `forgery` is None for a body that is rightly signed, else "unsigned", "other_secret" or "other_bytes": no
    signature, one with another secret, one of other bytes. The request leaves in `pieces` with `pause`
    seconds between them. With `hang_up` the connection is closed instead of waiting for the answer; with
    several pieces, instead of sending the last one.
    """

    forgery: str | None = None
    pieces: int = 1
    pause: float = 0.0
    hang_up: bool = False


PLAIN = Manner()


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
    that messages were put in deliberately which an earlier delivery has carried. `twin` says that the body is
    posted on two connections at the same moment. `malformed` are the ids of messages in the body that nobody
    can deliver, for want of a sender; they are no items.
    """

    serial: int
    body: bytes = field(repr=False)
    items: tuple[SentItem, ...]
    attempt: int = 1
    duplicate: bool = False
    twin: bool = False
    manner: Manner = PLAIN
    malformed: tuple[str, ...] = field(default=(), repr=False)

    @property
    def forged(self) -> bool:
        return self.manner.forgery is not None
