"""Services that attach: killed again and again in the middle of their work, and routers that take over."""

# ruff: noqa: ASYNC110 - tables and services send no events

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, RouterProcess, Services

pytestmark = pytest.mark.postgres

SERVICE = Path(__file__).parents[1] / "attached_service.py"
TOKEN = "b7c1f0"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def configured(home: Path, services: Services, port: int) -> Path:
    """rides attaches; the others are posted to."""
    path = kit.write_config(home, services)
    text = path.read_text().replace(f'[services.rides]\nurl = "{services.url("rides")}"', "[services.rides]")
    path.write_text(
        f"services_port = {port}\n"
        + text.replace("[services.rides]", '[services.rides]\ntoken_env = "RIDES_TOKEN"')
    )
    return path


@contextmanager
def service(port: int, services: Services, *, takes: float) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            sys.executable,
            SERVICE,
            f"ws://127.0.0.1:{port}",
            "rides",
            TOKEN,
            services.url("rides"),
            str(takes),
        ],
        env=kit.environment(),
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


async def killed(home: Path, rounds: int, *, seed: int) -> None:
    rng = Random(seed)
    async with kit.open_services() as services:
        port = free_port()
        common = ("--data-dir", home / "data", "--config", configured(home, services, port))
        environment = kit.environment(RIDES_TOKEN=TOKEN)
        load = Load(services.ledger, seed=seed)
        router = RouterProcess(home, *common, env=environment)
        try:
            async with trio.open_nursery() as nursery:
                load.urls = [(await router.ready()).webhook]
                database = Database.of(home / "data")
                nursery.start_soon(load.run)
                for number in range(rounds):
                    with service(port, services, takes=0.05) as process:
                        before = seen(services)
                        await until(services, before + 20)
                        await trio.sleep(rng.uniform(0, 0.05))
                        process.send_signal(signal.SIGKILL)
                        kit.say(f"round {number + 1}: killed after {seen(services) - before} deliveries")
                with service(port, services, takes=0.0):
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


async def test_killed_in_the_middle_of_its_work_a_service_loses_nothing(home: Path) -> None:
    await killed(home, 3, seed=31)


@pytest.mark.acceptance
async def test_killed_twenty_times_a_service_loses_nothing(home: Path) -> None:
    await killed(home, 20, seed=32)


async def test_when_a_router_stops_the_service_goes_to_the_one_that_delivers(home: Path) -> None:
    """Both behind one address: here the second takes over the port of the first."""
    async with kit.open_services() as services:
        port = free_port()
        common = ("--data-dir", home / "data", "--config", configured(home, services, port))
        environment = kit.environment(RIDES_TOKEN=TOKEN)
        first = second = None
        try:
            with service(port, services, takes=0.0):
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
