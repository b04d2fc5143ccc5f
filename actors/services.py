"""The services of one epoch, each an actor of its own. One that becomes another is replaced: the new actor
has the name from then on, the old one begins no more attempts and finishes those that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from .breaker import Breaker, Trips
from .concurrency import Concurrency
from .kernel import ChildSpec, Strategy, Supervisor
from .ports import RedeliveryPolicy, RetryPolicy
from .service import OpenLane, Service, ServiceStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """One service: times in seconds; `waiting` deliveries wait for a lane, more stay in the journal. Between
    `least_lanes` and `lanes` attempts run at once. `trips` opens its breaker; `strict`: a conversation waits
    behind its dead letters; `paused`: nothing is attempted, and what comes for it waits. With `statuses` it
    is told what became of the messages that it sent.
    """

    name: str
    open_lane: OpenLane
    lanes: int
    least_lanes: int
    timeout: float
    deadline: float
    waiting: int
    redelivery: RedeliveryPolicy
    strict: bool
    paused: bool
    statuses: bool
    trips: Trips


class Services:
    """`wanted` gives the specs of now; one that is another object is another service. `on_breaker` gets a
    service whose breaker has changed, unless it was replaced. A service's statistics outlive its actor.
    """

    def __init__(
        self,
        wanted: Callable[[], Iterable[ServiceSpec]],
        *,
        retry: RetryPolicy,
        may_attempt: Callable[[], bool],
        on_taken: Callable[[str, int], None],
        on_breaker: Callable[[str, Breaker], None],
        report: Callable[[str, Exception], None],
    ) -> None:
        self.running: dict[str, Service] = {}
        self._wanted = wanted
        self._retry = retry
        self._may_attempt = may_attempt
        self._on_taken = on_taken
        self._on_breaker = on_breaker
        self._report = report
        self._specs: dict[str, ServiceSpec] = {}
        self._statistics: dict[str, ServiceStatistics] = {}
        self._nursery: trio.Nursery | None = None
        self._drained = trio.Event()

    async def run(self) -> None:
        """Until drained. Services anew: the mailboxes of those before are buried."""
        self.running = {}
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for spec in self._wanted():
                    self._start(nursery, spec)
                if self._drained.is_set():
                    self.drain()
                await self._drained.wait()
        finally:
            self._nursery = None

    def drain(self) -> None:
        self._drained.set()
        for service in self.running.values():
            service.drain()

    def change(self) -> list[str]:
        """Be as is wanted now; returns the names of those that are others, gone or new. Who waits for one of
        them is sent to whoever has its name now."""
        nursery = self._nursery
        if nursery is None or self._drained.is_set():
            return []  # they are read when they start
        wanted = {spec.name: spec for spec in self._wanted()}
        added = [name for name in wanted if name not in self.running]
        changed = [name for name in self.running if wanted.get(name) is not self._specs[name]]
        for name in changed:
            self.running.pop(name).retire()
        for spec in wanted.values():
            if spec.name not in self.running:
                self._start(nursery, spec)
        return changed + added

    def _start(self, nursery: trio.Nursery, spec: ServiceSpec) -> None:
        name = spec.name
        breaker = Breaker(
            spec.trips,
            pause=self._retry.pause,
            clock=trio.current_time,
            on_change=lambda: self._breaker_changed(service),
        )
        service = Service(
            name,
            open_lane=spec.open_lane,
            concurrency=Concurrency(spec.least_lanes, spec.lanes),
            waiting=spec.waiting,
            timeout=spec.timeout,
            deadline=spec.deadline,
            policy=self._retry,
            redelivery=spec.redelivery,
            strict=spec.strict,
            paused=spec.paused,
            breaker=breaker,
            statistics=self._statistics.setdefault(name, ServiceStatistics()),
            may_attempt=self._may_attempt,
            on_taken=self._on_taken,
        )
        self.running[name] = service
        self._specs[name] = spec
        nursery.start_soon(self._supervise, service, name=f"services/{name}")

    async def _supervise(self, service: Service) -> None:
        supervisor = Supervisor(
            service.name,
            [ChildSpec(service.name, service.run, service.drain, service.address.bury)],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=20,
            period=60,
            on_crash=self._report,
        )
        await supervisor.run()

    def _breaker_changed(self, service: Service) -> None:
        if self.running.get(service.name) is service:
            self._on_breaker(service.name, service.breaker)
