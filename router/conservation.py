"""Recounts every item from the tables and holds the tallies against them: each is in exactly one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import asyncpg

from router.postgres.statements import statements

_SQL = statements("check")


@dataclass(frozen=True, slots=True)
class Conservation:
    """`places` counts items by where they are, `replies` those in the outbox by status; `problems` names
    every disagreement found."""

    received: int
    duplicates: int
    places: dict[str, int]
    dead_letters: dict[str, int]
    replies: dict[str, int]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "conservation": "ok" if self.ok else "broken",
            "received": self.received,
            "duplicates": self.duplicates,
            "places": self.places,
            "dead_letters": self.dead_letters,
            "replies": self.replies,
            "problems": list(self.problems),
        }


async def recount(connection: asyncpg.Connection) -> Conservation:
    """One snapshot of everything; reads only."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        counts = dict(await connection.fetchrow(_SQL["counts"]))
        counts["undelivered"] = await connection.fetchval(_SQL["undelivered_count"])
        missing = [(row["first"], row["last"]) for row in await connection.fetch(_SQL["missing_items"])]
        strays = [(row["problem"], row["seq"]) for row in await connection.fetch(_SQL["strays"])]
    return judge(counts, missing, strays)


def judge(
    counts: dict[str, int], missing: list[tuple[int, int]], strays: list[tuple[str, int]]
) -> Conservation:
    """What the counts say. Pure."""
    problems = [
        f"item {first} is missing" if first == last else f"items {first} to {last} are missing"
        for first, last in missing
    ]
    problems += [f"{problem}: item {seq}" for problem, seq in strays]
    c = counts
    for name, tally, counted in (
        ("received", c["received"], c["duplicates"] + c["items"]),
        ("journaled", c["journaled"], c["items"]),
        ("malformed", c["malformed"], c["items_malformed"]),
        ("erased", c["erased"], c["items_erased"]),
        ("handled at once", c["handled_at_once"], c["items_handled"]),
        ("handled", c["handled"], c["outcomes_handled"]),
        ("delivered", c["delivered"], c["outcomes_delivered"]),
        ("rejected", c["rejected"], c["outcomes_rejected"]),
        ("dead letters", c["dead_letter"], c["outcomes_dead_letter"]),
        ("deferred", c["deferred"], c["outcomes_deferred"]),
        ("discarded", c["discarded"], c["outcomes_discarded"]),
        ("open items", c["items_open"], c["outcomes"] + c["undelivered"]),
    ):
        if tally != counted:
            problems.append(f"{name}: the tally says {tally}, the tables say {counted}")
    return Conservation(
        received=c["received"],
        duplicates=c["duplicates"],
        places={
            "malformed": c["items_malformed"],
            "handled": c["items_handled"] + c["outcomes_handled"],
            "delivered": c["outcomes_delivered"],
            "rejected": c["outcomes_rejected"],
            "dead_letter": c["outcomes_dead_letter"],
            "deferred": c["outcomes_deferred"],
            "discarded": c["outcomes_discarded"],
            "erased": c["items_erased"],
            "undelivered": c["undelivered"],
        },
        dead_letters={
            "pending": c["letters_pending"],
            "processing": c["letters_processing"],
            "failed": c["letters_failed"],
            "reprocessed": c["letters_reprocessed"],
        },
        replies={
            "unsent": c["replies_unsent"],
            "pending": c["replies_pending"],
            "sent": c["replies_sent"],
            "failed": c["replies_failed"],
        },
        problems=tuple(problems),
    )
