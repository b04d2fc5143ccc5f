"""What it costs that a table is watched by the audit log: time and bytes of WAL of each changed row, beside
the same statements on the same table unwatched. A part of `python -m bench storage`.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg

from bench.databases import migrated
from bench.verdicts import ratio

# As a table of payments is: a uuid as its key, and a dozen columns of which two change.
_TABLE = """
CREATE TABLE payments (
    id uuid PRIMARY KEY, n bigint UNIQUE, payer text NOT NULL, amount numeric NOT NULL,
    currency text NOT NULL, status text NOT NULL, provider text NOT NULL, reference text NOT NULL,
    detail jsonb NOT NULL, created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL
);
INSERT INTO payments
SELECT gen_random_uuid(), n, '250788000001', n, 'RWF', 'pending', 'momo', 'reference ' || n,
       '{"memo": "rides"}', now(), now() FROM generate_series(1, 2000) n;
ANALYZE payments;
"""
_UPDATE = """
UPDATE payments SET status = $3, updated_at = clock_timestamp()
 WHERE n > $1::bigint AND n <= $1::bigint + $2::bigint
"""


@dataclass(frozen=True)
class Watched:
    """Medians for each changed row, by the rows of one statement: microseconds and bytes of WAL."""

    rows: int
    plain_us: float
    watched_us: float
    plain_wal: float
    watched_wal: float

    @property
    def times(self) -> float | None:
        return ratio(self.watched_us, self.plain_us)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "times": self.times}


async def _round(connection: asyncpg.Connection, rows: int, turn: int) -> tuple[float, float]:
    """Seconds and bytes of WAL of a row, over 2,000 rows."""
    statement = await connection.prepare(_UPDATE)
    before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
    began = time.perf_counter()
    for start in range(0, 2_000, rows):
        await statement.fetch(start, rows, f"status {turn}")
    seconds = time.perf_counter() - began
    wal = await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", before)
    return seconds / 2_000, float(wal) / 2_000


async def measured(home: Path, rounds: int, progress: Callable[[str], None]) -> list[Watched]:
    """One row and a hundred in a statement, watched and not, in turns. Commits are not waited for: one costs
    the same in both.
    """
    async with migrated(home) as (bridge, dsn):

        async def work() -> list[Watched]:
            connection = await asyncpg.connect(dsn)
            try:
                await connection.execute("SET synchronous_commit = off")
                await connection.execute(_TABLE)
                return [await _pair(connection, rows, rounds) for rows in (1, 100)]
            finally:
                await connection.close()

        found = await bridge.run(work)
        for one in found:
            progress(
                f"{one.rows} row(s) a statement: {one.plain_us:,.0f} us a row, "
                f"watched {one.watched_us:,.0f} us"
            )
        return found


async def _pair(connection: asyncpg.Connection, rows: int, rounds: int) -> Watched:
    plain, watched = [], []
    for turn in range(rounds + 1):
        await connection.execute("SELECT postroom_stop_audit('payments')")
        await connection.execute("CHECKPOINT")
        one = await _round(connection, rows, 2 * turn)
        await connection.execute("SELECT postroom_audit('payments', '{updated_at}')")
        await connection.execute("CHECKPOINT")
        other = await _round(connection, rows, 2 * turn + 1)
        if turn:  # the first is to warm up
            plain.append(one)
            watched.append(other)
    return Watched(
        rows,
        median(seconds for seconds, _ in plain) * 1e6,
        median(seconds for seconds, _ in watched) * 1e6,
        median(wal for _, wal in plain),
        median(wal for _, wal in watched),
    )
