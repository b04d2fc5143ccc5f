"""The journal contract on the in-memory double."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from doubles import MemoryJournal
from journal_contract import CONTRACT, World


def memory_world() -> World:
    journal = MemoryJournal()

    async def end_epoch() -> None:
        journal.epoch += 1

    async def duplicates() -> int:
        return journal.duplicates

    async def outcomes() -> int:
        return len(journal.outcomes)

    async def outbox() -> int:
        return len(journal.outbox)

    return World(journal, journal.epoch, end_epoch, duplicates, outcomes, outbox)


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]]) -> None:
    await law(memory_world())
