"""The values that travel between actors and to handlers: frozen, without behaviour beyond their shape."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

JsonObject = Mapping[str, Any]


class Unchanged(enum.Enum):
    """Stands for a part of the session that an answer leaves as it is (None means: cleared)."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A conversation as a handler sees it. `version` never repeats for a key."""

    key: str
    phone_number_id: str
    wa_id: str | None = None
    user_id: str | None = None
    active_service: str | None = None
    state: JsonObject = field(default_factory=dict)
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One message on its way to a service. `id` is the idempotency key; `message` is as Meta sent it.

    `attempt` counts from 1. `redelivered`: an earlier attempt may have arrived. `replay`: later
    messages of the conversation have overtaken this one.
    """

    id: str
    message_id: str | None
    domain: str
    session: Session
    message: JsonObject
    contact: JsonObject | None = None
    received_at: datetime
    correlation_id: str
    traceparent: str | None = None
    attempt: int = 1
    redelivered: bool = False
    replay: bool = False

    @property
    def text(self) -> str:
        """The text of a text message, else the empty string."""
        text = self.message.get("text")
        body = text.get("body") if isinstance(text, Mapping) else None
        return body if isinstance(body, str) else ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the service answers the phone: a text, or a Graph API message object without `to`.

    Raises:
        ValueError: both or neither are given.
    """

    text: str | None = None
    message: JsonObject | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.message is None):
            raise ValueError("a Reply has either text or message")

    def as_message(self) -> JsonObject:
        """The Graph API message object."""
        if self.message is not None:
            return self.message
        return {"type": "text", "text": {"body": self.text}}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionChange:
    """What an answer changes in the session; `state` replaces the old state whole."""

    active_service: str | Unchanged | None = UNCHANGED
    state: JsonObject | Unchanged = UNCHANGED


@dataclass(frozen=True, slots=True)
class Ack:
    """Delivered. Replies and session change are committed together with that outcome."""

    replies: tuple[Reply, ...] = ()
    session: SessionChange | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now; `after` in seconds, or None for the router's own backoff."""

    after: float | None = None
    reason: str = "retry"


@dataclass(frozen=True, slots=True)
class Reject:
    """Never; the message is listed as rejected and can be replayed by an operator."""

    reason: str = "rejected"


Outcome = Ack | Retry | Reject


class Kind(enum.StrEnum):
    """What an item is. The value is the letter it has in the tables."""

    MESSAGE = "m"
    STATUS = "s"
    ERROR = "e"
    CHANGE = "c"
    BODY = "b"  # a body that could not be split


class Bucket(enum.StrEnum):
    """Where an item that no service will see ends, at the moment it is journaled."""

    MALFORMED = "malformed"
    HANDLED = "handled"
    ERASED = "erased"  # of a person who was erased after it was sent


@dataclass(frozen=True, slots=True)
class StatusUpdate:
    """A status of an outbound message; only moves forward, by `rank`."""

    status: str
    rank: int
    timestamp: int | None  # Unix seconds, where the sender gave any


@dataclass(slots=True)
class Incoming:
    """One item of a body before it has a place in the journal. `key` is the 16-byte ledger hash;
    `names` are what its sender is known by, the canonical one first.
    """

    kind: Kind
    key: bytes
    deduplicated: bool
    path: str = ""  # where it stands in its body
    message_id: str | None = None
    phone_number_id: str | None = None
    names: tuple[str, ...] = ()
    wa_id: str | None = None
    user_id: str | None = None
    type: str | None = None
    bucket: Bucket | None = None
    reason: str | None = None
    message: JsonObject | None = None
    contact: JsonObject | None = None
    status: StatusUpdate | None = None


@dataclass(slots=True, eq=False)
class Delivery:
    """One signed body from Meta with its items. `settle(stored)` answers the sender, exactly once.
    `cut` is how its channel makes it smaller. Without items it could not be split yet: the key of the
    ledger's hashes is in the database.
    """

    app: str
    body: bytes
    items: list[Incoming]
    correlation_id: str
    traceparent: str | None
    cut: Callable[[Delivery, frozenset[int]], Delivery | None]
    settle: Callable[[bool], None]
    partial: bool = False

    def without(self, positions: frozenset[int]) -> Delivery | None:
        """The same body with the items at these positions cut out, or None when nothing is left."""
        return self.cut(self, positions)


