"""The contract of statuses on the in-memory double."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import count

import pytest
from doubles import START
from memory_statuses import MemoryStatuses
from statuses_contract import CONTRACT, World


def memory_world() -> World:
    now = [START]
    log = MemoryStatuses(clock=lambda: now[0])
    service_of: dict[str, str] = {}
    numbers = count(1)

    async def sent(service: str) -> str:
        message = f"rpl_{next(numbers)}"
        service_of[message] = service
        return message

    async def happened(message: str, status: str) -> None:
        log.happened(service_of[message], message, status)

    def wait(seconds: float) -> None:
        now[0] += timedelta(seconds=seconds)

    async def end_epoch() -> None:
        log.epoch += 1

    return World(log, log.epoch, sent, happened, wait, end_epoch)


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]]) -> None:
    await law(memory_world())
