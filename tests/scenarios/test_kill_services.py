"""Services, killed again and again in the middle of their work; and routers that the attached go over to."""

# ruff: noqa: ASYNC110 - tables and services send no events

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, RouterProcess, Services

pytestmark = pytest.mark.postgres

SERVICE = Path(__file__).parents[1] / "attached_service.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Kind:
    """A service that plays rides: its section of the configuration, and the command of its process."""

    name: str
    section: Callable[[int], str]
    command: Callable[[Path, int, str, float], list[str]]
    more: Callable[[int], str] = lambda port: ""


PAGE = (Path(__file__).parents[2] / "docs" / "services.md").read_text(encoding="utf-8")
SECRETS = {"RIDES_TOKEN": "b7c1f0", "JOBS_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
TELL = """
import os, time, urllib.request
from jobs import app

def tell(body, headers):
    kept = {name: headers[name] for name in ("webhook-id", "idempotency-key")}
    urllib.request.urlopen(urllib.request.Request(os.environ["SINK"], body, kept), timeout=30).close()
    time.sleep(float(os.environ["TAKES"]))
"""
TELLS = {
    "FastAPI": """
from fastapi.concurrency import run_in_threadpool

@app.middleware("http")
async def told(request, go_on):
    await run_in_threadpool(tell, await request.body(), request.headers)
    return await go_on(request)
""",
    "Flask": """
from flask import request

@app.before_request
def told():
    tell(request.get_data(), request.headers)
""",
}


# What it puts between the parser and the handler sees a request's body as it came.
TOLD_ON_EXPRESS = """
const express = require("express");
const { setTimeout } = require("node:timers/promises");
const parser = express.raw;

async function tell(request) {
  const kept = {};
  for (const name of ["webhook-id", "idempotency-key"]) kept[name] = request.headers[name];
  const told = await fetch(process.env.SINK, { method: "POST", body: request.body, headers: kept });
  await told.arrayBuffer();
  await setTimeout(1000 * Number(process.env.TAKES));
}

express.raw = (options) => [
  parser(options),
  (request, response, next) => tell(request).then(() => next(), next),
];
require("./jobs.js");
"""


def attached_command(home: Path, port: int, sink: str, takes: float) -> list[str]:
    url, token = f"ws://127.0.0.1:{port}", SECRETS["RIDES_TOKEN"]
    return [sys.executable, str(SERVICE), url, "rides", token, sink, str(takes)]


def posted_to(port: int) -> str:
    return f'url = "http://127.0.0.1:{port}/messages"\nsecret_env = "JOBS_SECRET"'


def of_the_page(framework: str, *command: str) -> Kind:
    """The service over HTTP as it stands in docs/services.md; what it gets is also said to who looks."""

    def written(home: Path, port: int, sink: str, takes: float) -> list[str]:
        [code] = [
            one for one in re.findall(r"```python\n(.*?)```", PAGE, re.S) if f"import {framework}" in one
        ]
        (home / "jobs.py").write_text(code)
        (home / "told.py").write_text(TELL + TELLS[framework])
        return [sys.executable, *command, "--port", str(port)]

    return Kind(framework, posted_to, written)


def express_command(home: Path, port: int, sink: str, takes: float) -> list[str]:
    [code] = re.findall(r"```js\n(.*?)```", PAGE, re.S)
    (home / "jobs.js").write_text(code)
    (home / "told.js").write_text(TOLD_ON_EXPRESS)
    return ["node", "told.js"]


KINDS = [
    Kind(
        "attached",
        lambda port: 'token_env = "RIDES_TOKEN"',
        attached_command,
        lambda port: f"services_port = {port}\n",
    ),
    of_the_page("FastAPI", "-m", "uvicorn", "told:app", "--log-level", "error"),
    of_the_page("Flask", "-m", "flask", "--app", "told", "run", "--with-threads"),
]
EXPRESS = Kind("Express", posted_to, express_command)


def configured(home: Path, services: Services, kind: Kind, port: int) -> Path:
    """rides is of that kind; the others are posted to as everywhere."""
    path = kit.write_config(home, services)
    before = f'[services.rides]\nurl = "{services.url("rides")}"'
    text = path.read_text().replace(before, f"[services.rides]\n{kind.section(port)}")
    path.write_text(kind.more(port) + text)
    return path


@contextmanager
def service(
    home: Path, kind: Kind, port: int, services: Services, *, takes: float
) -> Iterator[subprocess.Popen[bytes]]:
    sink = services.url("rides")
    with (home / "service.log").open("ab") as log:
        process = subprocess.Popen(
            kind.command(home, port, sink, takes),
            cwd=home,
            env=kit.environment(SINK=sink, TAKES=str(takes), PORT=str(port), **SECRETS),
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def seen(services: Services) -> int:
    return sum(sight.domain == "rides" for sight in services.sights)


async def until(services: Services, count: int) -> None:
    with trio.fail_after(kit.HANGS):
        while seen(services) < count:
            await trio.sleep(0.01)


async def killed(home: Path, kind: Kind, rounds: int, *, seed: int) -> None:
    rng = Random(seed)
    async with kit.open_services() as services:
        port = free_port()
        common = ("--data-dir", home / "data", "--config", configured(home, services, kind, port))
        environment = kit.environment(**SECRETS)
        load = Load(services.ledger, seed=seed)
        router = RouterProcess(home, *common, env=environment)
        try:
            async with trio.open_nursery() as nursery:
                load.urls = [(await router.ready()).webhook]
                database = Database.of(home / "data")
                nursery.start_soon(load.run)
                for number in range(rounds):
                    with service(home, kind, port, services, takes=0.05) as process:
                        before = seen(services)
                        await until(services, before + 20)
                        await trio.sleep(rng.uniform(0, 0.05))
                        process.send_signal(signal.SIGKILL)
                        kit.say(f"round {number + 1}: killed after {seen(services) - before} deliveries")
                with service(home, kind, port, services, takes=0.0):
                    await kit.caught_up(load, database)
                    load.stop()
                    await database.until(lambda count: count == 0)
                    await until_no_letters(database)
            await kit.verdict(database, services)
            again = [
                sight for sight in services.sights if sight.domain == "rides" and sight.body["redelivered"]
            ]
            assert again, "no kill met a delivery that was under way"
            assert await router.stop() == 0
        finally:
            router.end()


async def until_no_letters(database: Database) -> None:
    """What was deferred while nobody was attached has been delivered."""
    with trio.fail_after(kit.HANGS):
        while await database.value(
            "SELECT count(*) FROM webhook_dlq WHERE status IN ('pending', 'processing')"
        ):
            await trio.sleep(0.1)


def each_kind(test: Callable[..., Awaitable[None]]) -> Any:
    return pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)(test)


@each_kind
async def test_killed_in_the_middle_of_its_work_a_service_loses_nothing(home: Path, kind: Kind) -> None:
    await killed(home, kind, 3, seed=31)


@pytest.mark.acceptance
@each_kind
async def test_killed_twenty_times_a_service_loses_nothing(home: Path, kind: Kind) -> None:
    await killed(home, kind, 20, seed=32)


@pytest.mark.acceptance
@pytest.mark.usefixtures("express")
async def test_killed_twenty_times_a_service_on_express_loses_nothing(home: Path) -> None:
    await killed(home, EXPRESS, 20, seed=33)


async def test_when_a_router_stops_the_service_goes_to_the_one_that_delivers(home: Path) -> None:
    """Both behind one address: here the second takes over the port of the first."""
    async with kit.open_services() as services:
        port = free_port()
        common = ("--data-dir", home / "data", "--config", configured(home, services, KINDS[0], port))
        environment = kit.environment(**SECRETS)
        first = second = None
        try:
            with service(home, KINDS[0], port, services, takes=0.0):
                first = await RouterProcess(home, *common, env=environment).ready()
                assert await kit.post(first.webhook, kit.body_of(kit.new_message("taxi"))) == 200
                await until(services, 1)
                assert await first.stop() == 0
                second = await RouterProcess(home, *common, env=environment).ready()
                assert await kit.post(second.webhook, kit.body_of(kit.new_message("taxi again"))) == 200
                await until(services, 2)
                await Database.of(home / "data").until(lambda count: count == 0)
        finally:
            for router in (first, second):
                if router is not None:
                    router.end()
