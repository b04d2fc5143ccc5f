"""open_router(): the one file that names concrete adapters and puts them together."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import trio

from actors.breaker import Breaker, BreakerState
from actors.errors import JournalUnavailable, SpoolUnavailable
from actors.ingress import Ingress, IngressStatistics
from actors.kernel import Address, ChildSpec, Strategy, Supervisor
from actors.messages import Delivery, Envelope, JsonObject, Spooled
from actors.outbound import OutboundStatistics
from actors.owner import Owner
from actors.ports import Clock
from actors.service import OpenLane
from actors.tree import JanitorSpec, SenderSpec, TreeSpec
from actors.unspooler import Unspooler
from router.accept import Webhooks, is_correlation_id, is_traceparent
from router.channels.tombstones import Tombstones
from router.clock import utc_now
from router.config import Config
from router.config_rules import checked
from router.database import migrate_database, open_database
from router.delivery import graph, http
from router.delivery.contract import KnownDomain
from router.delivery.in_process import HandlerFunction
from router.domains import canonical_domain
from router.home_menu import HomeMenu, MenuRow
from router.housekeeping import Housekeeping
from router.inbound import body_of
from router.observe.logs import get_logger
from router.postgres.archives import PostgresArchives
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.errors import describe
from router.postgres.jobs import PostgresJobs
from router.postgres.journal import PATIENCE, WITH_A_SPOOL, PostgresJournal
from router.postgres.lease import PostgresLease
from router.postgres.migrate import MigrationError
from router.postgres.outbox import PostgresOutbox
from router.postgres.statuses import PostgresStatuses
from router.registry import credentials_of, version_of
from router.retry import Backoff
from router.roster import Roster, ServiceStatus
from router.schedule import next_time
from router.sending import Sending, SentMessage
from router.spool.directory import SpoolDirectory

_log = get_logger("postroom")

DRAIN_SECONDS = 20.0  # a running attempt is waited for: longer than the default deadline of a delivery
CANCELLED_DRAIN_SECONDS = 5.0
# Passes of the scheduler: the answers of one flush go out, and what they bring joins the next.
_INGRESS_LINGER = 4
_SENDER_FAILURES = 5  # attempts in a row; the sender is then left alone for a while
_REFUSES_FOR = 10.0  # seconds after which only another attempt can tell
_KEEP_HOUSE_EVERY = 3_600.0
_LOOK_EVERY = 30.0  # seconds at most: what nobody told of
_REACH_EVERY = 0.2  # seconds between looks whether a database is there that was not at the start
_REACH_AT_LEAST_EVERY = 2.0


class NotStored(Exception):
    """`submit` could not make the message durable; nothing of it was stored."""


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """A snapshot for health and the live view; the truth is in the tables."""

    epoch: int | None
    ingress: IngressStatistics
    undelivered: int
    live_sessions: int
    waiting_for: Mapping[str, int]
    services: Mapping[str, ServiceStatus]
    spool_bytes: int | None  # that wait for the database; None: there is no spool
    outbound: OutboundStatistics | None  # None: replies are not sent, or not by this process
    sender_breaker: str | None
    attached: Mapping[str, int]  # service -> its connections

    @property
    def breakers(self) -> dict[str, str]:
        """By service: closed, open or half-open."""
        return {name: service.breaker for name, service in self.services.items()}


@dataclass(frozen=True, slots=True)
class DeadLetterCounts:
    """Dead letters that still move, those that failed (exhausted or rejected), and the retrier's last run."""

    open: int
    failed: int
    last_run: datetime | None
    since_last_run: timedelta | None


