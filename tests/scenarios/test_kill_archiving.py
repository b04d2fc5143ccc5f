"""SIGKILL of a router in the middle of archiving: rows are in exactly one place, and the next one goes on."""

# ruff: noqa: ASYNC110 - processes and tables send no events, so they are asked again

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, RouterProcess

from router.archive.files import ArchiveFiles

pytestmark = pytest.mark.postgres

ITEMS = 10_000
# A week that has long ended, whole: as if so many messages had been delivered in it.
_WEEK = """
WITH head AS (
    UPDATE journal_head SET next_seq = next_seq + $1, next_event = next_event + $1, received = received + $1
    RETURNING next_seq - $1 AS seq, next_event - $1 AS event
), tallies AS (
    UPDATE delivery_tallies SET delivered = delivered + $1, low_water = low_water + $1
), events AS (
    INSERT INTO wa_events (event_id, received_at, app, correlation_id, partial, body)
    SELECT event + n, $2, 'default', 'c', false, convert_to(repeat('x', 300) || n, 'UTF8')
      FROM head, generate_series(0, $1 - 1) n
), items AS (
    INSERT INTO whatsapp_messages_items (seq, received_at, event_id, key, kind, path, session_key)
    SELECT seq + n, $2, event + n, decode(lpad(to_hex(seq + n), 32, '0'), 'hex'), 'm', '0.0.m0',
           'k' || n % 100
      FROM head, generate_series(0, $1 - 1) n
)
INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome)
SELECT seq + n, $2, $2, 1, 1, 'delivered' FROM head, generate_series(0, $1 - 1) n
"""


async def old_week(database: Database) -> None:
    moment = await database.value("SELECT date_trunc('week', now()) - interval '69 days'")
    await database.fetch("SELECT postroom_make_partitions($1, 0)", moment)
    await database.fetch(_WEEK.replace("$1", f"{ITEMS}::bigint").replace("$2", "$1::timestamptz"), moment)


async def ask(database: Database) -> None:
    await database.fetch("SELECT postroom_request_job(now(), 'test', 'archive-partitions')")


_ARCHIVES = "SELECT name, partitions, state FROM postroom_archives"
_UNDER_WAY = f"{_ARCHIVES} WHERE state <> 'archived'"
_BUSY = """
SELECT j.requested_at IS NOT NULL
       OR EXISTS (SELECT FROM postroom_job_runs r WHERE r.job = j.name AND r.status = 'running')
  FROM postroom_jobs j WHERE j.name = 'archive-partitions'
"""


async def archiving(database: Database) -> bool:
    """Whether an archive is under way."""
    return bool(await database.fetch(_UNDER_WAY))


async def counted(database: Database, files: ArchiveFiles) -> int:
    """Items in tables, and in archives that are the only place; these are read back."""
    rows: int = await database.value("SELECT count(*) FROM whatsapp_messages_items")
    for row in await database.fetch(f"{_ARCHIVES} WHERE kind = 'messages'"):
        table = row["partitions"][0]
        if row["state"] == "archived":
            told = files.tables(row["name"])["items"]
            rows += sum(len(page) for page in files.rows(row["name"], "items", told))
        elif not await database.value("SELECT postroom_is_attached($1)", table):
            rows += await database.value(f'SELECT count(*) FROM "{table}"')
    return rows


async def rounds(home: Path, wanted: int, seed: int) -> None:
    random = Random(seed)
    files = ArchiveFiles(str(home / "data/archive"))
    common = ("--data-dir", home / "data")
    takes, done, states = 1.0, 0, []
    router = await RouterProcess(home, *common).ready()
    database = Database.of(home / "data")
    try:
        total = await counted(database, files)
        with trio.fail_after(60 + 20 * wanted):
            while done < wanted:
                await old_week(database)
                total += ITEMS
                await ask(database)
                while not await archiving(database):
                    await trio.sleep(0.005)
                await trio.sleep(random.uniform(0, takes))
                await router.kill()
                in_flight = await archiving(database)
                states += [row["state"] for row in await database.fetch(_UNDER_WAY)]
                assert await counted(database, files) == total
                assert (await database.recount()).ok
                router = await RouterProcess(home, *common).ready()
                began = trio.current_time()
                await ask(database)
                while await database.value(_BUSY):
                    await trio.sleep(0.02)
                takes = trio.current_time() - began
                assert await counted(database, files) == total
                conservation = await database.recount()
                assert conservation.ok, conservation.problems
                done += in_flight
        kit.say(f"{done} kills while an archive was under way, in the states {sorted(states)}")
    finally:
        router.end()


async def test_a_few_kills(home: Path) -> None:
    await rounds(home, 2, seed=1)


@pytest.mark.acceptance
async def test_thirty_kills(home: Path) -> None:
    await rounds(home, 30, seed=2)
