"""In-memory doubles of the ports, which pass the same contract suites as the real adapters, and a rig
that wires the delivering actors around them.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import trio
import trio.testing
from memory_statuses import MemoryStatuses

from actors.breaker import Breaker, Trips
from actors.completer import Completer
from actors.concurrency import Concurrency
from actors.deferrals import Deferrals
from actors.dispatcher import Dispatcher
from actors.errors import JournalUnavailable, LeaseLost
from actors.kernel import Address, ChildSpec, Strategy, Supervisor
from actors.messages import (
    Ack,
    Appended,
    Backlog,
    Completion,
    DeadLetter,
    Delivery,
    Duplicates,
    Envelope,
    Incoming,
    Item,
    Kind,
    Outcome,
    Reject,
    Reply,
    Retry,
    Session,
)
from actors.ports import Route, Unreadable
from actors.service import OpenLane, Service, ServiceStatistics
from actors.services import ServiceSpec
from actors.session import SessionActor
from actors.tree import TreeSpec
from router.retry import REDELIVERY, Backoff

START = datetime(2030, 1, 1, tzinfo=UTC)


def incoming(name: str, sender: str = "250700000001", *, user_id: str | None = None) -> Incoming:
    """A text message of `sender`; its ledger key is made of `name`."""
    return Incoming(
        Kind.MESSAGE,
        name.encode().ljust(16, b".")[:16],
        True,
        message_id=f"wamid.{name}",
        phone_number_id="100",
        names=(sender,) if user_id is None else (sender, user_id),
        wa_id=sender,
        user_id=user_id,
        type="text",
        message={"type": "text", "text": {"body": name}},
    )


@dataclass
class Answers:
    """What `settle` was called with, for each delivery in turn."""

    given: list[bool] = field(default_factory=list)


def delivery(*items: Incoming, answers: Answers | None = None, size: int = 10) -> Delivery:
    """A body with these items that can be cut like a real one."""
    settle = (answers or Answers()).given.append

    def cut(_whole: Delivery, positions: frozenset[int]) -> Delivery | None:
        left = [item for position, item in enumerate(items) if position not in positions]
        return replace(delivery(*left), settle=settle, partial=True) if left else None

    return Delivery("app", b"x" * size, list(items), "correlation", None, cut, settle)


@dataclass
class _Letter:
    seq: int
    service: str
    session_key: str
    status: str
    resolution: str | None
    due: datetime | None
    created: datetime
    attempts: int = 0
    keeps_order: bool = False
    retries: int = 0
    retry_requested: bool = False
    claimed_epoch: int | None = None

    @property
    def open(self) -> bool:
        return self.status in ("pending", "processing")

    @property
    def holds(self) -> bool:
        return self.open and self.keeps_order


@dataclass(frozen=True)
class RetryRun:
    """A row of dlq_processing_log."""

    processed: int
    failed: int
    error: str | None


class MemoryJournal:
    """A journal in which a commit is one step between two checkpoints. `fail(method, ...)` queues what
    the next calls raise, or `DOUBT`: it commits and answers None. `before(method)` may delay a call.
    """

    DOUBT = object()

    def __init__(self, *, clock: Callable[[], datetime] = lambda: START) -> None:
        self._clock = clock
        self.epoch = 1
        self.items: list[Item | None] = []  # position + 1 is the seq; None: no session takes it
        self.erased: set[int] = set()
        self.outcomes: dict[int, Completion] = {}
        self.outbox: list[tuple[int, Mapping[str, object]]] = []
        self.letters: dict[str, _Letter] = {}
        self.retry_runs: list[RetryRun] = []
        self.sessions: dict[str, tuple[Session, datetime]] = {}
        self.stragglers: set[int] = set()
        self.low_water = 1
        self.duplicates = 0
        self.calls: Counter[str] = Counter()
        self.before: Callable[[str], Awaitable[None]] | None = None
        self._ledger: dict[bytes, int] = {}
        self._names: dict[tuple[str, str], tuple[str, int]] = {}  # (number, name) -> key, since
        self._failures: defaultdict[str, deque[object]] = defaultdict(deque)

    def fail(self, method: str, *failures: object) -> None:
        self._failures[method].extend(failures or (JournalUnavailable(method),))

    async def _enter(self, method: str) -> bool:
        """True: the outcome of this commit is to be in doubt."""
        self.calls[method] += 1
        if self.before is not None:
            await self.before(method)
        await trio.lowlevel.checkpoint()
        failure = self._failures[method].popleft() if self._failures[method] else None
        if isinstance(failure, BaseException):
            raise failure
        return failure is self.DOUBT

    async def append(
        self, deliveries: Sequence[Delivery], *, duplicates: int
    ) -> Appended | Duplicates | None:
        in_doubt = await self._enter("append")
        appended = self.commit(deliveries, duplicates=duplicates)
        return None if in_doubt and isinstance(appended, Appended) else appended

    def commit(self, deliveries: Sequence[Delivery], *, duplicates: int = 0) -> Appended | Duplicates:
        """What `append` does in its transaction; as another process would."""
        incomings = [(one, which) for which in deliveries for one in which.items]
        known = [
            (position, self._ledger[one.key])
            for position, (one, _) in enumerate(incomings)
            if one.deduplicated and one.key in self._ledger
        ]
        if known:
            return Duplicates([position for position, _ in known], [seq for _, seq in known])
        now, first = self._clock(), len(self.items) + 1
        self.duplicates += duplicates
        keys: list[str | None] = []
        joins: dict[int, str] = {}
        for position, (one, which) in enumerate(incomings):
            seq = first + position
            if one.deduplicated:
                self._ledger[one.key] = seq
            key = None
            if one.bucket is None:
                key, absorbed = self._identify(one, seq)
                if absorbed is not None:
                    joins[position] = absorbed
            keys.append(key)
            self.items.append(
                None
                if key is None or one.message is None
                else Item(
                    seq=seq,
                    key=f"msg_{one.key.hex()}",
                    message_id=one.message_id,
                    session_key=key,
                    phone_number_id=one.phone_number_id or "",
                    wa_id=one.wa_id,
                    user_id=one.user_id,
                    received_at=now,
                    correlation_id=which.correlation_id,
                    traceparent=which.traceparent,
                    message=one.message,
                    contact=one.contact,
                    joins=joins.get(position),
                )
            )
        return Appended(first, keys, joins, now)

    def _identify(self, one: Incoming, seq: int) -> tuple[str, str | None]:
        number = one.phone_number_id or ""
        names = [(number, name) for name in one.names[:2]]
        known = [self._names[name] for name in names if name in self._names]
        keys = {key for key, _ in known}
        if len(keys) == 2:
            # The age of a conversation is that of the first name it was known by.
            age = {key: min(s for k, s in self._names.values() if k == key) for key in keys}
            kept, absorbed = sorted(keys, key=lambda key: (age[key], key))
            for name, (key, since) in self._names.items():
                if key == absorbed:
                    self._names[name] = kept, since
            return kept, absorbed
        key = known[0][0] if known else f"{number}:{one.names[0]}"
        for name in names:
            self._names.setdefault(name, (key, seq))
        return key, None

    async def undelivered(self) -> Backlog:
        await self._enter("undelivered")
        return Backlog(
            [
                (item.seq, item.session_key)
                for item in self.items
                if item is not None
                and item.seq not in self.outcomes
                and (item.seq >= self.low_water or item.seq in self.stragglers)
            ],
            len(self.items),
        )

    async def tail(self, after: int, limit: int) -> tuple[list[Item], int]:
        await self._enter("tail")
        last = max(after, min(len(self.items), after + limit))
        return self._readable(range(after + 1, last + 1)), last

    async def read(self, seqs: Sequence[int]) -> list[Item]:
        await self._enter("read")
        return self._readable(sorted(set(seqs)))

    def _readable(self, seqs: Sequence[int]) -> list[Item]:
        found = (self.items[seq - 1] for seq in seqs if 0 < seq <= len(self.items))
        return [item for item in found if item is not None and item.seq not in self.erased]

    async def complete(
        self, completions: Sequence[Completion], *, epoch: int, low_water: int, stragglers: Sequence[int]
    ) -> None:
        await self._enter("complete")
        self._require(epoch)
        now = self._clock()
        self.stragglers.update(stragglers)
        for done in completions:
            if done.item.dead_letter is None:
                self._complete(done)
                if done.session is not None:
                    self._store(done.item.session_key, done.session, now)
        for done in completions:
            if done.item.dead_letter is not None:
                self._complete_replay(done, now)
        self.low_water = max(self.low_water, low_water)

    def _complete(self, done: Completion) -> None:
        seq = done.item.seq
        if seq in self.outcomes:
            return
        self.outcomes[seq] = done
        self.stragglers.discard(seq)
        self.outbox.extend((seq, reply) for reply in done.replies)
        letter: DeadLetter | None = done.dead_letter
        if letter is not None:
            self.letters[str(uuid.UUID(int=seq))] = _Letter(
                seq,
                done.service or "",
                done.item.session_key,
                letter.status,
                letter.resolution,
                self._due(letter),
                self._clock(),
                done.attempts,
                letter.keeps_order,
            )

    def _due(self, letter: DeadLetter) -> datetime | None:
        return None if letter.retry_in is None else self._clock() + timedelta(seconds=letter.retry_in)

    def _complete_replay(self, done: Completion, now: datetime) -> None:
        letter = self.letters[done.item.dead_letter or ""]
        if letter.status != "processing" or letter.claimed_epoch != self.epoch:
            return
        became = done.dead_letter
        letter.status = letter.resolution = "reprocessed"
        letter.due, letter.keeps_order, counted = None, False, not done.item.deferred
        if became is not None:
            letter.status, letter.resolution = became.status, became.resolution
            letter.due, letter.keeps_order = self._due(became), became.keeps_order
            counted = counted and became.counted
        letter.retries += counted
        letter.attempts += done.attempts
        letter.claimed_epoch, letter.retry_requested = None, False
        self.outcomes[done.item.seq] = done
        self.outbox.extend((done.item.seq, reply) for reply in done.replies)
        if done.session is not None:
            known = self.sessions.get(done.item.session_key)
            if known is None or known[0].version < done.session.version:
                self.sessions[done.item.session_key] = done.session, now if known is None else known[1]

    def _store(self, key: str, session: Session, now: datetime) -> None:
        known = self.sessions.get(key)
        if known is None or known[0].version <= session.version:
            self.sessions[key] = replace(session, key=key), now

    def _require(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise LeaseLost(f"epoch {epoch} is over")

    def request_retry(self, seq: int) -> None:
        """As an operator does."""
        self.letters[str(uuid.UUID(int=seq))].retry_requested = True

    async def release_dead_letters(self, epoch: int, *, keep: Sequence[str] = ()) -> None:
        await self._enter("release_dead_letters")
        self._require(epoch)
        for identity, letter in self.letters.items():
            if letter.status == "processing" and identity not in keep:
                letter.status, letter.claimed_epoch = "pending", None
                letter.attempts = max(letter.attempts, 1)

    async def claim_dead_letters(
        self, epoch: int, limit: int, services: Sequence[str], *, others: bool = False
    ) -> list[Item]:
        await self._enter("claim_dead_letters")
        self._require(epoch)
        claimed: list[Item] = []
        for identity, letter in sorted(
            self.letters.items(), key=lambda pair: (pair[1].attempts * (limit == 1), pair[1].seq)
        ):
            if len(claimed) < limit and (letter.service in services) != others:
                item = self.items[letter.seq - 1]
                if item is not None and self._claimable(letter, others):
                    letter.status, letter.claimed_epoch = "processing", epoch
                    claimed.append(
                        replace(
                            item,
                            dead_letter=identity,
                            domain=letter.service,
                            redelivered=letter.attempts > 0,
                            joins=None,
                            retries=letter.retries,
                            deferred=letter.resolution == "deferred",
                            overtaken=not letter.keeps_order,
                        )
                    )
        return claimed

    async def held_pairs(self) -> list[tuple[str, str]]:
        await self._enter("held_pairs")
        return list({(one.session_key, one.service) for one in self.letters.values() if one.holds})

    def _claimable(self, letter: _Letter, others: bool) -> bool:
        same = [
            one
            for one in self.letters.values()
            if (one.session_key, one.service) == (letter.session_key, letter.service) and one.open
        ]
        if letter.status != "pending" or any(one.status == "processing" for one in same):
            return False
        older = [one for one in same if one.seq < letter.seq]
        if any(one.keeps_order for one in older):
            return False
        if letter.resolution == "deferred":
            return letter.retry_requested or not others
        if letter.retry_requested:
            head = min(older, key=lambda one: one.seq, default=letter)
            return not any(one.retry_requested for one in older) and (
                others or head is letter or not self._is_due(head)
            )
        return not others and self._is_due(letter) and not older

    def _is_due(self, letter: _Letter) -> bool:
        return letter.resolution in ("no_service", "deferred") or (
            letter.due is not None and letter.due <= self._clock()
        )

    async def expire_dead_letters(self, epoch: int, max_age: timedelta) -> int:
        await self._enter("expire_dead_letters")
        self._require(epoch)
        old = [
            letter
            for letter in self.letters.values()
            if letter.status == "pending"
            and letter.resolution in (None, "deferred")
            and not letter.retry_requested
            and letter.created < self._clock() - max_age
        ]
        for letter in old:
            letter.status, letter.resolution, letter.due = "failed", "exhausted", None
            letter.keeps_order = False
        return len(old)

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
        await self._enter("log_retry_run")
        self._require(epoch)
        self.retry_runs.append(RetryRun(processed, failed, error))
        now = self._clock()
        due: dict[str, float] = {}
        for letter in self.letters.values():
            if (
                letter.status == "pending"
                and (letter.retry_requested or letter.service in services)
                and not self._waits_for_older(letter)
            ):
                waits_for_its_turn = letter.retry_requested or letter.resolution in ("no_service", "deferred")
                at = now if waits_for_its_turn else letter.due
                if at is not None:
                    seconds = (at - now).total_seconds()
                    due[letter.service] = min(seconds, due.get(letter.service, seconds))
        return due

    def _waits_for_older(self, letter: _Letter) -> bool:
        return any(
            one.open
            and (one.session_key, one.service) == (letter.session_key, letter.service)
            and one.seq < letter.seq
            and (one.keeps_order or not (letter.retry_requested or letter.resolution == "deferred"))
            for one in self.letters.values()
        )

    async def load_sessions(self, keys: Sequence[str]) -> Mapping[str, tuple[Session, datetime]]:
        await self._enter("load_sessions")
        return {key: self.sessions[key] for key in keys if key in self.sessions}


class Talk:
    """Routes by what a text says: `rides: ...` goes to rides, `menu` is answered by the router. `crash`
    maps a text to how often deciding it crashes."""

    def __init__(self) -> None:
        self.crash: Counter[str] = Counter()
        self.sessions: list[tuple[str, Session]] = []  # what each decision saw

    def decide(self, item: Item, session: Session) -> Route:
        text = str(item.message["text"]["body"])
        self.sessions.append((text, session))
        if self.crash[text] > 0:
            self.crash[text] -= 1
            raise ArithmeticError(text)
        if text.startswith(("menu", "exit")):
            return Route("menu", None, "the whole text", (Reply("the menu"),), leave=text.startswith("exit"))
        return Route("keyword", text.split(":")[0], "a keyword")


class Counterpart:
    """A service's other end. `script` maps a text to what its attempts bring, one after the other: an
    outcome, an exception, or seconds of silence. `takes` is how long an attempt lasts."""

    def __init__(self, *, takes: float = 0.0) -> None:
        self.takes = takes
        self.script: defaultdict[str, deque[object]] = defaultdict(deque)
        self.seen: list[Envelope] = []
        self.open_lanes = 0

    @asynccontextmanager
    async def lane(self) -> AsyncIterator[Counterpart]:
        self.open_lanes += 1
        try:
            yield self
        finally:
            self.open_lanes -= 1

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        self.seen.append(envelope)
        scripted = self.script[envelope.text].popleft() if self.script[envelope.text] else Ack()
        await trio.sleep(scripted if isinstance(scripted, float) else self.takes)
        if isinstance(scripted, BaseException):
            raise scripted
        if isinstance(scripted, Ack | Retry | Reject | Unreadable):
            return scripted
        return Ack()

    @property
    def texts(self) -> list[str]:
        return [envelope.text for envelope in self.seen]


def virtual_now() -> datetime:
    """The autojump clock's time as a date."""
    return START + timedelta(seconds=trio.current_time())