class Router:
    """A running router. Made by `open_router`."""

    def __init__(
        self,
        config: Config,
        handlers: Mapping[str, HandlerFunction],
        *,
        bridge: Bridge,
        dsn: Callable[[], str],
        clock: Clock,
        random_unit: Callable[[], float],
    ) -> None:
        self.config = config
        self._clock = clock
        self._epoch: int | None = None
        self._dedup_key: bytes | None = None
        self._tombstones = Tombstones()
        self._erasures = 0  # that were heard of
        self._look = trio.Event()  # at the tables of erasures, services and the menu
        self._handlers = {canonical_domain(name): function for name, function in handlers.items()}
        unknown = sorted(self._handlers.keys() - config.services.keys())
        if unknown:
            raise ValueError(
                f"handlers for domains that the configuration does not have: {', '.join(unknown)}"
            )
        self._lease = PostgresLease(
            bridge,
            dsn,
            on_journal=lambda: self._owner.look(),
            on_dead_letters=lambda: self._owner.replay(),
            on_jobs=lambda: self._owner.look_at_jobs(),
            on_erasures=self._hear_of_erasures,
            on_services=self._look_again,
            on_outbox=lambda: self._owner.look_at_outbox(),
            on_statuses=lambda: self._owner.look_at_statuses(),
        )
        limits = config.limits
        self.journal = PostgresJournal(
            bridge,
            dsn,
            clock=clock,
            # One that stood still has an epoch and no longer the lease.
            notify=lambda: not self._lease.held(),
            patience=WITH_A_SPOOL if limits.spool_max_bytes else PATIENCE,
            sends=config.sender is not None,
            on_homeless=_report_homeless,
        )
        self._jobs = PostgresJobs(bridge, dsn, clock=clock)
        session_ttl = timedelta(hours=config.session_ttl_hours)
        self._archives = PostgresArchives(bridge, dsn, clock=clock)
        housekeeping = Housekeeping(
            self._jobs,
            self.journal,
            self._archives,
            config.archive_location,
            session_ttl=session_ttl,
            clock=clock,
        )
        self._outbox = PostgresOutbox(bridge, dsn, clock=clock)
        self._statuses = PostgresStatuses(bridge, dsn, clock=clock)
        retry = Backoff(random_unit)
        self.roster = Roster(
            config,
            self._handlers,
            open_http_lane=self._open_http_lane,
            retry=retry,
            clock=clock,
            on_breaker=_report_breaker,
        )
        self._owner = Owner(
            self._lease,
            TreeSpec(
                journal=self.journal,
                sender=self._sender_spec(retry),
                janitor=JanitorSpec(log=self._jobs, work=housekeeping.work, next_time=next_time),
                statuses=self._statuses,
                routes=self.roster,
                services=self.roster.specs,
                retry=retry,
                clock=clock,
                session_ttl=session_ttl,
                dead_letter_max_age=timedelta(hours=config.delivery.dead_letter_max_age_hours),
                session_mailbox=limits.session_mailbox,
                max_live_sessions=limits.max_live_sessions,
                backlog_limit=max(limits.backlog_limit, 1),
                completer_capacity=limits.ingress_capacity,
                completer_max_rows=limits.flush_max_rows,
                session_idle=10.0,
                sweep_every=30.0,
                erasures=lambda: self._erasures,
                report=_report,
                on_breaker=_report_breaker,
                on_statuses_given_up=_report_statuses,
            ),
            on_epoch=self._set_epoch,
        )
        self._ingress_address: Address[Delivery] = Address(
            "ingress", limits.ingress_capacity, linger=_INGRESS_LINGER
        )
        self.spool: SpoolDirectory | None = None
        if limits.spool_max_bytes:
            self.spool = SpoolDirectory(
                config.data_dir / "spool", max_bytes=limits.spool_max_bytes, report=_report_spool
            )
        self._ingress = Ingress(
            self.journal,
            feed=self._owner.feed,
            is_fed=self._owner.is_fed,
            look=self._owner.look,
            max_rows=limits.flush_max_rows,
            max_bytes=limits.flush_max_bytes,
            on_refused=partial(_report, "ingress"),
            spool=self.spool,
        )
        self.webhooks = Webhooks(
            config.apps,
            self._ingress_address,
            dedup_key=lambda: self._dedup_key,
            tombstones=self._tombstones,
            spools=self.spool is not None,
        )
        self._sending = Sending(
            self._outbox, config.apps, is_ours=self.webhooks.owns, sends=config.sender is not None
        )
        self._stood_down = trio.Event()
        self._reached = trio.Event()  # the database, with the schema that it has to have
        self._waiting = trio.CancelScope()
        self._draining = False

    def _sender_spec(self, policy: Backoff) -> SenderSpec | None:
        sender = self.config.sender
        if sender is None:
            return None
        return SenderSpec(
            outbox=self._outbox,
            open_sender=graph.open_sender(sender.url, sender.token, clock=self._clock),
            lanes=sender.lanes,
            timeout=sender.timeout_ms / 1000,
            max_age=timedelta(hours=sender.max_age_hours),
            policy=policy,
            breaker_failures=_SENDER_FAILURES,
        )

    async def submit(self, envelope: Envelope) -> None:
        """Take one message as if it had come in by webhook; returns when it is durable. The same
        `message_id` again is a duplicate and returns as well.

        `envelope.message` is a message object as Meta sends it (with `id`, `from`, `type`);
        `envelope.session.phone_number_id` says which number it was sent to.

        Raises:
            ValueError: the message could not be routed: what it lacks is named.
            NotStored: it could not be made durable.
        """
        stored: list[bool] = []
        settled = trio.Event()

        def settle(outcome: bool) -> None:
            stored.append(outcome)
            settled.set()

        if self._dedup_key is None:
            raise NotStored("the router has not reached its database yet")
        if not is_correlation_id(envelope.correlation_id):
            raise ValueError("envelope.correlation_id: 1 to 128 of A-Z a-z 0-9 . _ : -")
        if envelope.traceparent is not None and not is_traceparent(envelope.traceparent):
            raise ValueError("envelope.traceparent is not a W3C traceparent of version 00")
        delivery = self.webhooks.splitter_for(envelope.session.phone_number_id, self._dedup_key).delivery(
            body_of(envelope),
            correlation_id=envelope.correlation_id,
            traceparent=envelope.traceparent,
            settle=settle,
        )
        wrong = [str(item.reason or item.bucket) for item in delivery.items if item.bucket is not None]
        if wrong:
            raise ValueError(f"the message cannot be routed: {', '.join(wrong)}")
        await self._ingress_address.tell(delivery)
        await settled.wait()
        if not stored[0]:
            raise NotStored("the journal could not be written")

    async def send(
        self,
        service: str,
        *,
        to: str,
        message: JsonObject,
        idempotency_key: str,
        phone_number_id: str | None = None,
        correlation_id: str | None = None,
    ) -> SentMessage:
        """Put a message of that service into the outbox, behind what waits for the same phone. The same key
        again is the same message, and returns what became of it. `to` is a phone number or a user id,
        `message` a Graph API message object without `to`; `phone_number_id` may be left out where there is
        one number only.

        Raises:
            NotSent: it cannot be sent: what is wrong with it is named.
            JournalUnavailable: the database is away.
        """
        return await self._sending.send(
            canonical_domain(service),
            to=to,
            message=message,
            idempotency_key=idempotency_key,
            phone_number_id=phone_number_id,
            correlation_id=f"send-{uuid.uuid4().hex}" if correlation_id is None else correlation_id,
        )

    async def sent_message(self, service: str, identity: str) -> SentMessage | None:
        """What became of a message that this service sent; None: it sent no such message. Raises
        JournalUnavailable."""
        return await self._sending.sent(canonical_domain(service), identity)

    def statistics(self) -> RouterStatistics:
        tree = self._owner.tree
        dispatcher = (
            tree.dispatcher.statistics() if tree is not None and tree.dispatcher is not None else None
        )
        outbound = tree.outbound if tree is not None else None
        return RouterStatistics(
            epoch=self._epoch,
            ingress=self._ingress.statistics,
            undelivered=dispatcher.undelivered if dispatcher is not None else 0,
            live_sessions=dispatcher.live_sessions if dispatcher is not None else 0,
            waiting_for=dispatcher.waiting_for if dispatcher is not None else {},
            spool_bytes=None if self.spool is None else self.spool.size,
            outbound=outbound.statistics if outbound is not None else None,
            attached={name: service.connections for name, service in self.roster.attached.items()},
            sender_breaker=str(outbound.breaker.state) if outbound is not None else None,
            services=self.roster.statistics({} if tree is None else tree.services),
        )

    @property
    def delivers(self) -> bool:
        """Whether this process holds the lease; another one on the same database may."""
        return self._epoch is not None

    async def stood_down(self) -> None:
        """Return when this process has ceased to deliver."""
        await self._stood_down.wait()

    @property
    def refuses(self) -> bool:
        """The last flush could not be made durable, a moment ago: what comes now is likely to be refused."""
        refused_at = self._ingress.statistics.refused_at
        return refused_at is not None and trio.current_time() - refused_at < _REFUSES_FOR

    async def can_accept(self) -> bool:
        """Whether what comes now could be made durable without the database."""
        return self.spool is not None and await self.spool.probe()

    async def probe(self) -> None:
        """Raises JournalUnavailable: the database is away, or takes no writes."""
        await self.journal.probe()

    async def ask_for_retries(self) -> None:
        """Have dead letters that are due retried now, by whoever delivers. Raises JournalUnavailable."""
        await self.journal.ask_for_retries()

    async def dead_letters(self) -> DeadLetterCounts:
        """How many there are. Raises JournalUnavailable."""
        still_open, failed, last_run = await self.journal.dead_letter_counts()
        since = None if last_run is None else self._clock() - last_run
        return DeadLetterCounts(still_open, failed, last_run, since)

    def _set_epoch(self, epoch: int | None) -> None:
        self._epoch = epoch
        if epoch is None:
            self._stood_down.set()
            self._stood_down = trio.Event()
        _log.info("delivering" if epoch is not None else "not delivering", epoch=epoch)

    async def open_spool(self) -> None:
        """Raises SpoolUnavailable: its directory cannot be used."""
        if self.spool is not None:
            await self.spool.open()

    async def prepare(self) -> None:
        """Partitions, the ledger's key and the menu, before the first message is journaled. Raises
        JournalUnavailable."""
        await self.journal.keep_house()
        await self._load_services()
        await self._load_menu()
        await self._load_tombstones()
        self._dedup_key = await self.journal.dedup_key()
        self._reached.set()

    async def reach(self, migrate: Callable[[], Awaitable[object]]) -> None:
        """Bring the schema up to date, or check it, and `prepare`, as soon as the database is there."""
        wait = _REACH_EVERY
        while True:
            try:
                await migrate()
                await self.prepare()
                return
            except (JournalUnavailable, MigrationError) as trouble:
                _report("database", trouble)
                await trio.sleep(wait)
                wait = min(wait * 2, _REACH_AT_LEAST_EVERY)

    async def run(self) -> None:
        """Until `drain` has been called and everything in hand is finished."""
        children = [
            ChildSpec(
                "ingress",
                lambda: self._ingress_address.run(self._ingress),
                self._ingress_address.mailbox.close,
                self._bury_ingress,
            ),
        ]
        if self.config.delivery.enabled:
            children.insert(0, ChildSpec("owner", self._run_owner, self._drain_owner))
        if self.spool is not None:
            unspooler = Unspooler(
                self.spool,
                self._ingress,
                split=self.webhooks.split_again,
                on_trouble=partial(_report, "spool"),
                on_emptied=lambda count: _log.info("the spool is empty again", journaled=count),
            )
            children.append(ChildSpec("unspooler", unspooler.run, unspooler.stop))
        self._supervisor = Supervisor(
            "router",
            children,
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=10,
            period=60,
            on_crash=_report,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_house)
            await self._supervisor.run()
            nursery.cancel_scope.cancel()

    async def _run_owner(self) -> None:
        with trio.CancelScope() as self._waiting:  # a scope is entered once, and the owner may be restarted
            if not self._draining:
                await self._reached.wait()
        if self._reached.is_set():
            await self._owner.run()

    def _drain_owner(self) -> None:
        self._draining = True
        self._waiting.cancel()
        self._owner.drain()

    def _bury_ingress(self) -> None:
        """It will journal nothing more: who still waits is told so, and Meta sends again."""
        self._ingress_address.mailbox.close()
        for delivery in self._ingress_address.mailbox.drain_nowait():
            delivery.settle(False)
        self._ingress_address.bury()

    async def drain(self) -> None:
        """Journal what was accepted, finish what is in hand; the rest stays in the journal."""
        await self._supervisor.drain()

    async def close(self) -> None:
        if self.spool is not None:
            self.spool.close()  # first: a database that does not answer must not keep it locked
        await self._lease.close()
        await self._outbox.close()
        await self._statuses.close()
        await self._jobs.close()
        await self._archives.close()
        await self.journal.close()

    async def _keep_house(self) -> None:
        """The ledger rotates; services, menu and tombstones follow their tables."""
        await self._reached.wait()
        next_house = trio.current_time() + _KEEP_HOUSE_EVERY
        while True:
            with trio.move_on_after(_LOOK_EVERY):
                await self._look.wait()
            self._look = trio.Event()
            try:
                await self._load_tombstones()
                await self._load_services()
                await self._load_menu()
                if trio.current_time() >= next_house:
                    await self.journal.rotate_ledger()
                    next_house = trio.current_time() + _KEEP_HOUSE_EVERY
            except JournalUnavailable as error:
                _report("housekeeping", error)

    def _hear_of_erasures(self) -> None:
        self._erasures += 1
        self._look_again()

    def _look_again(self) -> None:
        self._look.set()

    async def _load_tombstones(self) -> None:
        self._tombstones.load(*await self.journal.erasures())

    async def _load_menu(self) -> None:
        self.roster.use_menu(
            HomeMenu(
                MenuRow(row["country"], row["language"], row["domain"], row["title"], row["description"])
                for row in await self.journal.home_menu()
            )
        )

    async def _load_services(self) -> None:
        versions, secrets = await self.journal.services()
        self._change_services(
            lambda: self.roster.use([version_of(row) for row in versions], credentials_of(secrets))
        )

    def reload(self, config: Config) -> None:
        """Go by what this configuration says of services and routing; all else stays until the next start."""
        self._change_services(lambda: self.roster.reload(config))

    def _change_services(self, change: Callable[[], bool]) -> None:
        """Whatever somebody wrote there, services that run are not to end of it."""
        try:
            changed = change()
        except Exception as error:
            _log.exception("services stay as they were", exc_info=error)
            return
        if changed:
            self._owner.change_services()

    def _open_http_lane(
        self,
        url: str,
        secret: str | None,
        *,
        allow_private: bool,
        shadow: bool,
        known_domain: KnownDomain,
    ) -> OpenLane:
        target = http.Target.of(url, secret, allow_private=allow_private, shadow=shadow)
        return http.open_lane(target, clock=self._clock, known_domain=known_domain)


