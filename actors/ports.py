"""The Protocols through which actors reach the world: journal, sessions, handlers, policies, clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol, runtime_checkable

from .messages import (
    Appended,
    Backlog,
    Completion,
    Delivery,
    Duplicates,
    Envelope,
    Item,
    OutboundMessage,
    Outcome,
    Reply,
    SendOutcome,
    SendRecord,
    Session,
    Spooled,
    Unsent,
)

Clock = Callable[[], datetime]
"""The present moment in UTC, aware. Stored times come from here, deadlines from trio's clock."""


class Journal(Protocol):
    """Durable order. Every method returns after COMMIT or raises JournalUnavailable."""

    async def append(
        self, deliveries: Sequence[Delivery], *, duplicates: int
    ) -> Appended | Duplicates | None:
        """Store a flush in one transaction. `duplicates` were found before and are tallied with it.

        None: the outcome of the commit was in doubt and was then found committed; what it stored is
        in the journal and is found there by whoever delivers.
        """

    async def undelivered(self) -> Backlog:
        """Everything unfinished, in journal order, without bodies."""

    async def tail(self, after: int, limit: int) -> tuple[list[Item], int]:
        """Messages for sessions with seq > after, at most `limit` journal entries further on, and the
        newest seq that was looked at (equal to `after` when there is nothing new)."""

    async def read(self, seqs: Sequence[int]) -> list[Item]:
        """These items, in seq order; one that is not there is left out."""

    async def complete(
        self, completions: Sequence[Completion], *, epoch: int, low_water: int, stragglers: Sequence[int]
    ) -> None:
        """Record outcomes, sessions, replies and dead letters in one transaction; repeating is harmless.

        Raises:
            LeaseLost: the epoch is over.
        """

    async def release_dead_letters(self, epoch: int, *, keep: Sequence[str] = ()) -> None:
        """Whatever is claimed, but for `keep`, was so by somebody who is gone: it can be claimed again.

        Raises:
            LeaseLost: the epoch is over.
        """

    async def claim_dead_letters(
        self, epoch: int, limit: int, services: Sequence[str], *, others: bool = False
    ) -> list[Item]:
        """Dead letters for these services that are to be retried now, as replays: what an operator asked
        for, and of each (conversation, service) the oldest open one, if it is due. One that was deferred
        waits only for what keeps the order. `others`: those for any other service, if asked for. A single
        one (`limit` 1) is of the oldest the one that was attempted least.

        Raises:
            LeaseLost: the epoch is over.
        """

    async def expire_dead_letters(self, epoch: int, max_age: timedelta) -> int:
        """Give up those that have waited longer; returns how many.

        Raises:
            LeaseLost: the epoch is over.
        """

    async def held_pairs(self) -> list[tuple[str, str]]:
        """The (session key, service) that have a pending or processing dead letter which keeps the order."""

    async def log_retry_run(
        self,
        epoch: int,
        *,
        took: float,
        processed: int,
        failed: int,
        error: str | None,
        services: Sequence[str],
    ) -> Mapping[str, float]:
        """Put a run on record that took so many seconds; returns the seconds until the next letter is due,
        by service: of these services, and of others for which somebody asked.

        Raises:
            LeaseLost: the epoch is over.
        """

    async def load_sessions(self, keys: Sequence[str]) -> Mapping[str, tuple[Session, datetime]]:
        """The stored sessions among `keys`, each with the time of its last interaction."""


@runtime_checkable
class Gated(Protocol):
    """A handler that cannot always take a delivery: it is asked before one is taken for it."""

    async def ready(self) -> None:
        """Return when it could; cancelled, it is tried all the same."""


