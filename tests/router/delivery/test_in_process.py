"""A handler function's answer is its outcome; whatever else it does is a failed attempt, never a crash."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from tables import each

from actors.messages import Ack, Envelope, Reject, Reply, Retry, Session, SessionChange
from actors.ports import Unreadable
from router.delivery.in_process import open_lane

ENVELOPE = Envelope(
    id="msg_" + "0" * 32,
    message_id="wamid.1",
    domain="rides",
    session=Session(key="1:2", phone_number_id="1"),
    message={"id": "wamid.1"},
    received_at=datetime(2026, 1, 1, tzinfo=UTC),
    correlation_id="c-1",
)


async def attempt(function: Callable[[Envelope], Awaitable[Any]]) -> Any:
    async with open_lane("rides", function, lambda name: name == "rides")() as handler:
        return await handler.attempt(ENVELOPE)


async def returning(outcome: object) -> Any:
    async def handler(envelope: Envelope) -> Any:
        assert envelope is ENVELOPE
        return outcome

    return await attempt(handler)


@each(
    "outcome",
    [
        Ack(),
        Ack((Reply("hi"),), SessionChange(active_service="rides", state={"a": 1})),
        Retry(),
        Retry(5.0, "busy"),
        Reject("no"),
    ],
)
async def test_an_outcome_is_taken_as_it_is(outcome: object) -> None:
    assert await returning(outcome) == outcome


@each("outcome", [None, True, "ok", {"replies": []}, Ack])
async def test_anything_else_is_a_failed_attempt(outcome: object) -> None:
    result = await returning(outcome)
    assert isinstance(result, Retry)
    assert "not Ack, Retry or Reject" in result.reason


async def test_an_ack_that_cannot_be_committed_is_delivered_and_unreadable() -> None:
    assert isinstance(await returning(Ack(session=SessionChange(active_service="taxis"))), Unreadable)
    assert isinstance(await returning(Ack(None)), Unreadable)  # type: ignore[arg-type]


@each("after", [math.nan, math.inf, "5", []])
async def test_a_wait_that_is_no_time_leaves_it_to_the_router(after: Any) -> None:
    result = await returning(Retry(after))
    assert isinstance(result, Retry)
    assert result.after is None


async def test_a_reason_is_text() -> None:
    error: Any = ValueError("why")
    assert await returning(Retry(1, error)) == Retry(1, "why")
    assert await returning(Reject(error)) == Reject("why")


@pytest.mark.parametrize(
    "error", [ValueError("x"), ExceptionGroup("x", [KeyError("y")]), trio.TooSlowError()]
)
async def test_what_it_raises_is_a_failed_attempt_and_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(envelope: Envelope) -> Ack:
        raise error

    with caplog.at_level(logging.ERROR, "postroom.delivery"):
        result = await attempt(handler)
    assert result == Retry(reason=f"handler raised {type(error).__name__}")
    assert "handler raised" in caplog.text


async def test_a_function_that_is_not_async_is_a_failed_attempt() -> None:
    def handler(envelope: Envelope) -> Any:
        return Ack()

    assert await attempt(handler) == Retry(reason="handler raised TypeError")


async def test_a_deadline_cancels_it(autojump_clock: trio.testing.MockClock) -> None:
    cancelled = False

    async def handler(envelope: Envelope) -> Ack:
        nonlocal cancelled
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled = True
            raise
        return Ack()

    with trio.move_on_after(4) as scope:
        await attempt(handler)
    assert scope.cancelled_caught
    assert cancelled
    assert trio.current_time() == 4
