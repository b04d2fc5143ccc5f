"""The reference on FastAPI: uvicorn with uvloop and httptools, an asyncpg pool, a commit per message.

One process. Run as `python -m bench.peers.fastapi_asyncpg`; the connection string comes in PEER_DSN.
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import click
import uvicorn
from fastapi import FastAPI, Request, Response

from bench.peers.webhook import (
    ANSWER,
    CREATE_TABLE,
    INSERT,
    PATH,
    POOL_SIZE,
    REFUSAL,
    PeerOptions,
    keep_nothing,
    peer_options,
    print_ready,
    signature_matches,
    wamids,
)


async def read(request: Request) -> bytes:
    """As `request.body()`, without its generator: with it, the bare handler stays below nine tenths of what
    the framework reaches."""
    message = await request.receive()
    body: bytes = message["body"]
    while message.get("more_body"):
        message = await request.receive()
        body += message["body"]
    return body


def hello_app() -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post(PATH)
    async def hello() -> Response:
        return Response(ANSWER, media_type="application/json")

    return app


def bare_app() -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post(PATH)
    async def webhook(request: Request) -> Response:
        await read(request)
        return Response(ANSWER, media_type="application/json")

    return app


def full_app(options: PeerOptions, *, tuned: bool) -> FastAPI:
    secret = options.secret

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        reset = keep_nothing if tuned else None  # None: asyncpg's own
        async with asyncpg.create_pool(
            options.dsn, min_size=POOL_SIZE, max_size=POOL_SIZE, reset=reset
        ) as pool:
            await pool.execute(CREATE_TABLE)
            app.state.pool = pool
            yield

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    @app.post(PATH)
    async def webhook(request: Request) -> Response:
        body = await read(request)
        if not signature_matches(secret, body, request.headers.get("x-hub-signature-256")):
            return Response(REFUSAL, status_code=401, media_type="application/json")
        for wamid in wamids(body):
            await app.state.pool.execute(INSERT, wamid, body)
        return Response(ANSWER, media_type="application/json")

    return app


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            print_ready(sockets[0])


@click.command()
@click.option("--port", default=0, help="0 takes a free one.")
@click.option("--bare", is_flag=True, help="The same handler with its work removed.")
@click.option("--hello", is_flag=True, help="The framework's smallest app.")
@click.option("--tuned", is_flag=True, help="Without the pool's reset statement after each insert.")
def main(port: int, bare: bool, hello: bool, tuned: bool) -> None:
    """Serve the webhook on FastAPI and uvicorn."""
    options = peer_options(bare=bare, hello=hello, port=port)
    app = {"full": lambda: full_app(options, tuned=tuned), "bare": bare_app, "hello": hello_app}[
        options.variant
    ]()
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_keep_alive=60,
    )
    _Server(config).run(sockets=[options.listen()])


if __name__ == "__main__":
    main()