@asynccontextmanager
async def operators_ingress(
    config: Config, bridge: Bridge, dsn: Callable[[], str]
) -> AsyncIterator[tuple[Ingress, Webhooks]]:
    """What journals, and what splits, for an operator's command beside a running router."""
    journal = PostgresJournal(bridge, dsn, clock=utc_now, notify=lambda: True)
    ingress = Ingress(
        journal,
        feed=lambda first, last, items: None,
        is_fed=lambda: False,
        look=lambda: None,
        max_rows=config.limits.flush_max_rows,
        max_bytes=config.limits.flush_max_bytes,
        on_refused=lambda error: None,
    )
    try:
        key = await journal.dedup_key()
        tombstones = Tombstones()
        tombstones.load(*await journal.erasures())
        yield ingress, Webhooks(config.apps, Address("none", 1), dedup_key=lambda: key, tombstones=tombstones)
    finally:
        await _shielded(journal.close, 3.0)


async def adopt_spool(
    config: Config, bridge: Bridge, dsn: Callable[[], str], report: Callable[[str], None]
) -> None:
    """Journal what ended processes left in the spool, as the next router would at its start.

    Raises:
        JournalUnavailable, SpoolUnavailable: it stays there, also where it is of an app that the
            configuration does not have.
    """
    spool = SpoolDirectory(
        config.data_dir / "spool",
        max_bytes=config.limits.spool_max_bytes,
        report=lambda event, details: report(f"{event}: {details}"),
    )
    await spool.open()
    try:
        async with operators_ingress(config, bridge, dsn) as (ingress, webhooks):

            def split(spooled: Spooled) -> Delivery | None:
                if webhooks.splitter_of(spooled.app) is None:
                    raise SpoolUnavailable(
                        f"the spool has bodies of app {spooled.app!r}, which the configuration does not have "
                        "with its secret; add it, or set the variable that has the secret"
                    )
                return webhooks.split_again(spooled)

            unspooler = Unspooler(
                spool,
                ingress,
                split=split,
                on_trouble=lambda error: None,
                on_emptied=lambda count: None,
            )
            await unspooler.empty()
    finally:
        spool.close()


