"""Addresses and actors: telling, asking, and what an asker learns when the actor dies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from actors.kernel import (
    Actor,
    ActorDied,
    Address,
    ChildSpec,
    MailboxClosed,
    MailboxFull,
    Promise,
    Strategy,
    Supervisor,
)


@dataclass
class Ask:
    text: str
    promise: Promise[str]


class Echo(Actor[Ask]):
    """Answers in capitals; crashes on "crash", and keeps "never" without an answer."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.gate: trio.Event | None = None

    async def started(self) -> None:
        self.log.append("started")

    async def receive(self, batch: list[Ask]) -> None:
        for ask in batch:
            self.log.append(ask.text)
            if ask.text == "crash":
                raise OSError(ask.text)
            if ask.text == "hold":
                await trio.sleep(1)
            if ask.text != "never":
                ask.promise.answer(ask.text.upper())

    async def stopped(self) -> None:
        self.log.append("stopped")


@asynccontextmanager
async def echo(
    capacity: int = 10, batch_limit: int | None = None
) -> AsyncIterator[tuple[Address[Ask], list[str], Supervisor]]:
    log: list[str] = []
    address: Address[Ask] = Address("echo", capacity, batch_limit=batch_limit)
    spec = ChildSpec("echo", lambda: address.run(Echo(log)), address.mailbox.close, address.bury)
    supervisor = Supervisor(
        "top",
        [spec],
        strategy=Strategy.ONE_FOR_ONE,
        max_restarts=5,
        period=60,
        on_crash=lambda name, crash: None,
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            yield address, log, supervisor
            nursery.cancel_scope.cancel()


async def asking(address: Address[Ask], text: str, answers: list[str]) -> None:
    try:
        answers.append(await address.ask(lambda promise: Ask(text, promise)))
    except ActorDied:
        answers.append(f"{text} died")


async def test_ask_gives_the_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with echo() as (address, _, _):
        assert await address.ask(lambda promise: Ask("a", promise)) == "A"
        assert await address.ask_nowait(lambda promise: Ask("b", promise)) == "B"
        address.tell_nowait(Ask("c", Promise()))
        await address.tell(Ask("d", Promise()))


async def test_messages_come_in_order_and_in_batches(autojump_clock: trio.testing.MockClock) -> None:
    async with echo(batch_limit=2) as (address, log, _):
        for text in "abcde":
            address.tell_nowait(Ask(text, Promise()))
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["started", *"abcde"]


async def test_a_full_mailbox_refuses_what_does_not_wait() -> None:
    address: Address[Ask] = Address("nobody", 1)
    address.tell_nowait(Ask("a", Promise()))
    with pytest.raises(MailboxFull):
        address.tell_nowait(Ask("b", Promise()))
    with pytest.raises(MailboxFull):
        await address.ask_nowait(lambda promise: Ask("c", promise))
    address.mailbox.close()
    with pytest.raises(MailboxClosed):
        await address.tell(Ask("d", Promise()))
    with pytest.raises(MailboxClosed):
        await address.ask(lambda promise: Ask("e", promise))


async def test_a_crash_ends_the_asks_that_were_in_hand(autojump_clock: trio.testing.MockClock) -> None:
    async with echo() as (address, log, _):
        answers: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking, address, "never", answers)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(asking, address, "crash", answers)
        assert sorted(answers) == ["crash died", "never died"]
        assert log == ["started", "never", "crash", "started"]


async def test_an_actor_that_crashes_before_the_asker_runs_again_still_ends_the_ask() -> None:
    """The actor may take the message and die within the checkpoint of the put itself."""
    for _ in range(20):  # trio decides at random who runs first
        async with echo() as (address, _, _):
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ActorDied):
                await address.ask(lambda promise: Ask("crash", promise))