class Outbox(Protocol):
    """Replies that were committed and are to be sent. Every method raises JournalUnavailable when it cannot
    reach them.
    """

    async def unsent(self, *, conversations: int, of_each: int, busy: Sequence[str]) -> Unsent:
        """The oldest `of_each` replies of so many conversations at most, none of which is `busy` (session
        keys) or has an oldest reply that is not due yet.
        """

    async def record(self, records: Sequence[SendRecord], *, epoch: int) -> None:
        """Put attempts on record, in one transaction; repeating is harmless.

        Raises:
            LeaseLost: the epoch is over.
        """


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done when: `schedule` is followed from `followed_to` on; `requested`: somebody wants it
    done now, whether it is `active` or not."""

    name: str
    schedule: str
    active: bool
    followed_to: datetime
    requested: bool


class JobLog(Protocol):
    """The jobs and their runs. Every method raises JournalUnavailable when it cannot reach them, and
    LeaseLost when the epoch is over.
    """

    async def jobs(self, epoch: int) -> list[Job]: ...

    async def begin(self, epoch: int, name: str) -> int:
        """Put the start of a run on record; returns its number. A run of that job that was never ended was
        interrupted: it is put on record as failed."""

    async def end(self, epoch: int, run: int, *, failed: bool, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class StatusNews:
    """A status that a service is to be told, as it is delivered; `attempts` were made before."""

    id: int
    envelope: Envelope
    created_at: datetime
    attempts: int


@dataclass(frozen=True, slots=True)
class StatusPage:
    """What is due now, the oldest of each message; without any, in how many seconds the next is, None: none
    waits.
    """

    news: list[StatusNews]
    next_in: float | None = None


class StatusLog(Protocol):
    """The statuses that services are to be told. Every method raises JournalUnavailable when it cannot reach
    them, `subscribe` and `record` LeaseLost when the epoch is over.
    """

    async def subscribe(self, services: Sequence[str], *, epoch: int) -> None:
        """From now on these are told, and no others."""

    async def due(self, service: str, limit: int) -> StatusPage: ...

    async def record(self, done: Sequence[int], later: Sequence[tuple[int, float]], *, epoch: int) -> None:
        """These were told; those are to be tried again in so many seconds."""


class Sender(Protocol):
    """One attempt at sending. Bounded by the caller's cancel scope; raises nothing it can map."""

    async def send(self, message: OutboundMessage) -> SendOutcome: ...


class ResendPolicy(Protocol):
    """When a reply that could not be sent is tried again."""

    def send_again_in(self, attempts: int, asked: float | None) -> float:
        """Seconds until the next attempt after so many; `asked`: what the channel asked to wait for."""


class Spool(Protocol):
    """Where bodies wait while the journal is away, in the order in which they were accepted."""

    @property
    def is_empty(self) -> bool:
        """Nothing waits, and nothing is on its way here."""

    async def append(self, deliveries: Sequence[Delivery], *, only_behind: bool = False) -> bool:
        """Returns when these are durable. `only_behind`: they are taken only if something still waits that
        they have to come after; False: nothing does any more, and they were not.

        Raises:
            SpoolUnavailable: none of them counts.
        """

    async def hold(self) -> None:
        """Let nobody append until `release`: the last few are brought before more come."""

    def release(self) -> None:
        """Harmless without a `hold`."""

    async def filled(self) -> None:
        """Return when something waits."""

    async def read(self) -> list[Spooled]:
        """What comes next; the same again until `done` or `refused`. Empty when nothing waits any more.

        Raises:
            SpoolUnavailable: it cannot be read.
        """

    def done(self, count: int) -> None:
        """The first `count` of what `read` gave are in the journal."""

    async def refused(self) -> None:
        """The journal will never take the first of what `read` gave: it is set aside and reported.

        Raises:
            SpoolUnavailable: it cannot be set aside.
        """


class Lease(Protocol):
    """Who delivers: one process at a time, fenced by an epoch."""

    async def acquire(self) -> int:
        """Wait until this process may deliver; returns its epoch."""

    async def hold(self, epoch: int) -> None:
        """Renew until the epoch is over, then return. Trouble with the database is waited out: as long
        as nobody else took over, the epoch goes on."""

    def held(self) -> bool:
        """Whether the lease is known to be held at this moment: it was renewed recently enough, and the
        database session that holds it is there."""

    async def end(self, epoch: int) -> None:
        """Give it up, so that another process need not wait for it to run out."""


class Handler(Protocol):
    """One attempt at a service. Bounded by the caller's cancel scope; raises nothing it can map."""

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable: ...


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The service took the message, but its answer could not be read: delivered, content ignored."""

    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """A decision. `domain` is None when the router answers itself (menu, home, exit)."""

    rule: str
    domain: str | None
    reason: str
    replies: tuple[Reply, ...] = ()
    leave: bool = False  # the active service is cleared


class RoutePolicy(Protocol):
    """Decides where one message goes, from the message and the session alone."""

    def decide(self, item: Item, session: Session) -> Route: ...


class RetryPolicy(Protocol):
    """When a failed attempt is followed by another one, and how a delivery ends."""

    def next_attempt(
        self, attempts: int, elapsed: float, deadline: float, asked: float | None
    ) -> float | None:
        """Seconds to wait before the next attempt, or None: the delivery is over."""

    def put_off(self, asked: float) -> float:
        """Seconds until the dead letter is due that a service asked to have again then."""

    def pause(self, openings: int) -> float:
        """Seconds for which a service is left alone whose breaker opened so many times in a row."""


class RedeliveryPolicy(Protocol):
    """When the dead letters of a service are due."""

    def due_in(self, retries: int) -> float | None:
        """Seconds until the next retry after so many, or None: it was the last."""
