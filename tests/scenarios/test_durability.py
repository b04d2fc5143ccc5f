"""A message is on the disk before its 200 leaves: the settings that promise it, and a trace of the calls."""

# ruff: noqa: ASYNC110, ASYNC240 - processes send no events, and /proc is no disk

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, open_services

from router.postgres.connections import SERVICE, connect

pytestmark = pytest.mark.postgres

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None and os.environ.get("CI") != "true",
    reason="strace is not installed (apt-get install strace)",
)


async def test_the_routers_connections_are_durable(home: Path) -> None:
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")

            async def read(_: object) -> dict[str, str]:
                connection = await connect(database.dsn, name="append", role=SERVICE)
                try:
                    names = ("fsync", "synchronous_commit", "full_page_writes")
                    return {name: await connection.fetchval(f"SHOW {name}") for name in names}
                finally:
                    await connection.close()

            assert await database.run(read) == {
                "fsync": "on",
                "synchronous_commit": "on",
                "full_page_writes": "on",
            }
            assert await router.stop() == 0


async def test_the_routers_connections_do_not_follow_a_careless_default(home: Path) -> None:
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config):
            database = Database.of(home / "data")
            await database.value("ALTER DATABASE postroom SET synchronous_commit = off")

            async def read(own: object) -> tuple[str, str]:
                connection = await connect(database.dsn, name="append", role=SERVICE)
                try:
                    show = "SHOW synchronous_commit"
                    return await own.fetchval(show), await connection.fetchval(show)  # type: ignore[attr-defined]
                finally:
                    await connection.close()

            assert await database.run(read) == ("off", "on")


def calls_of(trace: Path) -> Iterator[tuple[float, float, str]]:
    """(began, ended, call) of every traced call that has ended, in seconds."""
    for line in trace.read_text(errors="replace").splitlines():
        # -ttt -T: "1700000000.000001 fdatasync(7</.../pg_wal/0000...>) = 0 <0.001234>"
        found = re.fullmatch(r"(\d+\.\d+) (.*) <(\d+\.\d+)>", line)
        if found is not None:
            began = float(found.group(1))
            yield began, began + float(found.group(3)), found.group(2)


@needs_strace
async def test_the_wal_is_synced_before_the_200_is_written(home: Path) -> None:
    data, traces = home / "data", home / "traces"
    traces.mkdir()
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", data, "--config", config) as router:
            assert await kit.post(router.webhook, kit.body_of(kit.new_message("taxi"))) == 200
            await services.until_seen(1)
            database = Database.of(data)
            await database.until(lambda count: count == 0)
            backend = await database.value(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'postroom/append'"
            )
            postmaster = kit.postmaster_of(data)
            assert postmaster is not None
            everything = [postmaster, *children_of(postmaster), router.pid]
            calls = "openat,fsync,fdatasync,pwrite64,pwritev,sendto,sendmsg,write,writev"
            tracing = subprocess.Popen(  # noqa: ASYNC220
                ["strace", "-ff", "-ttt", "-T", "-y", "-s", "10000", "-e", f"trace={calls}"]
                + ["-o", str(traces / "trace")]
                + [word for pid in everything for word in ("-p", str(pid))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                await attached(everything)
                threads = [task.name for task in Path(f"/proc/{router.pid}/task").iterdir()]
                message = kit.new_message("taxi again")
                assert await kit.post(router.webhook, kit.body_of(message)) == 200
                await services.until_seen(2)
            finally:
                tracing.send_signal(signal.SIGINT)
                await trio.to_thread.run_sync(tracing.wait)
    ours = [call for thread in threads for call in calls_of(traces / f"trace.{thread}")]
    [answered] = [began for began, _, call in ours if "HTTP/1.1 200" in call and "X-WA-Core-Latency" in call]
    asked = min(began for began, _, call in ours if message.message_id in call)
    synced = [
        (began, ended)
        for began, ended, call in calls_of(traces / f"trace.{backend}")
        if re.match(r"f(data)?sync\(\d+<[^>]*/pg_wal/", call) and call.endswith("= 0")
    ]
    between = [ended for began, ended in synced if asked <= began and ended <= answered]
    assert between, f"asked at {asked}, synced {synced}, answered at {answered}"
    kit.say(
        f"the WAL was synced {1000 * (between[0] - asked):.2f} ms after Postgres was asked "
        f"and {1000 * (answered - between[0]):.2f} ms before the 200 was written"
    )


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


async def attached(pids: list[int]) -> None:
    """Wait until every thread of these is traced."""
    with trio.fail_after(kit.HANGS):
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # a worker that has ended meanwhile
                for task in Path(f"/proc/{pid}/task").iterdir():
                    while "TracerPid:\t0\n" in (task / "status").read_text():
                        await trio.sleep(0.01)