async def test_an_actor_buried_before_the_asker_runs_again_still_ends_the_ask() -> None:
    address: Address[Ask] = Address("full", 1)
    address.tell_nowait(Ask("first", Promise()))
    answers: list[str] = []
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking, address, "waited", answers)
            await trio.testing.wait_all_tasks_blocked()
            address.mailbox.drain_nowait()  # "waited" is put, but its asker has not run yet
            address.bury()
    assert answers == ["waited died"]


async def test_asks_still_in_the_mailbox_survive_a_restart(autojump_clock: trio.testing.MockClock) -> None:
    async with echo(batch_limit=1) as (address, log, _):
        answers: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking, address, "hold", answers)
            await trio.testing.wait_all_tasks_blocked()
            for text in ("crash", "next"):
                nursery.start_soon(asking, address, text, answers)
                await trio.testing.wait_all_tasks_blocked()
        assert answers == ["HOLD", "crash died", "NEXT"]
        assert log == ["started", "hold", "crash", "started", "next"]


async def test_an_ask_waiting_for_room_survives_a_restart(autojump_clock: trio.testing.MockClock) -> None:
    async with echo(capacity=1, batch_limit=1) as (address, _, _):
        answers: list[str] = []
        async with trio.open_nursery() as nursery:
            for text in ("hold", "crash", "waited"):
                nursery.start_soon(asking, address, text, answers)
                await trio.testing.wait_all_tasks_blocked()
            assert address.mailbox.statistics().tasks_waiting_put == 1
        assert answers == ["HOLD", "crash died", "WAITED"]


async def test_a_drained_actor_answers_what_was_asked_before(autojump_clock: trio.testing.MockClock) -> None:
    async with echo(batch_limit=1) as (address, log, supervisor):
        answers: list[str] = []
        async with trio.open_nursery() as nursery:
            for text in ("hold", "a"):
                nursery.start_soon(asking, address, text, answers)
                await trio.testing.wait_all_tasks_blocked()
            await supervisor.drain()
        assert sorted(answers) == ["A", "HOLD"]
        assert log[-1] == "stopped"
        with pytest.raises(MailboxClosed):
            await address.ask(lambda promise: Ask("late", promise))


async def test_an_actor_that_stops_without_an_answer_ends_the_ask(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with echo() as (address, _, supervisor):
        answers: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking, address, "never", answers)
            await trio.testing.wait_all_tasks_blocked()
            await supervisor.drain()
        assert answers == ["never died"]


async def test_cancelling_an_actor_ends_the_asks_in_hand() -> None:
    address: Address[Ask] = Address("echo", 5)
    answers: list[str] = []
    scope = trio.CancelScope()

    async def incarnation() -> None:
        with scope:
            await address.run(Echo([]))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incarnation)
            nursery.start_soon(asking, address, "never", answers)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert answers == ["never died"]


async def test_a_cancelled_ask_leaves_its_message_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with echo() as (address, log, _):
        with trio.move_on_after(0.5):
            await address.ask(lambda promise: Ask("hold", promise))
        assert await address.ask(lambda promise: Ask("a", promise)) == "A"
        assert log == ["started", "hold", "a"]
        assert not address._asked


async def test_a_cancelled_ask_that_waits_for_room_was_not_asked() -> None:
    address: Address[Ask] = Address("full", 1)
    address.tell_nowait(Ask("first", Promise()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking, address, "second", [])
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [ask.text for ask in address.mailbox.drain_nowait()] == ["first"]


async def test_a_promise_is_settled_once() -> None:
    promise: Promise[int] = Promise()
    promise.answer(1)
    promise.answer(2)
    promise.fail(OSError())
    assert promise.done
    with trio.testing.assert_checkpoints():
        assert await promise.wait() == 1
    failed: Promise[int] = Promise()
    failed.fail(OSError("first"))
    failed.answer(3)
    with pytest.raises(OSError, match="first"):
        await failed.wait()


async def test_receive_must_be_overridden() -> None:
    with pytest.raises(NotImplementedError, match="Actor"):
        await Actor[int]().receive([1])
