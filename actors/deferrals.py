"""Which conversations wait behind a dead letter: later messages of a (session, service) pair that has one
which keeps the order become dead letters too, and the retrier delivers them in turn.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from .errors import JournalUnavailable
from .messages import Completion
from .ports import Journal

Pair = tuple[str, str]  # session key, service


class Deferrals:
    """What the tables say, and what is on its way there. A pair is held from the moment of the decision; it
    is let go by `refresh` only, which asks the tables: operators act on them without telling anybody.
    """

    def __init__(self, journal: Journal, *, retry_after: float = 0.5) -> None:
        self._journal = journal
        self._retry_after = retry_after
        self._held: set[Pair] = set()
        self._uncommitted: dict[Pair, set[int]] = {}
        self._decisions = 0
        self._decided: dict[Pair, int] = {}  # the last decision about a pair since the last refresh began

    def holds(self, key: str, service: str) -> bool:
        """A message of that session for this service has to wait for an earlier one."""
        return (key, service) in self._held

    def hold(self, key: str, service: str, seq: int) -> None:
        """The message `seq` becomes such a dead letter."""
        pair = (key, service)
        self._held.add(pair)
        self._uncommitted.setdefault(pair, set()).add(seq)
        self._decisions += 1
        self._decided[pair] = self._decisions

    def committed(self, completions: Iterable[Completion]) -> None:
        """These are in the tables now."""
        if not self._uncommitted:
            return
        for completion in completions:
            pair = (completion.item.session_key, completion.service or "")
            seqs = self._uncommitted.get(pair)
            if seqs is not None:
                seqs.discard(completion.item.seq)
                if not seqs:
                    del self._uncommitted[pair]

    async def refresh(self) -> None:
        """Let go of whom no dead letter holds any more.

        Raises:
            JournalUnavailable: all is held as before.
        """
        before = self._decisions
        on_the_way = set(self._uncommitted)
        stored = await self._journal.held_pairs()
        self._decided = {pair: number for pair, number in self._decided.items() if number > before}
        self._held = {*stored, *on_the_way, *self._decided}

    async def load(self) -> None:
        """`refresh`, as soon as the journal is there."""
        while True:
            try:
                return await self.refresh()
            except JournalUnavailable:
                await trio.sleep(self._retry_after)
