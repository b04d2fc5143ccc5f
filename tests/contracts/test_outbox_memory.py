"""The outbox contract on the in-memory double."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from doubles import START
from memory_outbox import MemoryOutbox
from outbox_contract import CONTRACT, Row, World


def memory_world() -> World:
    now = [START]
    outbox = MemoryOutbox(clock=lambda: now[0])

    async def put(recipient: str, *texts: str) -> None:
        outbox.put(f"100:{recipient}", *texts)

    def wait(seconds: float) -> None:
        now[0] += timedelta(seconds=seconds)

    async def end_epoch() -> None:
        outbox.epoch += 1

    async def rows() -> dict[str, Row]:
        return {
            row.message.message["text"]["body"]: Row(
                row.status, row.message.attempts, row.message_id, row.error
            )
            for row in outbox.rows
        }

    return World(outbox, outbox.epoch, put, wait, end_epoch, rows)


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]]) -> None:
    await law(memory_world())
