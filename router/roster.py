"""The services of this moment: what routes to them, how each is reached, and what changes when the
configuration file or an operator says otherwise. One that is as it was keeps its actor, its connections and
its breaker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import trio

from actors.breaker import Breaker, Trips
from actors.histogram import HistogramSnapshot
from actors.messages import Item, Session
from actors.ports import Clock, RetryPolicy, Route
from actors.service import OpenLane, Service
from actors.services import ServiceSpec
from router.config import Config, ServiceConfig
from router.delivery import in_process
from router.delivery.attached import AttachedService
from router.delivery.contract import KnownDomain
from router.delivery.in_process import HandlerFunction
from router.delivery.variants import Canary, Shadow, ShadowStatistics
from router.home_menu import HomeMenu
from router.observe.logs import get_logger
from router.registry import Closed, Credentials, Registry, ServiceVersion, registry_of
from router.retry import REDELIVERY
from router.routing import Routes

_NEVER = datetime.min.replace(tzinfo=UTC)

_log = get_logger("postroom.services")


class OpenHttpLane(Protocol):
    """Lanes to a URL; without `secret` nothing is signed."""

    def __call__(
        self,
        url: str,
        secret: str | None,
        *,
        allow_private: bool,
        shadow: bool,
        known_domain: KnownDomain,
    ) -> OpenLane: ...


@dataclass(frozen=True, slots=True)
class _Reached:
    """How a service is reached, made of exactly this configuration."""

    service: ServiceConfig
    spec: ServiceSpec
    canary: Canary | None = None
    shadow: Shadow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """How one service is, for health and the live view. `breaker`: closed, open or half-open. `lanes`:
    attempts that may run at once now; `attempts`, `failures` and `latency` are counted since this process
    began to deliver.
    """

    state: str
    version: int
    breaker: str
    breaker_reason: str
    lanes: int
    attempts: int
    failures: int
    latency: HistogramSnapshot
    canary: CanaryStatus | None
    shadow: ShadowStatistics | None


@dataclass(frozen=True, slots=True)
class CanaryStatus:
    """`attempts` and `failures` since it was set."""

    breaker: str
    attempts: int
    failures: int


class Roster:
    """`handlers` are services in process, by domain: they go before a URL in the configuration, and a URL
    from an operator goes before them.
    """

    def __init__(
        self,
        config: Config,
        handlers: Mapping[str, HandlerFunction],
        *,
        open_http_lane: OpenHttpLane,
        retry: RetryPolicy,
        clock: Clock,
        on_breaker: Callable[[str, Breaker], None],
    ) -> None:
        self.attached: dict[str, AttachedService] = {}
        self.credentials: Mapping[str, str] = {}
        """The services by the SHA-256 of the token that each has."""
        self._config = config
        self._handlers = handlers
        self._open_http_lane = open_http_lane
        self._retry = retry
        self._clock = clock
        self._on_breaker = on_breaker
        self._versions: tuple[ServiceVersion, ...] = ()
        self._credentials: Mapping[str, Credentials] = {}
        self._reported: set[tuple[str, int]] = set()  # versions that cannot be used
        self._reached: dict[str, _Reached] = {}
        self._changed = trio.Event()
        self.registry = registry_of(config, (), {})
        self._routes = Routes(config.routing, self.registry.services)
        self._closed: Mapping[str, Closed] = {}
        self._closed_until = _NEVER  # who was accepted later has nothing to do with these
        self._taken_out: dict[str, Closed] = {}  # of the configuration, when it was read again
        self._earlier: dict[frozenset[str], Routes] = {}  # by the services that were open still
        self._follow(self.registry)

    # What the router asks

    def decide(self, item: Item, session: Session) -> Route:
        if item.received_at < self._closed_until:
            was_open = frozenset(
                name for name, closed in self._closed.items() if item.received_at < closed.since
            )
            return self._routes_with(was_open).decide(item, session)
        return self._routes.decide(item, session)

    def _routes_with(self, was_open: frozenset[str]) -> Routes:
        """As they were for a message that was accepted before these were closed."""
        routes = self._earlier.get(was_open)
        if routes is None:
            services = dict(self.registry.services) | {name: self._closed[name].service for name in was_open}
            routes = self._earlier[was_open] = Routes(self._config.routing, services, self._routes.menu)
        return routes

    def specs(self) -> Iterable[ServiceSpec]:
        return [reached.spec for reached in self._reached.values()]

    def is_domain(self, name: str) -> bool:
        return name in self.registry.services

    def use_menu(self, menu: HomeMenu) -> None:
        self._routes.menu = menu
        self._earlier.clear()

    async def until_changed(self) -> None:
        """Return when `use` or `reload` has changed something."""
        await self._changed.wait()

    def statistics(self, running: Mapping[str, Service]) -> dict[str, ServiceStatus]:
        """Of the services that run in the delivering side of this moment."""
        return {
            name: self._status(self._reached[name], service)
            for name, service in running.items()
            if name in self._reached
        }

    def _status(self, reached: _Reached, service: Service) -> ServiceStatus:
        canary, shadow = reached.canary, reached.shadow
        return ServiceStatus(
            state=reached.service.state,
            version=self.registry.versions.get(service.name, 0),
            breaker=str(service.breaker.state),
            breaker_reason=service.breaker.reason,
            lanes=service.concurrency.limit,
            attempts=service.statistics.attempts,
            failures=service.statistics.failures,
            latency=service.statistics.latency.snapshot(),
            canary=None
            if canary is None
            else CanaryStatus(
                str(canary.breaker.state), canary.statistics.attempts, canary.statistics.failures
            ),
            shadow=None if shadow is None else replace(shadow.statistics),
        )

    # What changes them

    def use(self, versions: Iterable[ServiceVersion], credentials: Mapping[str, Credentials]) -> bool:
        """What the database says now; whether that changes anything."""
        self._versions = tuple(versions)
        self._credentials = credentials
        return self._apply()

    def reload(self, config: Config) -> bool:
        """What the configuration file says now of services and routing; whether that changes anything."""
        changed = config.routing != self._config.routing
        now, before = self._clock(), self._config.services
        for name in before.keys() | config.services.keys():
            is_open, was_open = (_is_open(services.get(name)) for services in (config.services, before))
            if is_open:
                self._taken_out.pop(name, None)
            elif was_open:
                self._taken_out[name] = Closed(before[name], now)
        self._config = config
        return self._apply(changed)

    def _apply(self, changed: bool = False) -> bool:
        registry = registry_of(self._config, self._versions, self._credentials)
        for one in registry.unusable:
            if (one.service, one.version) not in self._reported:
                self._reported.add((one.service, one.version))
                problems = [str(problem) for problem in one.problems]
                _log.error(
                    "a version cannot be used", service=one.service, version=one.version, problems=problems
                )
        before, self.registry = self.registry, registry
        if not changed and (registry.services, registry.closed) == (before.services, before.closed):
            return False
        for name in sorted(before.services.keys() | registry.services.keys()):
            if before.services.get(name) != registry.services.get(name):
                now = registry.services.get(name)
                state = "removed" if now is None else now.state
                version = registry.versions.get(name, 0)
                _log.info("a service has changed", service=name, state=state, version=version)
        self._closed = {
            name: closed
            for name, closed in self._taken_out.items()
            if not _is_open(registry.services.get(name))
        } | dict(registry.closed)
        self._closed_until = max((closed.since for closed in self._closed.values()), default=_NEVER)
        removed = self._closed.keys() - registry.services.keys()
        self._routes = Routes(self._config.routing, registry.services, self._routes.menu, removed=removed)
        self._earlier.clear()
        self._follow(registry)
        self._changed.set()
        self._changed = trio.Event()
        return True

    def _follow(self, registry: Registry) -> None:
        self.credentials = {
            service.credential: name
            for name, service in registry.services.items()
            if service.credential is not None
        }
        self._follow_attached(registry.services)
        reached: dict[str, _Reached] = {}
        for name, service in registry.services.items():
            known = self._reached.get(name)
            if known is not None and known.service == service:
                reached[name] = known
            elif (made := self._reach(service)) is not None:
                reached[name] = made
        self._reached = reached

    def _follow_attached(self, services: Mapping[str, ServiceConfig]) -> None:
        """Changed in place: who listens has it. Connections stay for as long as the token is the same."""
        wanted = {
            name: service.credential
            for name, service in services.items()
            if service.attaches and name not in self._handlers
        }
        for name, one in list(self.attached.items()):
            if wanted.get(name) != one.credential:
                self.attached.pop(name).ended.set()
        for name, credential in wanted.items():
            if name not in self.attached and credential is not None:
                self.attached[name] = AttachedService(name, credential, known_domain=self.is_domain)

    def _reach(self, service: ServiceConfig) -> _Reached | None:
        """None: nobody serves the domain."""
        name = service.name
        function = self._handlers.get(name)
        if function is not None and not self._is_elsewhere(service):
            lane = in_process.open_lane(name, function, self.is_domain)
        elif service.attaches:
            lane = self.attached[name].open_lane()
        elif service.url is not None:
            return self._over_http(service, service.url)
        else:
            return None
        return _Reached(service, _spec(service, lane))

    def _is_elsewhere(self, service: ServiceConfig) -> bool:
        """An operator gave it a URL, which the configuration does not have."""
        configured = self._config.services.get(service.name)
        return service.url is not None and (configured is None or configured.url != service.url)

    def _over_http(self, service: ServiceConfig, url: str) -> _Reached:
        lane = self._lane_to(service, "url", url)
        timeout = service.timeout_ms / 1000
        canary = shadow = None
        if service.canary_url is not None:
            name = f"{service.name} canary"
            breaker = Breaker(
                _trips(service),
                pause=self._retry.pause,
                clock=trio.current_time,
                on_change=lambda: self._on_breaker(name, breaker),
            )
            to_canary = self._lane_to(service, "canary_url", service.canary_url)
            canary = Canary(service.name, service.canary_share, to_canary, breaker=breaker)
            lane = canary.beside(lane)
        if service.shadow_url is not None:
            to_shadow = self._lane_to(service, "shadow_url", service.shadow_url, shadow=True)
            shadow = Shadow(service.name, service.shadow_share, to_shadow, timeout=timeout)
            lane = shadow.beside(lane)
        return _Reached(service, _spec(service, lane), canary, shadow)

    def _lane_to(self, service: ServiceConfig, field: str, url: str, *, shadow: bool = False) -> OpenLane:
        return self._open_http_lane(
            url,
            service.secret,
            allow_private=service.is_private_allowed(field),
            shadow=shadow,
            known_domain=self.is_domain,
        )


def _is_open(service: ServiceConfig | None) -> bool:
    """Whether new conversations get to it."""
    return service is not None and service.state != "draining"


def _spec(service: ServiceConfig, lane: OpenLane) -> ServiceSpec:
    return ServiceSpec(
        name=service.name,
        open_lane=lane,
        lanes=service.lanes,
        least_lanes=service.lanes_min,
        timeout=service.timeout_ms / 1000,
        deadline=service.deadline_ms / 1000,
        waiting=max(2 * service.lanes, 16),
        redelivery=REDELIVERY[service.dead_letters],
        strict=service.order == "strict",
        paused=service.state == "paused",
        statuses=service.statuses,
        trips=_trips(service),
    )


def _trips(service: ServiceConfig) -> Trips:
    return Trips(
        service.breaker_failures,
        failure_ratio=service.breaker_failure_ratio,
        slow_after=None if service.breaker_slow_ms is None else service.breaker_slow_ms / 1000,
        slow_ratio=service.breaker_slow_ratio,
    )
