"""Recounts every item from the tables and holds the tallies against them: each is in exactly one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.postgres.statements import statements

_SQL = statements("check")
_LONG = 3_600.0  # seconds: whole tables are read
_SUSPICIOUS = (
    "items_without_event",
    "items_of_no_session",
    "outcomes_without_item",
    "outcomes_of_no_session",
    "letters_astray",
)


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
    """One snapshot of everything; reads only. What is astray is looked for by name only where the counts say
    that there is something."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        live = dict(await connection.fetchrow(_SQL["recount"], timeout=_LONG))
        tallies = dict(await connection.fetchrow(_SQL["tallies"]))
        archived = dict(await connection.fetchrow(_SQL["archived"]))
        counts = {**tallies, **live, **{name: live[name] + count for name, count in archived.items()}}
        counts["undelivered"] = await connection.fetchval(_SQL["undelivered_count"])
        missing, strays = [], []
        last = counts["journaled"]
        if (counts["items"], counts["seqs"]) != (last, last * (last + 1) // 2):
            rows = await connection.fetch(_SQL["missing_items"], timeout=_LONG)
            missing = [(row["first"], row["last"]) for row in rows]
        lettered = live["outcomes_dead_letter"] + live["outcomes_rejected"] + live["outcomes_deferred"]
        if (
            any(live[name] for name in _SUSPICIOUS)
            or live["outcomes_with_letter"] != lettered
            or counts["items_open"] != counts["outcomes"] + counts["undelivered"]
        ):
            rows = await connection.fetch(_SQL["strays"], timeout=_LONG)
            strays = [(row["problem"], row["seq"]) for row in rows]
    return judge(counts, missing, strays)


def judge(
    counts: Mapping[str, int], missing: list[tuple[int, int]], strays: list[tuple[str, int]]
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
