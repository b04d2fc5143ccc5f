"""The reference on Trio's web stack: quart-trio on hypercorn's trio worker, asyncpg through trio-asyncio, a commit per message.

Run as `python -m bench.peers.quart_hypercorn`; the connection string comes in PEER_DSN.
"""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import click
import trio
import trio_asyncio
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
    PeerOptions,
    keep_nothing,
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
        await request.get_data(cache=False)
        return Response(ANSWER, content_type="application/json")

    return app


def full_app(options: PeerOptions, pool: Any) -> QuartTrio:
    app = QuartTrio(__name__)
    secret = options.secret
    execute = trio_asyncio.aio_as_trio(pool.execute)

    @app.post(PATH)
    async def webhook() -> Response:
        body = await request.get_data(cache=False)
        if not signature_matches(secret, body, request.headers.get("X-Hub-Signature-256")):
            return Response(status=401)
        for wamid in wamids(body):
            await execute(INSERT, wamid, body)
        return Response(ANSWER, content_type="application/json")

    return app


@asynccontextmanager
async def open_app(options: PeerOptions) -> AsyncIterator[QuartTrio]:
    if options.variant != "full":
        yield bare_app() if options.variant == "bare" else hello_app()
        return
    async with trio_asyncio.open_loop():
        pool = await trio_asyncio.aio_as_trio(_open_pool)(options.dsn)
        try:
            yield full_app(options, pool)
        finally:
            await trio_asyncio.aio_as_trio(pool.close)()


async def _open_pool(dsn: str) -> Any:
    pool = await asyncpg.create_pool(dsn, min_size=POOL_SIZE, max_size=POOL_SIZE, reset=keep_nothing)
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