def _report(what: str, error: Exception) -> None:
    _log.warning("trouble", component=what, error=describe(error), exc_info=_unless_expected(error))


def _report_homeless(moment: datetime) -> None:
    """Nobody made partitions ahead, or the clock leapt: both are an operator's business."""
    _log.error("no partition for the present time; it was made now", component="partitions", time=moment)


def _report_spool(event: str, details: Mapping[str, object]) -> None:
    _log.error(event, component="spool", **details)


def _report_statuses(service: str, count: int) -> None:
    _log.warning("statuses given up: the service could not be told in time", service=service, count=count)


def _report_breaker(service: str, breaker: Breaker) -> None:
    level = _log.info if breaker.state is not BreakerState.OPEN else _log.warning
    level("breaker", service=service, state=breaker.state, reason=breaker.reason, probe_in=breaker.probe_in())


def _unless_expected(error: Exception) -> Exception | None:
    return None if isinstance(error, JournalUnavailable | SpoolUnavailable | MigrationError) else error


@asynccontextmanager
async def open_router(
    config: Config,
    handlers: Mapping[str, HandlerFunction] | None = None,
    *,
    apply_migrations: bool | None = None,
    report: Callable[[str], None] = lambda line: None,
    clock: Clock = utc_now,
    random_unit: Callable[[], float] = random.random,
) -> AsyncIterator[Router]:
    """A router in this trio program: it journals, routes and delivers while the block runs.

    `handlers` are services in process, by domain. Leaving the block drains: what was accepted is
    journaled, running attempts are waited for, the rest stays in the journal for the next start.
    Cancelled, it drains for at most 5 s. `apply_migrations`: by default the embedded database is
    migrated and an outside one is only checked.

    Raises:
        ConfigError: the configuration cannot be used; every problem is listed.
        ValueError: a handler's domain is not in the configuration.
        EmbeddedPostgresError, MigrationError, JournalUnavailable: the database cannot be used. One that is
            not ours to start may come later where there is a spool.
        SpoolUnavailable: the directory of the spool cannot be used.
    """
    checked(config)
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(open_database(config, report=report))
        bridge = await stack.enter_async_context(open_bridge())
        apply = config.database_url is None if apply_migrations is None else apply_migrations

        async def migrate() -> None:
            await migrate_database(bridge, dsn(), apply=apply, schema=config.schema)

        router = Router(config, handlers or {}, bridge=bridge, dsn=dsn, clock=clock, random_unit=random_unit)
        stack.push_async_callback(_shielded, router.close, 5.0)
        await router.open_spool()
        reached = True
        try:
            await migrate()
            await router.prepare()
        except JournalUnavailable as away:
            if router.spool is None or config.database_url is None:
                raise
            report(f"{away}; what is accepted waits in {config.data_dir / 'spool'} until it is there")
            reached = False
        async with trio.open_nursery() as nursery:
            if not reached:
                nursery.start_soon(router.reach, migrate)
            nursery.start_soon(router.run)
            drain_for = CANCELLED_DRAIN_SECONDS
            try:
                await trio.lowlevel.checkpoint()
                yield router
                drain_for = DRAIN_SECONDS
            finally:
                await _shielded(router.drain, drain_for)
                nursery.cancel_scope.cancel()


async def _shielded(work: Callable[[], Any], seconds: float) -> None:
    with trio.move_on_after(seconds) as scope:
        scope.shield = True
        await work()
