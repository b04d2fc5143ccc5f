"""The completer: batches, in order, through an absence of the database, and never after the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing
from doubles import Counterpart, MemoryJournal, delivery, incoming, service_spec, tree_spec

from actors.completer import Completer
from actors.errors import JournalUnavailable, LeaseLost
from actors.kernel import Address
from actors.messages import Completion, DeadLetter, Place
from actors.tree import DeliveryTree


class Desk:
    """A completer on a MemoryJournal with five messages."""

    def __init__(self, *, max_rows: int = 10, epoch: int = 1) -> None:
        self.journal = MemoryJournal()
        self.journal.commit([delivery(*(incoming(name, name) for name in "abcde"))])
        self.marks = (1, [4])
        self.committed: list[tuple[list[int], list[int]]] = []
        self.unavailable: list[JournalUnavailable] = []
        self.completer = Completer(
            self.journal,
            epoch=epoch,
            marks=lambda: self.marks,
            on_committed=self._on_committed,
            on_unavailable=self.unavailable.append,
            max_rows=max_rows,
        )

    def _on_committed(self, completions: list[Completion], stragglers: list[int]) -> None:
        assert all(done.item.seq in self.journal.outcomes for done in completions), "told before the commit"
        self.committed.append(([done.item.seq for done in completions], stragglers))

    def done(self, seqs: Sequence[int] = (1, 2, 3, 4, 5)) -> list[Completion]:
        items = [self.journal.items[seq - 1] for seq in seqs]
        return [
            Completion(item=item, place=Place.DELIVERED, service="rides", rule="keyword", attempts=1)
            for item in items
            if item is not None
        ]


async def test_a_batch_is_committed_in_order_with_the_marks() -> None:
    desk = Desk(max_rows=2)
    await desk.completer.receive(desk.done())
    assert desk.committed == [([1, 2], [4]), ([3, 4], [4]), ([5], [4])]
    assert desk.journal.calls["complete"] == 3


async def test_commits_are_some_time_apart_but_for_those_of_dead_letters(
    autojump_clock: trio.testing.MockClock,
) -> None:
    desk = Desk()
    await desk.completer.receive(desk.done([1]))
    assert trio.current_time() == pytest.approx(0.01)
    await desk.completer.receive(desk.done([2]))
    assert trio.current_time() == pytest.approx(0.02)
    [done] = desk.done([3])
    letter = DeadLetter(status="pending", resolution=None, error="down", retry_in=0.0)
    await desk.completer.receive([replace(done, place=Place.DEAD_LETTER, dead_letter=letter)])
    assert trio.current_time() == pytest.approx(0.03)
    [claimed] = await desk.journal.claim_dead_letters(1, 1, ["rides"])
    await desk.completer.receive([replace(done, item=claimed)])
    assert trio.current_time() == pytest.approx(0.03)


async def test_an_unavailable_journal_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    desk = Desk()
    desk.journal.fail("complete", *(JournalUnavailable(str(number)) for number in range(8)))
    await desk.completer.receive(desk.done())
    assert len(desk.unavailable) == 8
    assert desk.committed == [([1, 2, 3, 4, 5], [4])]
    waited = trio.current_time()
    assert waited == pytest.approx(0.2 + 0.4 + 0.8 + 1.6 + 3.2 + 5 + 5 + 5)


async def test_the_marks_are_those_of_the_attempt_that_succeeds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    desk = Desk()
    desk.journal.fail("complete")

    async def move(method: str) -> None:
        if desk.journal.calls["complete"] == 1:
            desk.marks = (3, [4, 5])

    desk.journal.before = move
    await desk.completer.receive(desk.done([1]))
    assert desk.committed == [([1], [4, 5])]
    assert desk.journal.low_water == 3


async def test_a_lost_lease_is_a_crash_and_nothing_is_reported() -> None:
    desk = Desk(epoch=7)
    with pytest.raises(LeaseLost):
        await desk.completer.receive(desk.done())
    assert desk.committed == []
    assert desk.journal.outcomes == {}


async def test_a_cancelled_commit_is_not_reported(autojump_clock: trio.testing.MockClock) -> None:
    desk = Desk()

    async def hang(method: str) -> None:
        await trio.sleep_forever()

    desk.journal.before = hang
    with trio.move_on_after(1):
        await desk.completer.receive(desk.done())
    assert desk.committed == []


async def test_what_finishes_during_a_commit_goes_into_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    desk = Desk()
    gate = trio.Event()

    async def wait(method: str) -> None:
        await gate.wait()

    desk.journal.before = wait
    address: Address[Completion] = Address("completer", 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(address.run, desk.completer)
        for completion in desk.done():
            await address.tell(completion)
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
        address.mailbox.close()
    assert [seqs for seqs, _ in desk.committed] == [[1], [2, 3, 4, 5]]


async def test_a_crash_restarts_all_that_hand_it_outcomes(autojump_clock: trio.testing.MockClock) -> None:
    """In the tree: completer, services, loader and dispatcher start again, and nothing is left undone."""
    journal = MemoryJournal()
    counterpart = Counterpart()
    reports: list[tuple[str, str]] = []
    spec = tree_spec(
        journal,
        service_spec("rides", counterpart.lane, lanes=2, timeout=4),
        report=lambda name, error: reports.append((name, type(error).__name__)),
    )
    tree = DeliveryTree(spec, epoch=1, may_attempt=lambda: True, on_lease_lost=lambda: None)

    def say(*texts: str) -> None:
        for text in texts:
            message = replace(incoming(text[-8:]), message={"type": "text", "text": {"body": text}})
            journal.commit([delivery(message)])

    say("rides:1", "rides:2")
    journal.fail("complete", ArithmeticError("bug"))
    with trio.fail_after(200):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.run)
            await trio.sleep(5)
            assert sorted(journal.outcomes) == [1, 2]
            assert reports == [("completer", "ArithmeticError")]
            say("rides:3")
            tree.look()
            await trio.sleep(20)
            assert tree.dispatcher is not None
            assert tree.dispatcher.statistics().live_sessions == 0  # nothing counts as uncommitted
            await tree.drain()
    assert sorted(journal.outcomes) == [1, 2, 3]
    assert counterpart.open_lanes == 0
