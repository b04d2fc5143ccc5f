"""Ingress: one commit for all that waits, one answer for each delivery, duplicates cut out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing
from doubles import Answers, MemoryJournal, delivery, incoming
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import JournalRefused, JournalUnavailable
from actors.ingress import Ingress
from actors.kernel import Address
from actors.messages import Appended, Delivery, Duplicates, Item


class Edge:
    """An ingress on a MemoryJournal, with what it told others."""

    def __init__(self, *, max_rows: int = 100, max_bytes: int = 10_000) -> None:
        self.journal = MemoryJournal()
        self.fed: list[tuple[int, int, list[Item]]] = []
        self.looked = 0
        self.refused: list[JournalUnavailable] = []
        self.ingress = Ingress(
            self.journal,
            feed=lambda first, last, items: self.fed.append((first, last, items)),
            look=self._look,
            max_rows=max_rows,
            max_bytes=max_bytes,
            on_refused=self.refused.append,
        )

    def _look(self) -> None:
        self.looked += 1


async def test_a_batch_is_one_flush_and_is_answered_after_it() -> None:
    edge, answers = Edge(), Answers()

    async def nothing_answered_yet(method: str) -> None:
        assert answers.given == []

    edge.journal.before = nothing_answered_yet
    await edge.ingress.receive([delivery(incoming(name), answers=answers) for name in "abc"])
    assert answers.given == [True] * 3
    assert edge.journal.calls["append"] == 1
    [(first, last, items)] = edge.fed
    assert (first, last, [item.seq for item in items]) == (1, 3, [1, 2, 3])
    assert items == edge.journal.items


async def test_flushes_are_bounded_by_rows_and_bytes() -> None:
    edge, answers = Edge(max_rows=2, max_bytes=100), Answers()
    batch = [
        delivery(
            incoming("a"), incoming("b"), incoming("c"), answers=answers
        ),  # alone, it is more than a flush
        delivery(incoming("d"), answers=answers),
        delivery(incoming("e"), answers=answers, size=95),
        delivery(incoming("f"), answers=answers),
    ]
    await edge.ingress.receive(batch)
    assert [(first, last) for first, last, _ in edge.fed] == [(1, 3), (4, 4), (5, 5), (6, 6)]
    assert answers.given == [True] * 4


async def test_duplicates_are_cut_out_and_tallied() -> None:
    edge, answers = Edge(), Answers()
    await edge.ingress.receive([delivery(incoming("a"))])
    await edge.ingress.receive(
        [
            delivery(incoming("x"), incoming("a"), incoming("y"), answers=answers),
            delivery(incoming("a"), incoming("y"), answers=answers),  # "y" is twice in this flush
        ]
    )
    assert answers.given == [True, True]
    assert [item.key for item in edge.fed[1][2]] == [f"msg_{incoming(name).key.hex()}" for name in "xy"]
    assert edge.journal.duplicates == edge.ingress.statistics.duplicates == 3
    assert edge.ingress.statistics.items == 3


async def test_a_flush_of_duplicates_alone_leaves_only_tallies() -> None:
    edge, answers = Edge(), Answers()
    await edge.ingress.receive([delivery(incoming("a"))])
    await edge.ingress.receive([delivery(incoming("a"), answers=answers)])
    assert answers.given == [True]
    assert len(edge.fed) == 1
    assert (len(edge.journal.items), edge.journal.duplicates) == (1, 1)


async def test_an_unavailable_journal_refuses_its_flush_and_no_other() -> None:
    edge, answers = Edge(max_rows=1), Answers()
    edge.journal.fail("append")
    await edge.ingress.receive([delivery(incoming(name), answers=answers) for name in "ab"])
    assert answers.given == [False, True]
    assert len(edge.refused) == edge.ingress.statistics.refused == 1
    assert [item.message_id for item in edge.journal.items if item] == ["wamid.b"]


@pytest.mark.parametrize("bad", [{"c"}, {"a", "g"}, set("abcdefg")])
async def test_what_the_database_refuses_is_refused_alone(bad: set[str]) -> None:
    class Picky(MemoryJournal):
        async def append(
            self, deliveries: Sequence[Delivery], *, duplicates: int
        ) -> Appended | Duplicates | None:
            if bad & {item.path for one in deliveries for item in one.items}:
                raise JournalRefused("append")
            return await super().append(deliveries, duplicates=duplicates)

    edge = Edge()
    edge.journal = edge.ingress._journal = Picky()
    answers = {name: Answers() for name in "abcdefg"}
    batch = [delivery(incoming(name), incoming(name.upper()), answers=one) for name, one in answers.items()]
    for one, name in zip(batch, answers, strict=True):
        one.items[0].path = name
    await edge.ingress.receive(batch)
    assert {name for name, one in answers.items() if one.given == [False]} == bad
    assert {name for name, one in answers.items() if one.given == [True]} == set(answers) - bad
    assert edge.ingress.statistics.refused == len(edge.refused) == len(bad)
    kept = [item.message_id for item in edge.journal.items if item]
    assert kept == [f"wamid.{one}" for name in "abcdefg" if name not in bad for one in (name, name.upper())]


async def test_a_commit_found_after_doubt_is_answered_and_looked_for() -> None:
    edge, answers = Edge(), Answers()
    edge.journal.fail("append", MemoryJournal.DOUBT)
    await edge.ingress.receive([delivery(incoming("a"), answers=answers)])
    assert (answers.given, edge.looked, edge.fed) == ([True], 1, [])


async def test_a_crash_answers_every_delivery_of_the_batch_once() -> None:
    edge = Edge(max_rows=1)
    answers = [Answers() for _ in range(3)]
    edge.journal.fail("append", None, ArithmeticError("bug"))
    with pytest.raises(ArithmeticError):
        await edge.ingress.receive(
            [delivery(incoming(name), answers=one) for name, one in zip("abc", answers, strict=True)]
        )
    assert [one.given for one in answers] == [[True], [False], [False]]


async def test_a_feed_that_crashes_does_not_take_an_answer_back() -> None:
    answers = [Answers(), Answers()]

    def crash(first: int, last: int, items: list[Item]) -> None:
        raise ArithmeticError("bug")

    ingress = Ingress(
        MemoryJournal(),
        feed=crash,
        look=lambda: None,
        max_rows=1,
        max_bytes=100,
        on_refused=lambda error: None,
    )
    with pytest.raises(ArithmeticError):
        await ingress.receive(
            [delivery(incoming(name), answers=one) for name, one in zip("ab", answers, strict=True)]
        )
    assert [one.given for one in answers] == [[True], [False]]


async def test_cancellation_answers_what_is_in_hand() -> None:
    edge, answers = Edge(max_rows=1), Answers()

    async def hang(method: str) -> None:
        await trio.sleep_forever()

    edge.journal.before = hang
    async with trio.open_nursery() as nursery:
        nursery.start_soon(edge.ingress.receive, [delivery(incoming(name), answers=answers) for name in "ab"])
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert answers.given == [False, False]


async def test_what_waits_while_a_commit_runs_goes_into_the_next_one() -> None:
    edge, answers = Edge(), Answers()
    gate = trio.Event()

    async def wait(method: str) -> None:
        await gate.wait()

    edge.journal.before = wait
    address: Address[Delivery] = Address("ingress", 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(address.run, edge.ingress)
        for name in "abcdef":
            address.tell_nowait(delivery(incoming(name), answers=answers))
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
        address.mailbox.close()
    assert edge.journal.calls["append"] == 2
    assert answers.given == [True] * 6


@given(
    bodies=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5), max_size=12),
    max_rows=st.integers(1, 6),
    failures=st.lists(st.booleans(), max_size=6),
)
def test_each_key_is_stored_once_and_each_delivery_answered_once(
    bodies: list[list[str]], max_rows: int, failures: list[bool]
) -> None:
    async def main() -> None:
        edge = Edge(max_rows=max_rows)
        edge.journal.fail("append", *(JournalUnavailable("away") if failed else None for failed in failures))
        answers = [Answers() for _ in bodies]
        await edge.ingress.receive(
            [delivery(*map(incoming, body), answers=one) for body, one in zip(bodies, answers, strict=True)]
        )
        assert all(len(one.given) == 1 for one in answers)
        stored = [item.message_id for item in edge.journal.items if item]
        assert len(stored) == len(set(stored))
        taken = {
            name for body, one in zip(bodies, answers, strict=True) if one.given == [True] for name in body
        }
        assert set(stored) == {f"wamid.{name}" for name in taken}
        assert [item for _, _, items in edge.fed for item in items] == edge.journal.items
        received = sum(len(body) for body, one in zip(bodies, answers, strict=True) if one.given == [True])
        assert received == len(stored) + edge.journal.duplicates

    if bodies:
        trio.run(main)
