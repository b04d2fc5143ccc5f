"""The reference on Trio's web stack: quart-trio on hypercorn's trio worker, a commit per message.

One process; asyncpg runs on a uvloop thread that each request crosses into. Run as `python -m
bench.peers.quart_hypercorn`; the connection string comes in PEER_DSN.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import click
import trio
import uvloop
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, request
from quart_trio import QuartTrio

from bench.peers.webhook import (
    ANSWER,
    CREATE_TABLE,
    INSERT,
    PATH,
    POOL_SIZE,
    REFUSAL,
    PeerOptions,
    peer_options,
    print_ready,
    signature_matches,
    wamids,
)


def hello_app() -> QuartTrio:
    app = QuartTrio(__name__)

    @app.post(PATH)
    async def hello() -> Response:
        return Response(ANSWER, content_type="application/json")

    return app


def bare_app() -> QuartTrio:
    app = QuartTrio(__name__)

    @app.post(PATH)
    async def webhook() -> Response:
        await request.body
        return Response(ANSWER, content_type="application/json")

    return app


class StorageThread:
    """An asyncio loop on uvloop in a thread of its own, and the way into it from trio.

    trio-asyncio, the other bridge, costs this peer about a millisecond more per request.
    """

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs `work` on the loop. Not cancelled half-way: a request that has begun to store finishes."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()
        outcomes: list[asyncio.Task[Any]] = []

        def finished(done: asyncio.Task[Any]) -> None:
            outcomes.append(done)
            token.run_sync_soon(trio.lowlevel.reschedule, task)

        def begin() -> None:
            self._loop.create_task(work).add_done_callback(finished)

        self._loop.call_soon_threadsafe(begin)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return outcomes[0].result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def full_app(options: PeerOptions, storage: "StorageThread", pool: Any) -> QuartTrio:
    app = QuartTrio(__name__)
    secret = options.secret

    @app.post(PATH)
    async def webhook() -> Response:
        body: bytes = await request.body
        if not signature_matches(secret, body, request.headers.get("X-Hub-Signature-256")):
            return Response(REFUSAL, status=401, content_type="application/json")
        for wamid in wamids(body):
            await storage.run(pool.execute(INSERT, wamid, body))
        return Response(ANSWER, content_type="application/json")

    return app


@asynccontextmanager
async def open_app(options: PeerOptions) -> AsyncIterator[QuartTrio]:
    if options.variant != "full":
        yield bare_app() if options.variant == "bare" else hello_app()
        return
    storage = StorageThread()
    pool = await storage.run(_open_pool(options.dsn))
    try:
        yield full_app(options, storage, pool)
    finally:
        with trio.CancelScope(shield=True):
            await storage.run(pool.close())
        storage.stop()


async def _open_pool(dsn: str) -> Any:
    pool = await asyncpg.create_pool(dsn, min_size=POOL_SIZE, max_size=POOL_SIZE)
    await pool.execute(CREATE_TABLE)
    return pool


def server_config(descriptor: int) -> Config:
    config = Config()
    config.bind = [f"fd://{descriptor}"]
    config.backlog = 2_048
    config.accesslog = None
    config.loglevel = "WARNING"
    config.include_server_header = False
    config.include_date_header = False
    config.keep_alive_timeout = 60
    # The default closes a connection after 1,000 requests, which a load generator reaches in seconds.
    config.keep_alive_max_requests = 10_000_000
    return config


async def run(options: PeerOptions) -> None:
    sock = options.listen()

    async def terminated() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                return

    async with open_app(options) as app, trio.open_nursery() as nursery:

        async def serve_app(task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
            await serve(
                app, server_config(sock.fileno()), shutdown_trigger=terminated, task_status=task_status
            )

        await nursery.start(serve_app)
        print_ready(sock)


@click.command()
@click.option("--port", default=0, help="0 takes a free one.")
@click.option("--bare", is_flag=True, help="The same handler with its work removed.")
@click.option("--hello", is_flag=True, help="The framework's smallest app.")
def main(port: int, bare: bool, hello: bool) -> None:
    """Serve the webhook on quart-trio and hypercorn."""
    trio.run(run, peer_options(bare=bare, hello=hello, port=port))


if __name__ == "__main__":
    main()
