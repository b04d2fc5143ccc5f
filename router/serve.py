"""`postroom serve`: the hot listener and the admin port around a router, from start to drained exit."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace

import trio

from actors.messages import Ack, Envelope, Reply
from router.app import Router, open_router
from router.config import Config, ConfigError
from router.delivery.in_process import HandlerFunction
from router.edge.http1 import Listener

_DRAIN_LISTENER_SECONDS = 10.0
_LISTEN_AGAIN = 10.0  # seconds


class CannotListen(Exception):
    """A port cannot be listened on; the message names it and the fix."""


async def serve(
    config: Config,
    *,
    handlers: Mapping[str, HandlerFunction] | None = None,
    reload: Callable[[], Config] | None = None,
    apply_migrations: bool | None,
    announce: Callable[[str], None],
    report: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. `announce` gets the ready line. At SIGHUP
    services and routing are as `reload` says, which reads the configuration again.

    Raises:
        CannotListen: an address is taken or not ours.
        ConfigError, EmbeddedPostgresError, MigrationError, JournalUnavailable: as open_router.
    """
    listener = Listener(config.limits)
    try:
        port = listener.bind(config.host, config.port)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; use --host or --port"
        ) from error
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        hangups = stack.enter_context(trio.open_signal_receiver(signal.SIGHUP))  # not to die of it meanwhile
        stop = trio.Event()
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_watch_signals, signals, stop, nursery.cancel_scope)
        async with (
            open_router(config, handlers, apply_migrations=apply_migrations, report=report) as router,
            trio.open_nursery() as edges,
        ):
            edges.start_soon(listener.serve, router.webhooks.accept_nowait)
            if reload is not None:
                edges.start_soon(_reload_when_asked, hangups, router, reload, report)
            # Beside the router, not inside: what is under way is answered while the router drains.
            if router.roster.credentials:
                await _start_services_port(nursery, router, config, report)
            else:
                nursery.start_soon(_serve_services_later, nursery, router, config, report)
            drained = trio.Event()
            admin = await _start_admin(edges, router, config, stop, drained)
            first = router.webhooks.paths[0]
            announce(
                f"ready webhook=http://{_shown(config.host)}:{port}{first} admin={admin} "
                f"data={config.data_dir.resolve()}"
            )
            await stop.wait()
            listener.drain()
            with trio.move_on_after(_DRAIN_LISTENER_SECONDS):
                await listener.drained()
            drained.set()
            edges.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def _start_admin(
    nursery: trio.Nursery, router: Router, config: Config, stop: trio.Event, drained: trio.Event
) -> str:
    """The admin port's URL. From `stop` on it says that we are not ready, until `drained` it says so."""
    # Imported here: it takes longer than all the rest of the start, and the listener is open already.
    from router.edge.admin import admin_app, serve_admin

    app = admin_app(router, is_ready=lambda: not stop.is_set())

    async def admin(*, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_admin(
            app, config.admin_host, config.admin_port, stopped=drained.wait, task_status=task_status
        )

    try:
        url: str = await nursery.start(admin)
    except* OSError as group:
        error = group.exceptions[0]
        raise CannotListen(
            f"cannot listen on {config.admin_host}:{config.admin_port}: {error}; "
            "use --admin-host or --admin-port"
        ) from error
    return url


async def _start_services_port(
    nursery: trio.Nursery, router: Router, config: Config, report: Callable[[str], None]
) -> None:
    try:
        number = await nursery.start(_serve_services, router, config)
    except* OSError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise CannotListen(
            f"cannot listen on {config.services_host}:{config.services_port}: {error}; "
            "set services_host or services_port"
        ) from error
    at = f"{_shown(config.services_host)}:{number}"
    report(f"services may attach at ws://{at}/services/ and send at http://{at}/v1/messages")


async def _serve_services(
    router: Router, config: Config, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    # Imported here, as the admin port is: who has no such service does not wait for it.
    from router.edge.attach import AttachPort
    from router.edge.messages import MAX_BODY_BYTES, MessagesApi

    listener = Listener(replace(config.limits, body_max_bytes=MAX_BODY_BYTES), adopts=True)
    messages = MessagesApi(router, lambda: router.roster.credentials)
    port = AttachPort(
        router.roster.attached,
        may_attach=lambda: router.delivers,
        stood_down=router.stood_down,
        listener=listener,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, await nursery.start(messages.run))
        task_status.started(await nursery.start(port.serve, config.services_host, config.services_port))


async def _serve_services_later(
    nursery: trio.Nursery, router: Router, config: Config, report: Callable[[str], None]
) -> None:
    """Listen as soon as there is a service with a token: the registry may bring one at any time."""
    while not router.roster.credentials:
        await router.roster.until_changed()
    while True:
        try:
            return await _start_services_port(nursery, router, config, report)
        except CannotListen as trouble:
            report(f"{trouble}; trying again every {_LISTEN_AGAIN:g} s")
            await trio.sleep(_LISTEN_AGAIN)


async def _reload_when_asked(
    hangups: AsyncIterator[int],
    router: Router,
    reload: Callable[[], Config],
    report: Callable[[str], None],
) -> None:
    async for _ in hangups:
        try:
            router.reload(reload())
        except ConfigError as error:
            report(f"the configuration cannot be used, and all stays as it was:\n{error}")
        else:
            report("the configuration was read again: services and routing are as it says")


async def _watch_signals(signals: object, stop: trio.Event, scope: trio.CancelScope) -> None:
    """The first signal drains, the second one does not wait for that."""
    async for _ in signals:  # type: ignore[attr-defined]  # trio gives it no public type
        if stop.is_set():
            scope.cancel()
        stop.set()


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


async def echo(envelope: Envelope) -> Ack:
    """The service that `serve --dev` has for every domain: it says what it heard."""
    said = envelope.text or str(envelope.message.get("type", "something"))
    return Ack((Reply(f"{envelope.domain} heard: {said}"[:4096]),))