@dataclass(frozen=True, slots=True)
class Spooled:
    """One signed body that waits for the journal, as it was accepted."""

    app: str
    body: bytes
    correlation_id: str
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class Item:
    """One journaled message as its session takes it. `redelivered`: an attempt by an earlier owner
    may have arrived. `joins`: the session that this conversation absorbs before the item is decided.
    """

    seq: int
    key: str
    message_id: str | None
    session_key: str
    phone_number_id: str
    wa_id: str | None
    user_id: str | None
    received_at: datetime
    correlation_id: str
    traceparent: str | None
    message: JsonObject
    contact: JsonObject | None
    redelivered: bool = False
    joins: str | None = None
    dead_letter: str | None = None  # the id of the dead letter that this is a replay of
    domain: str | None = None  # where a replay goes
    revision: int = 0
    retries: int = 0  # of the dead letter, that were counted
    deferred: bool = False  # this replay is the first delivery: it waited in its turn
    overtaken: bool = False  # this replay is of a dead letter that later messages went on past


class Turn(enum.Enum):
    """What a session that wants to deliver to a service may do."""

    FREE = enum.auto()  # go, if there is room: nobody stands in line
    CALLED = enum.auto()  # go: it was the first in line
    IN_LINE = enum.auto()  # wait behind others
    TOO_LATE = enum.auto()  # go, if there is room, and else wait no more: it stood in line in vain


class Place(enum.StrEnum):
    """Where an item that reached its session ended. The value stands in message_outcomes.outcome."""

    HANDLED = "handled"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    DEAD_LETTER = "dead_letter"
    DEFERRED = "deferred"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What could not be delivered. `status` and `resolution` as in webhook_dlq; `retry_in` seconds.
    `counted`: as one retry, when this is a replay; one that was put off is not. `keeps_order`: later
    messages of the conversation for that service wait behind it.
    """

    status: str
    resolution: str | None
    error: str
    retry_in: float | None
    counted: bool = True
    keeps_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one item, committed whole: outcome, session, replies, dead letter."""

    item: Item
    place: Place
    service: str | None
    rule: str
    attempts: int
    session: Session | None = None  # as it is after this item; None: unchanged but for the time
    replies: tuple[JsonObject, ...] = ()
    dead_letter: DeadLetter | None = None
    unreadable_answer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundMessage:
    """A reply on its way to the phone. `message` is a Graph API message object without its recipient;
    `reference` is ours, the same each time it is sent; `attempts` were made before.
    """

    id: int
    session_key: str
    phone_number_id: str
    recipient: str
    message: JsonObject
    reference: str
    correlation_id: str
    created_at: datetime
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """The channel has it, under this id of its own."""

    message_id: str


@dataclass(frozen=True, slots=True)
class Later:
    """Not now; `after` in seconds, or None for the router's own backoff. `only_this_one`: this phone may not
    be written to for a while, which says nothing about the channel; else the channel itself is unable.
    """

    reason: str
    after: float | None = None
    only_this_one: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """It will never take this message."""

    reason: str


SendOutcome = Sent | Later | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRecord:
    """How an attempt at sending ended. `retry_in` seconds, where it is to be tried again."""

    message: OutboundMessage
    outcome: SendOutcome
    retry_in: float | None = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """Replies that can be sent now, those of a conversation in order, and in how many seconds the next of the
    others can be; None: none waits for its time.
    """

    messages: list[OutboundMessage]
    next_in: float | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    """A committed flush: the seq of its first item and, for each item in order, the session it was
    given (None for items that no session takes) and the session that this one joins with.
    """

    first_seq: int
    session_keys: list[str | None]
    joins: dict[int, str]  # position in the flush -> absorbed session
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Nothing was written: these positions of the flush are in the ledger already."""

    positions: list[int]
    seqs: list[int]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What the journal holds undelivered: (seq, session key) in journal order, and the newest seq."""

    items: list[tuple[int, str]]
    newest: int
