"""From the spool to the journal: everything, once, in order, while more comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio
from doubles import Answers, MemoryJournal, delivery, incoming

from actors.errors import JournalRefused, JournalUnavailable
from actors.ingress import Ingress
from actors.messages import Appended, Delivery, Duplicates, Item, Spooled
from actors.unspooler import Unspooler
from router.spool.directory import SpoolDirectory


class Away(MemoryJournal):
    """A journal that is away while `away`, and refuses what is in `hated`."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.hated: set[str] = set()

    async def append(
        self, deliveries: Sequence[Delivery], *, duplicates: int
    ) -> Appended | Duplicates | None:
        if self.away:
            await trio.lowlevel.checkpoint()
            raise JournalUnavailable("away")
        if self.hated & {item.message_id for one in deliveries for item in one.items}:
            raise JournalRefused("append")
        return await super().append(deliveries, duplicates=duplicates)

    @property
    def texts(self) -> list[str]:
        return [item.message["text"]["body"] for item in self.items if item is not None]


class House:
    def __init__(self, root: Path) -> None:
        self.journal = Away()
        self.fed: list[Item] = []
        self.troubles: list[str] = []
        self.reached = True
        self.emptied: list[int] = []
        self.in_trouble, self.empty_again = trio.Event(), trio.Event()
        self.spool = SpoolDirectory(root, max_bytes=1_000_000, report=lambda event, details: None)
        self.ingress = Ingress(
            self.journal,
            feed=lambda first, last, items: self.fed.extend(items),
            look=lambda: None,
            max_rows=7,
            max_bytes=100_000,
            on_refused=lambda error: self.troubles.append(str(error)),
            spool=self.spool,
        )
        self.unspooler = Unspooler(
            self.spool,
            self.ingress,
            split=self._split,
            on_trouble=self._on_trouble,
            on_emptied=self._on_emptied,
            retry_after=0.01,
        )

    def _on_trouble(self, error: Exception) -> None:
        self.troubles.append(str(error))
        self.in_trouble.set()

    def _on_emptied(self, brought: int) -> None:
        self.emptied.append(brought)
        self.empty_again.set()

    def _split(self, spooled: Spooled) -> Delivery | None:
        return self.said(spooled.body.decode()) if self.reached else None

    def said(self, name: str, answers: Answers | None = None) -> Delivery:
        one = delivery(replace(incoming(name), key=name.encode().ljust(16)), answers=answers)
        one.body = name.encode()
        return one

    async def say(self, *names: str) -> list[bool]:
        answers = Answers()
        await self.ingress.receive([self.said(name, answers) for name in names])
        return answers.given

    async def tried(self) -> None:
        """The unspooler has found that it cannot bring anything yet."""
        with trio.fail_after(20):
            await self.in_trouble.wait()

    async def settled(self) -> None:
        with trio.fail_after(20):
            while not self.spool.is_empty:  # noqa: ASYNC110  # a thread empties it
                await trio.sleep(0.005)


@asynccontextmanager
async def house(root: Path) -> AsyncIterator[House]:
    made = House(root)
    await made.spool.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.unspooler.run)
        yield made
        made.unspooler.stop()
    made.spool.close()


async def test_while_the_journal_is_away_everything_waits_in_order(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        assert await home.say("a") == [True]
        home.journal.away = True
        assert await home.say("b", "c") == [True, True]
        assert await home.say("d") == [True]
        await home.tried()
        assert home.journal.texts == ["a"]
        home.journal.away = False
        await home.settled()
        assert await home.say("e") == [True]
        assert home.journal.texts == list("abcde")
        assert [item.message["text"]["body"] for item in home.fed] == list("abcde")
        assert home.ingress.statistics.spooled == 3
        with trio.fail_after(20):  # the last file is removed after the spool is empty, and said after that
            await home.empty_again.wait()
        assert (home.troubles, home.emptied) == (["away"], [3])


async def test_what_comes_while_it_is_brought_comes_after_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        home.journal.away = True
        for number in range(50):
            await home.say(f"{number}")

        async def slowly(method: str) -> None:
            await trio.sleep(0.01)

        home.journal.before = slowly
        home.journal.away = False
        for number in range(50, 120):
            assert await home.say(f"{number}") == [True]
        await home.settled()
        await home.say("120")
        assert home.journal.texts == [str(number) for number in range(121)]


async def test_under_load_it_becomes_empty_all_the_same(tmp_path: Path) -> None:
    """While one page is brought more comes, each time."""
    async with house(tmp_path) as home:
        home.journal.away = True
        await home.say("first")
        said = 0

        async def slowly(method: str) -> None:
            await trio.sleep(0.02)

        home.journal.before = slowly
        home.journal.away = False
        with trio.fail_after(20):
            while home.ingress.statistics.spooled == said + 1:
                said += 1
                assert await home.say(str(said)) == [True]
        assert said > 1
        await home.settled()
        assert home.journal.texts == ["first", *(str(number) for number in range(1, said + 1))]


async def test_what_the_journal_has_already_is_a_duplicate(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.say("a")
        home.journal.away = True
        await home.say("a", "b", "b")
        home.journal.away = False
        await home.settled()
        assert home.journal.texts == ["a", "b"]
        assert home.journal.duplicates == 2


async def test_one_that_is_refused_holds_up_no_other(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        home.journal.away = True
        home.journal.hated = {"wamid.d"}
        await home.say(*"abcdefg")
        home.journal.away = False
        await home.settled()
        assert home.journal.texts == list("abcefg")
    [kept] = (tmp_path / "refused").iterdir()
    assert kept.read_bytes() == b"d"


async def test_before_the_database_was_reached_nothing_is_split(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        home.reached = False
        answers = Answers()
        unsplit = Delivery("app", b"a", [], "c", None, lambda whole, gone: None, answers.given.append)
        await home.ingress.receive([unsplit])
        assert answers.given == [True]
        await home.say("b")
        await home.tried()
        assert home.journal.texts == []
        home.reached = True
        await home.settled()
        assert home.journal.texts == ["a", "b"]


async def test_what_cannot_be_spooled_is_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        home.spool._max_bytes = 1
        home.journal.away = True
        assert await home.say("aa") == [False]
        assert home.ingress.statistics.refused == 1
        home.journal.away = False
        assert await home.say("bb") == [True]
        assert home.journal.texts == ["bb"]


async def test_a_new_process_brings_what_the_old_one_left(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        home.journal.away = True
        await home.say("a", "b")
    async with house(tmp_path) as home:
        await home.settled()
        assert home.journal.texts == ["a", "b"]
