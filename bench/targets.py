"""The servers that a benchmark can load, how each is started, and one running instance of each."""

import importlib.util
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import trio

from bench.databases import fetch_count, find_postmaster
from bench.processes import CpuClocks, ProcessFailed, Server, cpu_clocks
from router.postgres.embedded import EmbeddedPostgres

SECRET = "bench-app-secret"
READY = re.compile(r"^ready webhook=(?P<webhook>\S+)", re.MULTILINE)
READY_SECONDS = 60

ENV = {"WHATSAPP_APP_SECRET": SECRET, "WHATSAPP_VERIFY_TOKEN": "bench-verify-token", "PYTHONUNBUFFERED": "1"}
_PEER_ROWS = "SELECT count(*) FROM peer_messages"
_ROUTER_ROWS = "SELECT count(*) FROM whatsapp_messages WHERE direction = 'inbound'"
# By the tallies, which are exact and cost nothing while the load runs.
_ROUTER_UNSETTLED = """
SELECT h.next_seq - 1 - h.malformed - h.handled
       - t.handled - t.delivered - t.rejected - t.dead_letter - t.discarded
  FROM journal_head h, delivery_tallies t
"""


@dataclass(frozen=True)
class Target:
    """How to start one server and what to ask its database.

    `{data}` and `{files}` in `argv` become its data directory and the directory that `files` are written to.
    `postgres` says who runs the database: the server `inside` its data directory, the harness `beside` it
    (the connection string is then in PEER_DSN), or nobody. `unsettled` counts what is stored and still
    on its way to a service; the load is over when it gives 0.
    """

    name: str
    module: str
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    ready: re.Pattern[str] = READY
    postgres: Literal["inside", "beside", "none"] = "none"
    rows: str | None = None
    unsettled: str | None = None

    def available(self) -> bool:
        """Whether the module that it runs exists in this checkout."""
        runs = self.module if "." in self.module else f"{self.module}.__main__"
        return importlib.util.find_spec(runs) is not None


def serve_argv(port: int | str = 0) -> tuple[str, ...]:
    """Arguments of `python -m router` for a server with its data and configuration in a private place."""
    ports = ("--port", str(port), "--admin-port", "0")
    return ("serve", "--data-dir", "{data}", *ports, "--config", "{files}/postroom.toml")


ROUTER = Target(
    name="router",
    module="router",
    argv=serve_argv(),
    files={"postroom.toml": "[delivery]\nenabled = false\n"},
    postgres="inside",
    rows=_ROUTER_ROWS,
)
# The same router with routing and handlers in its own process, embedded as a user would embed it.
IN_PROCESS = Target(
    name="router+delivery",
    module="bench.inprocess",
    argv=("--data-dir", "{data}"),
    postgres="inside",
    rows=_ROUTER_ROWS,
    unsettled=_ROUTER_UNSETTLED,
)
FASTAPI = Target(name="fastapi", module="bench.peers.fastapi_asyncpg", postgres="beside", rows=_PEER_ROWS)
# The same without the statement by which asyncpg's pool resets a connection after each use: what somebody
# who profiles the reference would find. Printed beside it; the goals are about the pool as it comes.
FASTAPI_TUNED = Target(
    name="fastapi tuned", module=FASTAPI.module, argv=("--tuned",), postgres="beside", rows=_PEER_ROWS
)
QUART = Target(name="quart", module="bench.peers.quart_hypercorn", postgres="beside", rows=_PEER_ROWS)
FASTAPI_BARE = Target(name="fastapi bare", module=FASTAPI.module, argv=("--bare",))
FASTAPI_HELLO = Target(name="fastapi hello", module=FASTAPI.module, argv=("--hello",))
QUART_BARE = Target(name="quart bare", module=QUART.module, argv=("--bare",))
QUART_HELLO = Target(name="quart hello", module=QUART.module, argv=("--hello",))

DURABLE = (ROUTER, IN_PROCESS, FASTAPI, FASTAPI_TUNED, QUART)
# What a peer reaches with its work removed, beside the bare rate of its framework.
CEILINGS = {"fastapi": (FASTAPI_BARE, FASTAPI_HELLO), "quart": (QUART_BARE, QUART_HELLO)}


def start_router(
    home: Path, port: int, *arguments: str, config: str = "", env: Mapping[str, str] | None = None
) -> Server:
    """`python -m router serve` with its data and `config` in `home`; returns when it is ready.

    Raises:
        ProcessFailed: it ended, or printed no ready line in READY_SECONDS.
    """
    (home / "postroom.toml").write_text(config, encoding="utf-8")
    given = [argument.format(data=home / "data", files=home) for argument in serve_argv(port)]
    argv = [sys.executable, "-m", "router", *given, *arguments]
    server = Server(argv, {**ENV, **(env or {})}, home / "server.log")
    try:
        server.wait_ready(READY, READY_SECONDS)
    except ProcessFailed:
        server.stop()
        raise
    return server


@dataclass(frozen=True)
class Running:
    """One started target."""

    target: Target
    server: Server
    webhook: str
    dsn: str | None
    postmaster: int | None

    @property
    def port(self) -> int:
        port = urlsplit(self.webhook).port
        assert port is not None
        return port

    @property
    def path(self) -> str:
        return urlsplit(self.webhook).path

    def cpu(self) -> CpuClocks:
        return cpu_clocks(self.server.pid, self.postmaster)

    def count_rows(self) -> int | None:
        return None if self.target.rows is None else self._ask(self.target.rows)

    def count_unsettled(self) -> int:
        return 0 if self.target.unsettled is None else self._ask(self.target.unsettled)

    def _ask(self, query: str) -> int:
        if self.dsn is None:
            raise ValueError(f"{self.target.name} has no database")
        return fetch_count(self.dsn, query)


@asynccontextmanager
async def running(target: Target, home: Path) -> AsyncIterator[Running]:
    """Start `target` in `home`, which keeps its data between two starts, and stop it at the end.

    Raises:
        ProcessFailed: the server ended, or printed no ready line in READY_SECONDS.
    """
    data, files = home / "data", home / "files"
    files.mkdir(parents=True, exist_ok=True)
    for name, text in target.files.items():
        (files / name).write_text(text, encoding="utf-8")
    argv = [sys.executable, "-m", target.module]
    argv += [argument.format(data=data, files=files) for argument in target.argv]
    env = {**ENV, **target.env}
    async with _database_beside(target, data) as dsn:
        if dsn is not None:
            env["PEER_DSN"] = dsn
        server = Server(argv, env, home / "server.log")
        try:
            match = await trio.to_thread.run_sync(server.wait_ready, target.ready, READY_SECONDS)
            if target.postgres == "inside":
                dsn = EmbeddedPostgres(data).dsn()
            postmaster = None if target.postgres == "none" else find_postmaster(data)
            yield Running(target, server, match["webhook"], dsn, postmaster)
        finally:
            # Postgres stops only after its last client, so this is waited for here and not in a thread.
            server.stop()


@asynccontextmanager
async def _database_beside(target: Target, data: Path) -> AsyncIterator[str | None]:
    if target.postgres != "beside":
        yield None
        return
    postgres = EmbeddedPostgres(data)
    info = await postgres.start()
    try:
        yield info.dsn
    finally:
        with trio.CancelScope(shield=True):
            await postgres.stop()