STAYS_CLOSED = Trips(1_000, failure_ratio=2)


def service(
    name: str, open_lane: OpenLane, *, lanes: int = 1, trips: Trips = STAYS_CLOSED, **changes: Any
) -> Service:
    """A service whose dead letters are retried fast. The random source is 1."""
    policy = Backoff(lambda: 1.0)
    arguments: dict[str, Any] = {
        "open_lane": open_lane,
        "concurrency": Concurrency(lanes, lanes),
        "waiting": 10,
        "timeout": 4.0,
        "deadline": 15.0,
        "policy": policy,
        "redelivery": REDELIVERY["fast"],
        "strict": False,
        "paused": False,
        "statistics": ServiceStatistics(),
        "breaker": Breaker(
            trips,
            pause=policy.pause,
            clock=trio.current_time,
            on_change=lambda: None,
        ),
        "may_attempt": lambda: True,
        "on_taken": lambda name, room: None,
    }
    return Service(name, **arguments | changes)


def service_spec(name: str, open_lane: OpenLane, **changes: Any) -> ServiceSpec:
    """A service whose dead letters are retried fast, and whose breaker stays closed."""
    spec = ServiceSpec(
        name=name,
        open_lane=open_lane,
        lanes=1,
        least_lanes=1,
        timeout=14,
        deadline=15,
        waiting=5,
        redelivery=REDELIVERY["fast"],
        strict=False,
        paused=False,
        statuses=False,
        trips=STAYS_CLOSED,
    )
    return replace(spec, **changes)


