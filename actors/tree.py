"""The delivering side of one epoch: which actors there are, started downstream first, drained upstream
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count

import trio

from .breaker import Breaker, Trips
from .completer import Completer
from .deferrals import Deferrals
from .dispatcher import Dispatcher
from .errors import JournalUnavailable, LeaseLost
from .janitor import Janitor, NextTime, Work
from .kernel import Address, ChildSpec, Strategy, Supervisor
from .loader import Load, SessionLoader
from .messages import Completion, Item, Session
from .outbound import OpenSender, Outbound
from .ports import (
    Clock,
    JobLog,
    Journal,
    Outbox,
    ResendPolicy,
    RetryPolicy,
    RoutePolicy,
    StatusLog,
)
from .retrier import Retrier
from .service import Service
from .services import Services, ServiceSpec
from .session import SessionActor
from .status_relay import StatusRelay


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderSpec:
    """Where replies go: times in seconds. `breaker_failures` attempts that fail in a row open its breaker."""

    outbox: Outbox
    open_sender: OpenSender
    lanes: int
    timeout: float
    max_age: timedelta
    policy: ResendPolicy
    breaker_failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JanitorSpec:
    """Which jobs this process can do, and where it is written down when each is due."""

    log: JobLog
    work: Mapping[str, Work]
    next_time: NextTime


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSpec:
    """What a delivering side is made of. `session_mailbox` is K; `report(event, error)` gets crashes and
    trouble with the journal, `on_breaker` a service, or "sender", whose breaker has changed. Without a
    `sender` replies stay where they are, without a `janitor` no job is done. `services` are those of now:
    whoever changes them says so, and a spec that is another object is another service. `erasures`: how many
    times persons were erased, or may have been, since this process began; what is remembered from before is
    read again. `on_statuses_given_up` gets a service, and how many statuses it could not be told in time.
    """

    journal: Journal
    sender: SenderSpec | None
    janitor: JanitorSpec | None
    statuses: StatusLog
    routes: RoutePolicy
    services: Callable[[], Iterable[ServiceSpec]]
    retry: RetryPolicy
    clock: Clock
    session_ttl: timedelta
    dead_letter_max_age: timedelta
    session_mailbox: int
    max_live_sessions: int
    backlog_limit: int
    completer_capacity: int
    completer_max_rows: int
    session_idle: float
    sweep_every: float
    erasures: Callable[[], int]
    report: Callable[[str, Exception], None]
    on_breaker: Callable[[str, Breaker], None]
    on_statuses_given_up: Callable[[str, int], None]


class DeliveryTree:
    """completer <- services <- sessions <- dispatcher. A crash of one restarts what was started after
    it: the dispatcher then reads from the journal again what is undelivered. Behind them, and no concern of
    theirs, replies are sent from the outbox, and the janitor does its jobs.
    """

    def __init__(
        self,
        spec: TreeSpec,
        *,
        epoch: int,
        may_attempt: Callable[[], bool],
        on_lease_lost: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._epoch = epoch
        self._may_attempt = may_attempt
        self._on_lease_lost = on_lease_lost
        self._versions = count((epoch << 40) + 1)  # they never repeat: no epoch makes 2**40 changes
        self.completer: Address[Completion] = Address("completer", spec.completer_capacity)
        self._loader: Address[Load] = Address("session-loader", spec.max_live_sessions)
        self._services = Services(
            spec.services,
            retry=spec.retry,
            may_attempt=may_attempt,
            on_taken=self._taken,
            on_breaker=self._breaker_changed,
            report=spec.report,
        )
        self._deferrals = Deferrals(spec.journal)
        self._draining: set[str] = set()  # children that were asked to finish, also those not there yet
        self.dispatcher: Dispatcher | None = None
        self._retrier: Retrier | None = None
        self.outbound: Outbound | None = None
        self._janitor: Janitor | None = None
        self._status_relay: StatusRelay | None = None
        self._end_of_jobs = trio.CancelScope()
        self._end_of_statuses = trio.CancelScope()
        self._supervisor = Supervisor(
            "delivery",
            [
                ChildSpec(
                    "completer", self._run_completer, self.completer.mailbox.close, self.completer.bury
                ),
                ChildSpec("services", self._services.run, self._services.drain),
                ChildSpec("session-loader", self._run_loader, self._loader.mailbox.close, self._loader.bury),
                ChildSpec("dispatcher", self._run_dispatcher, self._close_dispatcher),
            ],
            strategy=Strategy.REST_FOR_ONE,
            max_restarts=5,
            period=60,
            on_crash=spec.report,
        )

    @property
    def services(self) -> Mapping[str, Service]:
        """Those of now, by name."""
        return self._services.running

    async def run(self) -> None:
        """Until drained; raises RestartIntensityExceeded when it cannot be kept running."""
        async with trio.open_nursery() as nursery:
            if self._spec.sender is not None:
                nursery.start_soon(self._supervise_outbound, self._spec.sender)
            if self._spec.janitor is not None:
                nursery.start_soon(self._supervise_janitor, self._spec.janitor)
            nursery.start_soon(self._supervise_statuses)
            await self._supervisor.run()
            self._drain_outbound()
            self._end_of_jobs.cancel()
            self._end_of_statuses.cancel()

    async def drain(self) -> None:
        """Sessions finish what they hold, services what they took, the completer what both left."""
        await self._supervisor.drain()

    def feed(self, first: int, last: int, items: list[Item]) -> None:
        if self.dispatcher is not None:
            self.dispatcher.feed(first, last, items)

    def look(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.look()

    def replay(self) -> None:
        """Somebody asked for dead letters to be retried."""
        if self._retrier is not None:
            self._retrier.wake()

    def look_at_outbox(self) -> None:
        """A service has put something there by itself."""
        if self.outbound is not None:
            self.outbound.committed()

    def look_at_statuses(self) -> None:
        """There are some that a service is to be told."""
        if self._status_relay is not None:
            self._status_relay.wake()

    def look_at_jobs(self) -> None:
        """A job was switched, or somebody asked for a run."""
        if self._janitor is not None:
            self._janitor.wake()

    async def _supervise_janitor(self, spec: JanitorSpec) -> None:
        """A drain does not wait for jobs: whatever they do can be interrupted and done again."""
        supervisor = Supervisor(
            "janitor",
            [ChildSpec("janitor", partial(self._run_janitor, spec), self._end_of_jobs.cancel)],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=5,
            period=60,
            on_crash=self._spec.report,
        )
        with self._end_of_jobs:
            await supervisor.run()

    async def _run_janitor(self, spec: JanitorSpec) -> None:
        self._janitor = Janitor(
            spec.log,
            epoch=self._epoch,
            work=spec.work,
            next_time=spec.next_time,
            clock=self._spec.clock,
            report=self._spec.report,
        )
        try:
            await self._janitor.run()
        except* LeaseLost:
            self._on_lease_lost()

    async def _supervise_statuses(self) -> None:
        """A drain does not wait for them: what was told and is not on record is told again."""
        supervisor = Supervisor(
            "statuses",
            [ChildSpec("statuses", self._run_statuses, self._end_of_statuses.cancel)],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=5,
            period=60,
            on_crash=self._spec.report,
        )
        with self._end_of_statuses:
            await supervisor.run()

    async def _run_statuses(self) -> None:
        self._status_relay = StatusRelay(
            self._spec.statuses,
            epoch=self._epoch,
            services=lambda: self.services,
            wanted=lambda: [spec.name for spec in self._spec.services() if spec.statuses],
            clock=self._spec.clock,
            on_unavailable=partial(self._spec.report, "statuses"),
            given_up=self._spec.on_statuses_given_up,
        )
        try:
            await self._status_relay.run()
        except* LeaseLost:
            self._on_lease_lost()

    async def _supervise_outbound(self, spec: SenderSpec) -> None:
        supervisor = Supervisor(
            "outbound",
            [ChildSpec("outbound", partial(self._run_outbound, spec), self._drain_outbound)],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=5,
            period=60,
            on_crash=self._spec.report,
        )
        await supervisor.run()

    async def _run_outbound(self, spec: SenderSpec) -> None:
        self.outbound = Outbound(
            spec.outbox,
            epoch=self._epoch,
            open_sender=spec.open_sender,
            lanes=spec.lanes,
            timeout=spec.timeout,
            max_age=spec.max_age,
            policy=spec.policy,
            breaker=Breaker(
                Trips(spec.breaker_failures),
                pause=self._spec.retry.pause,
                clock=trio.current_time,
                on_change=self._sender_breaker_changed,
            ),
            may_attempt=self._may_attempt,
            clock=self._spec.clock,
            on_unavailable=partial(self._spec.report, "outbox"),
        )
        if "outbound" in self._draining:
            self.outbound.drain()
        try:
            await self.outbound.run()
        except* LeaseLost:
            self._on_lease_lost()

    def _drain_outbound(self) -> None:
        self._draining.add("outbound")
        if self.outbound is not None:
            self.outbound.drain()

    def _sender_breaker_changed(self) -> None:
        if self.outbound is not None:
            self._spec.on_breaker("sender", self.outbound.breaker)

    async def _run_completer(self) -> None:
        completer = Completer(
            self._spec.journal,
            epoch=self._epoch,
            marks=self._marks,
            on_committed=self._committed,
            on_unavailable=self._unavailable,
            max_rows=self._spec.completer_max_rows,
        )
        try:
            await self.completer.run(completer)
        except LeaseLost:
            self._on_lease_lost()
            await trio.sleep_forever()  # the owner ends this tree

    def change_services(self) -> None:
        """They are others now: whoever waits for one of them hears of it."""
        changed = self._services.change()
        if not changed:
            return
        if self._retrier is not None:
            self._retrier.change_services()
        if self._status_relay is not None:
            self._status_relay.change_services()
        if self.dispatcher is not None:
            for name in changed:
                service = self.services.get(name)
                self.dispatcher.replaced(name, None if service is None or service.paused else service.room)

    async def _run_loader(self) -> None:
        await self._loader.run(
            SessionLoader(self._spec.journal, session_ttl=self._spec.session_ttl, clock=self._spec.clock)
        )

    async def _run_dispatcher(self) -> None:
        spec = self._spec
        retrier = Retrier(
            spec.journal,
            epoch=self._epoch,
            services=self.services,
            deferrals=self._deferrals,
            max_age=spec.dead_letter_max_age,
            offer=lambda item: dispatcher.replay(item),
        )
        dispatcher = Dispatcher(
            spec.journal,
            make=lambda key: self._make_session(key, dispatcher),
            hold=spec.session_mailbox,
            max_live=spec.max_live_sessions,
            max_backlog=spec.backlog_limit,
            idle=spec.session_idle,
            sweep_every=spec.sweep_every,
            on_crash=lambda key, error: spec.report("session", error),
            on_replay_lost=retrier.lost,
            patience=self._patience,
        )
        self.dispatcher, self._retrier = dispatcher, retrier
        if "dispatcher" in self._draining:
            dispatcher.close()
        await self._deferrals.load()  # no message goes past one that waits
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_retrier, retrier)
            await dispatcher.run()
            nursery.cancel_scope.cancel()

    async def _run_retrier(self, retrier: Retrier) -> None:
        try:
            await retrier.run()
        except* LeaseLost:
            self._on_lease_lost()

    def _make_session(self, key: str, dispatcher: Dispatcher) -> SessionActor:
        return SessionActor(
            key,
            load=self._load,
            routes=self._spec.routes,
            services=self.services,
            completer=self.completer,
            conversations=dispatcher,
            deferrals=self._deferrals,
            committed=dispatcher.until_committed,
            next_version=lambda: next(self._versions),
            session_ttl=self._spec.session_ttl,
            erasures=self._spec.erasures,
            clock=self._spec.clock,
        )

    async def _load(self, key: str) -> Session | None:
        return await self._loader.ask(lambda promise: Load(key, promise))

    def _close_dispatcher(self) -> None:
        self._draining.add("dispatcher")
        if self.dispatcher is not None:
            self.dispatcher.close()

    def _patience(self, name: str) -> float:
        """Nobody stands in line for a service that is gone."""
        service = self.services.get(name)
        return 0.0 if service is None or service.paused else service.patience

    def _taken(self, service: str, room: int) -> None:
        if self.dispatcher is not None:
            self.dispatcher.taken(service, room)

    def _breaker_changed(self, name: str, breaker: Breaker) -> None:
        self._spec.on_breaker(name, breaker)
        wait = breaker.probe_in()
        if self._retrier is not None and wait is not None:
            self._retrier.due_in(wait)

    def _marks(self) -> tuple[int, list[int]]:
        return self.dispatcher.marks() if self.dispatcher is not None else (0, [])

    def _committed(self, completions: list[Completion], stragglers: list[int]) -> None:
        if self.dispatcher is not None:
            self.dispatcher.committed(completions, stragglers)
        self._deferrals.committed(completions)
        if self.outbound is not None and any(completion.replies for completion in completions):
            self.outbound.committed()
        if self._retrier is not None:
            self._retrier.committed(completions)

    def _unavailable(self, error: JournalUnavailable) -> None:
        self._spec.report("completer", error)