def tree_spec(journal: MemoryJournal, *services: ServiceSpec, **changes: Any) -> TreeSpec:
    """A small delivering side. The random source is 1."""
    spec = TreeSpec(
        sender=None,
        janitor=None,
        statuses=MemoryStatuses(),
        journal=journal,
        routes=Talk(),
        services=lambda: services,
        retry=Backoff(lambda: 1.0),
        clock=lambda: START,
        session_ttl=timedelta(hours=24),
        dead_letter_max_age=timedelta(hours=48),
        session_mailbox=4,
        max_live_sessions=10,
        backlog_limit=100,
        completer_capacity=10,
        completer_max_rows=10,
        session_idle=5,
        sweep_every=60,
        erasures=lambda: 0,
        report=lambda name, error: None,
        on_breaker=lambda name, breaker: None,
        on_statuses_given_up=lambda name, count: None,
    )
    return replace(spec, **changes)


class Rig:
    """Completer, services, sessions and dispatcher on a MemoryJournal, wired as the tree wires them."""

    def __init__(
        self,
        *,
        services: tuple[str, ...] = ("rides", "jobs"),
        takes: float = 0.0,
        lanes: int = 1,
        waiting: int = 10,
        hold: int = 4,
        max_live: int = 10,
        max_backlog: int = 1_000,
        idle: float = 10.0,
        sweep_every: float = 1_000.0,
        timeout: float = 4.0,
        deadline: float = 15.0,
        strict: bool = False,
        breaker_failures: int = 1_000,
        patience: float = float("inf"),
    ) -> None:
        self.journal = MemoryJournal()
        self.deferrals = Deferrals(self.journal)
        self.routes = Talk()
        self.counterparts = {name: Counterpart(takes=takes) for name in services}
        self.completer: Address[Completion] = Address("completer", 100)
        self.crashes: list[tuple[str, Exception]] = []
        self.lost: list[Item] = []
        self.held_lease = True
        self.erasures = 0
        self.now = START
        self.services = {
            name: service(
                name,
                counterpart.lane,
                lanes=lanes,
                waiting=waiting,
                timeout=timeout,
                deadline=deadline,
                strict=strict,
                trips=Trips(breaker_failures, failure_ratio=2),
                may_attempt=lambda: self.held_lease,
                on_taken=lambda service, room: self.dispatcher.taken(service, room),
            )
            for name, counterpart in self.counterparts.items()
        }
        self._versions = count(1)
        self.dispatcher = Dispatcher(
            self.journal,
            make=self.make_session,
            hold=hold,
            max_live=max_live,
            max_backlog=max_backlog,
            idle=idle,
            sweep_every=sweep_every,
            on_crash=lambda key, crash: self.crashes.append((key, crash)),
            on_replay_lost=self.lost.append,
            patience=lambda service: patience,
        )

    def make_session(self, key: str) -> SessionActor:
        return SessionActor(
            key,
            load=self.load,
            routes=self.routes,
            services=self.services,
            completer=self.completer,
            conversations=self.dispatcher,
            deferrals=self.deferrals,
            committed=self.dispatcher.until_committed,
            next_version=lambda: next(self._versions),
            session_ttl=timedelta(hours=24),
            erasures=lambda: self.erasures,
            clock=lambda: self.now,
        )

    async def load(self, key: str) -> Session | None:
        found = (await self.journal.load_sessions([key])).get(key)
        return found[0] if found is not None else None

    def say(self, *texts: str, sender: str = "1", user_id: str | None = None, fed: bool = True) -> Appended:
        """A flush of one text each, committed and, if `fed`, given to the dispatcher."""
        return self.flush([(sender, text) for text in texts], user_id=user_id, fed=fed)

    def flush(
        self, said: Sequence[tuple[str, str]], *, user_id: str | None = None, fed: bool = True
    ) -> Appended:
        messages = [
            replace(
                incoming(f"{len(self.journal.items)}-{number}", sender, user_id=user_id),
                message={"type": "text", "text": {"body": text}},
            )
            for number, (sender, text) in enumerate(said)
        ]
        result = self.journal.commit([delivery(*messages)])
        assert isinstance(result, Appended)
        if fed:
            self.feed(result)
        return result

    def feed(self, result: Appended) -> None:
        last = result.first_seq + len(result.session_keys) - 1
        items = [item for item in self.journal.items[result.first_seq - 1 : last] if item is not None]
        self.dispatcher.feed(result.first_seq, last, items)

    def replay_of(self, seq: int, domain: str) -> Item:
        """A claimed dead letter, as the retrier offers it."""
        item = self.journal.items[seq - 1]
        assert item is not None
        return replace(
            item,
            dead_letter=str(uuid.UUID(int=seq)),
            domain=domain,
            redelivered=True,
            overtaken=True,
            joins=None,
        )

    def decided(self, sender: str | None = None) -> list[str]:
        """The texts of completed items, in the order of their commits."""
        return [
            str(done.item.message["text"]["body"])
            for done in self.journal.outcomes.values()
            if sender is None or done.item.wa_id == sender
        ]

    @asynccontextmanager
    async def running(self, *, patience: float = 10_000.0) -> AsyncIterator[Rig]:
        completer = Completer(
            self.journal,
            epoch=1,
            marks=self.dispatcher.marks,
            on_committed=self.dispatcher.committed,
            on_unavailable=lambda error: None,
            max_rows=10,
        )
        services = Supervisor(
            "services",
            [ChildSpec(one.name, one.run, one.address.mailbox.close) for one in self.services.values()],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=1_000,
            period=1,
            on_crash=lambda name, crash: self.crashes.append((name, crash)),
        )
        with trio.fail_after(patience):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.completer.run, completer)
                await nursery.start(services.run)
                nursery.start_soon(self.dispatcher.run)
                await trio.testing.wait_all_tasks_blocked()
                yield self
                nursery.cancel_scope.cancel()

    async def finish(self) -> None:
        """Wait until every message that the journal has is completed and nothing is remembered of it."""
        while self._unfinished() or self.dispatcher.statistics().undelivered:  # noqa: ASYNC110  # virtual time
            await trio.sleep(0.25)

    def _unfinished(self) -> bool:
        return any(item is not None and item.seq not in self.journal.outcomes for item in self.journal.items)
