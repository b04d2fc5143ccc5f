"""Feeds sessions from the journal, in journal order. The journal is the queue: what a session cannot
take now stays there, and only its seq (8 bytes) is remembered here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import trio

from .errors import JournalUnavailable
from .kernel import Family, MailboxClosed, MailboxFull
from .kernel.family import FamilyChild
from .lines import Lines
from .messages import Completion, Item, Turn
from .ports import Journal

P = ParamSpec("P")
T = TypeVar("T")

_PAGE = 64  # seqs in one read of the journal
_AT_ONCE = 4  # sessions that get theirs before all else has a turn: what just came waits for no more
_LONGEST_REST = 0.05  # seconds between two reads: one may have waited for the database
_BUFFERED = 64  # flushes of this process kept while the tail is read
_WINDOW = 20_000  # unfinished span beyond which old seqs are set apart as stragglers


@dataclass(slots=True)
class _Conversation:
    """What this process knows of one session that has undelivered messages."""

    held: deque[Item] = field(default_factory=deque)  # given to the live child, oldest first
    backlog: deque[int] = field(default_factory=deque)  # only in the journal, oldest first
    uncommitted: deque[Item] = field(default_factory=deque)  # finished by the child, not yet committed
    committed_early: bool = False  # the oldest held one, before the child could say that it is finished
    in_line: bool = False  # for a service
    window: int | None = None  # items read for it at once, after it had to give some back; None: all it holds
    queued: bool = False  # in the ready line or being paged in


@dataclass(frozen=True, slots=True)
class DispatcherStatistics:
    """What is undelivered and where: with live sessions, in the backlog, and behind full services."""

    undelivered: int
    held: int
    backlog: int
    live_sessions: int
    waiting_for: dict[str, int]
    newest: int
    low_water: int
    crashes: int


class Dispatcher:
    """Owned by one task tree; all methods that are not async return at once.

    `hold` (K) bounds what one session holds, `max_live` how many sessions are live, `max_backlog` how
    many seqs are remembered: beyond it the tail of the journal is not read on. `patience` gives the seconds
    that a session stands in line for a service which meanwhile takes nothing.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        make: Callable[[str], FamilyChild[Item]],
        hold: int,
        max_live: int,
        max_backlog: int,
        idle: float,
        sweep_every: float,
        on_crash: Callable[[str, Exception], None],
        on_replay_lost: Callable[[Item], None],
        patience: Callable[[str], float],
        retry_after: float = 0.5,
    ) -> None:
        self._journal = journal
        self._hold = hold
        self._max_live = max_live
        self._max_backlog = max_backlog
        self._sweep_every = sweep_every
        self._on_crash = on_crash
        self._on_replay_lost = on_replay_lost
        self._retry_after = retry_after
        self._family: Family[str, Item] = Family(make, capacity=hold, idle=idle, on_end=self._ended)
        self._conversations: dict[str, _Conversation] = {}
        self._ready: deque[str] = deque()
        self._lines = Lines(patience=patience, leave=self._left_line)
        self._open: set[int] = set()  # every undelivered seq that was seen
        self._order: deque[int] = deque()  # the same, oldest first, with finished ones still in between
        self._stragglers: set[int] = set()
        self._new_stragglers: list[int] = []
        self._attempted: set[int] = set()  # an attempt may have been made before
        self._crashed: list[str] = []  # sessions whose backlog waits a moment after a crash
        self._waiters: list[tuple[str, int | None, trio.Event]] = []
        self._backlog_size = 0
        self._seats_kept = 0  # for sessions whose messages are being read
        self._mark = 0  # the furthest low-water mark that was given out
        self._newest = 0
        self._recovered = 0
        self._behind: list[tuple[int, int, list[Item]]] = []  # flushes committed while the tail is read
        self._live = False
        self._closing = False
        self._crashes = 0
        self._wake_pager = trio.Event()
        self._wake_tail = trio.Event()
        self._crash = trio.Event()

    # What the rest of the tree calls

    def feed(self, first: int, last: int, items: list[Item]) -> None:
        """A flush of this process was committed. In order it goes straight to the sessions."""
        if not self._live or self._closing:
            return
        if first == self._newest + 1 and self._backlog_size < self._max_backlog:
            self._take_in(last, items)
        else:
            if len(self._behind) < _BUFFERED:
                self._behind.append((first, last, items))
            self._wake_tail.set()

    def look(self) -> None:
        """Something may have been journaled by another process."""
        self._wake_tail.set()

    def replay(self, item: Item) -> bool:
        """Give a claimed dead letter to its session; False when that session has no room now."""
        if not self._live or self._closing:
            return False
        if not self._has_seat(item.session_key):
            self._family.passivate_oldest()
            return False
        conversation = self._conversations.setdefault(item.session_key, _Conversation())
        given = (
            not conversation.backlog
            and not conversation.in_line
            and self._give(item.session_key, conversation, item)
        )
        self._forget_if_done(item.session_key, conversation)
        return given

    def turn(self, key: str, service: str) -> Turn:
        return self._lines.turn(key, service)

    def park(self, key: str, service: str) -> None:
        conversation = self._conversations[key]
        self._family.take_back(key)
        self._give_back(conversation)
        self._lines.give_up(key)  # it may have been called by another service
        # It will be called for one delivery, and what is read beyond that for it is likely to be given back.
        conversation.window = 1
        if conversation.backlog:
            conversation.in_line = True
            self._lines.join(key, service)
        self._forget_if_done(key, conversation)
        if self._ready:
            self._wake_pager.set()  # others wait for a seat, and this one falls idle

    def taken(self, service: str, room: int) -> None:
        """A lane of that service took a delivery, and there is `room` for so many."""
        self._lines.taken(service, room)

    def replaced(self, service: str, room: int | None) -> None:
        """Another one has that name, with `room` for so many; None: nothing is brought to it, and whoever
        stands in line is told.
        """
        if room is None:
            self._lines.break_up(service)
        else:
            self._lines.taken(service, room)

    def finished(self, key: str, item: Item) -> None:
        conversation = self._conversations[key]
        conversation.held.popleft()
        if conversation.window is not None:
            conversation.window = conversation.window * 2 if conversation.window < self._hold else None
        if conversation.committed_early:
            conversation.committed_early = False
            self._release_waiters()
        else:
            conversation.uncommitted.append(item)
        self._lines.give_up(key)
        if conversation.backlog and len(conversation.held) * 2 <= self._hold:
            self._enqueue(key, conversation)
        if self._ready and not conversation.held:
            self._wake_pager.set()  # others wait for a seat, and this one falls idle
        self._forget_if_done(key, conversation)

    def committed(self, completions: Iterable[Completion], stragglers: Sequence[int]) -> None:
        """These are durable now, outcomes and straggler rows alike."""
        have_rows = set(stragglers)
        for completion in completions:
            item = completion.item
            if item.dead_letter is None:
                self._open.discard(item.seq)
                self._attempted.discard(item.seq)
                if item.seq in self._stragglers:
                    self._stragglers.discard(item.seq)
                    have_rows.add(item.seq)
            conversation = self._conversations.get(item.session_key)
            # What the dispatcher before this one left with the completer was not counted here.
            if conversation is None:
                continue
            if conversation.uncommitted and conversation.uncommitted[0] is item:
                conversation.uncommitted.popleft()
            elif conversation.held and conversation.held[0] is item:
                conversation.committed_early = True
            self._forget_if_done(item.session_key, conversation)
        if have_rows:
            self._new_stragglers = [seq for seq in self._new_stragglers if seq not in have_rows]
        self._release_waiters()

    async def until_committed(self, key: str) -> None:
        """Return when nothing that this session finished is uncommitted."""
        await self._until_drained(key, None)

    async def drained(self, key: str, before: int) -> None:
        await self._until_drained(key, before)

    def marks(self) -> tuple[int, list[int]]:
        """The low-water mark, below which all is finished or a straggler, and stragglers that have no
        row yet. They are offered again until `committed` says that they have one."""
        order, still_open = self._order, self._open
        while order and (order[0] not in still_open or self._newest - order[0] > _WINDOW):
            seq = order.popleft()
            if seq in still_open and seq not in self._stragglers:
                self._set_apart(seq)
        self._mark = max(self._mark, order[0] if order else self._newest + 1)
        return self._mark, list(self._new_stragglers)

    def statistics(self) -> DispatcherStatistics:
        return DispatcherStatistics(
            undelivered=len(self._open),
            held=sum(len(c.held) for c in self._conversations.values()),
            backlog=self._backlog_size,
            live_sessions=len(self._family),
            waiting_for=self._lines.lengths(),
            newest=self._newest,
            low_water=self._order[0] if self._order else self._newest + 1,
            crashes=self._crashes,
        )

    # The tasks

    async def run(self) -> None:
        """Recover what is undelivered, then follow the journal, until `close` and every session ended."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._family.run)
            await self._recover()
            for task in (
                self._page_in,
                self._follow_tail,
                self._sweep,
                self._calm_down,
                self._lines.run,
            ):
                nursery.start_soon(task)
            await self._family.ended.wait()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Sessions finish what they hold; the rest stays in the journal."""
        self._closing = True
        self._family.close()

    async def _recover(self) -> None:
        backlog = await self._patiently(self._journal.undelivered)
        self._newest = self._recovered = backlog.newest
        for seq, key in backlog.items:
            self._enter(seq, key, None)
        self._live = True
        self._wake_tail.set()

    async def _follow_tail(self) -> None:
        while True:
            await self._wake_tail.wait()
            self._wake_tail = trio.Event()
            while not self._closing:
                if self._backlog_size >= self._max_backlog:
                    await trio.sleep(self._retry_after)
                elif not self._splice():
                    after = self._newest
                    items, looked = await self._patiently(self._journal.tail, after, _PAGE)
                    if self._newest != after:
                        continue  # a flush in order went past this read
                    if looked == after:
                        break
                    self._take_in(looked, items)

    def _take_in(self, last: int, items: list[Item]) -> None:
        self._newest = last
        for item in items:
            self._enter(item.seq, item.session_key, item)

    def _splice(self) -> bool:
        """Take in a buffered flush that is next in order; drop those that were read meanwhile."""
        while self._behind and self._behind[0][1] <= self._newest:
            del self._behind[0]
        if not self._behind or self._behind[0][0] != self._newest + 1:
            return False
        _, last, items = self._behind.pop(0)
        self._take_in(last, items)
        return True

    async def _sweep(self) -> None:
        """Whatever the tables call undelivered and nobody here knows goes to its session. A journal that
        is longer than what was read of it was written to by one who did not say so: it held the lease
        itself when it began.
        """
        suspects: set[int] = set()
        while True:
            await trio.sleep(self._sweep_every)
            newest = self._newest
            backlog = await self._patiently(self._journal.undelivered)
            if backlog.newest > self._newest:
                self._wake_tail.set()
            unknown = {seq: key for seq, key in backlog.items if seq <= newest and seq not in self._open}
            # One that was being committed during the read looks the same; it is gone the next time.
            for seq in sorted(suspects & unknown.keys()):
                self._attempted.add(seq)
                self._enter(seq, unknown[seq], None)
            suspects = set(unknown) - suspects

    async def _calm_down(self) -> None:
        """Sessions that crashed get their messages again after a pause."""
        while True:
            await self._crash.wait()
            self._crash = trio.Event()
            await trio.sleep(self._retry_after)
            crashed, self._crashed = self._crashed, []
            for key in crashed:
                conversation = self._conversations.get(key)
                if conversation is not None and not conversation.in_line:
                    self._enqueue(key, conversation)

    async def _page_in(self) -> None:
        """Bring sessions with a backlog their next messages, many sessions in one read."""
        while True:
            await self._wake_pager.wait()
            self._wake_pager = trio.Event()
            while self._ready and not self._closing:
                wanted = self._next_page()
                if not wanted:
                    break
                self._seats_kept = sum(key not in self._family for key in set(wanted.values()))
                began, newest = trio.current_time(), self._newest
                items = await self._patiently(self._journal.read, list(wanted))
                self._seats_kept = 0
                found = {item.seq: item for item in items}
                for part in _parts(wanted):
                    self._hand_out(part, found)
                    await trio.lowlevel.checkpoint()
                if self._newest != newest:  # half of the time belongs to what comes
                    await trio.sleep(min(trio.current_time() - began, _LONGEST_REST))

    def _next_page(self) -> dict[int, str]:
        wanted: dict[int, str] = {}
        starting = 0
        while self._ready and len(wanted) < _PAGE:
            key = self._ready[0]
            if key not in self._family:
                if len(self._family) + starting >= self._max_live:
                    self._family.passivate_oldest()  # its end wakes the pager
                    break
                starting += 1
            self._ready.popleft()
            conversation = self._conversations[key]
            room = self._hold - len(conversation.held)
            if room <= 0 or conversation.in_line or not conversation.backlog:
                conversation.queued = False
                self._forget_if_done(key, conversation)
                continue
            if conversation.window is not None:
                room = min(room, conversation.window)
            for _, seq in zip(range(room), conversation.backlog, strict=False):
                wanted[seq] = key
        return wanted

    def _hand_out(self, wanted: dict[int, str], items: dict[int, Item]) -> None:
        for seq, key in wanted.items():
            conversation = self._conversations[key]
            if conversation.in_line or not conversation.backlog or conversation.backlog[0] != seq:
                continue  # it stands in line by now, or an earlier one could not be given
            item = items.get(seq)
            if item is None:  # erased: nothing is left to deliver
                self._open.discard(seq)
            else:
                if seq <= self._recovered or seq in self._attempted:
                    item = replace(item, redelivered=True)
                if not self._give(key, conversation, item):
                    continue
            conversation.backlog.popleft()
            self._backlog_size -= 1
        for key in dict.fromkeys(wanted.values()):
            conversation = self._conversations[key]
            conversation.queued = False
            if not conversation.held:
                self._lines.give_up(key)
                self._enqueue(key, conversation)
            self._forget_if_done(key, conversation)
        if not wanted.keys() <= items.keys():
            self._release_waiters()

    # Bookkeeping

    def _enter(self, seq: int, key: str, item: Item | None) -> None:
        if seq in self._open:
            return
        self._open.add(seq)
        if seq < self._mark or (self._order and seq < self._order[-1]):
            self._set_apart(seq)  # the mark may have passed it
        else:
            self._order.append(seq)
        conversation = self._conversations.get(key)
        if conversation is None:
            conversation = self._conversations[key] = _Conversation()
        if (
            item is not None
            and not conversation.backlog
            and not conversation.in_line
            and self._has_seat(key)
            and self._give(key, conversation, item)
        ):
            return
        conversation.backlog.append(seq)
        self._backlog_size += 1
        if not conversation.held and not conversation.in_line and key not in self._crashed:
            self._enqueue(key, conversation)

    def _has_seat(self, key: str) -> bool:
        """It is live, or may become so without taking the place of one that waits for its own."""
        taken = len(self._family) + self._seats_kept + len(self._ready)
        return key in self._family or taken < self._max_live

    def _give(self, key: str, conversation: _Conversation, item: Item) -> bool:
        if len(conversation.held) >= self._hold or (
            key not in self._family and len(self._family) >= self._max_live
        ):
            return False
        try:
            self._family.tell_nowait(key, item)
        except (MailboxFull, MailboxClosed):
            return False
        conversation.held.append(item)
        return True

    def _give_back(self, conversation: _Conversation) -> None:
        """What a session held goes back to the front of its backlog, replays to their owner."""
        held = list(conversation.held)
        conversation.held.clear()
        conversation.committed_early = False
        back = [item.seq for item in held if item.dead_letter is None]
        conversation.backlog.extendleft(reversed(back))
        self._backlog_size += len(back)
        for item in held:
            if item.dead_letter is not None:
                self._on_replay_lost(item)

    def _ended(self, key: str, crash: Exception | None, left: list[Item]) -> None:
        """A child is gone. After a crash what it held is given again, a little later."""
        if crash is not None:
            self._crashes += 1
            self._on_crash(key, crash)
        conversation = self._conversations.get(key)
        if conversation is not None:
            if conversation.held:
                self._attempted.add(conversation.held[0].seq)
                self._give_back(conversation)
                self._lines.give_up(key)
            if conversation.backlog and crash is not None:
                self._crashed.append(key)
                self._crash.set()
            elif not conversation.in_line:
                self._enqueue(key, conversation)
            self._forget_if_done(key, conversation)
        if self._ready:
            self._wake_pager.set()

    def _set_apart(self, seq: int) -> None:
        self._stragglers.add(seq)
        self._new_stragglers.append(seq)

    def _left_line(self, key: str, in_vain: bool) -> None:
        conversation = self._conversations[key]
        conversation.in_line = False
        if in_vain:
            conversation.window = None  # it need not stand there again
        self._enqueue(key, conversation)

    def _enqueue(self, key: str, conversation: _Conversation) -> None:
        if not conversation.queued and conversation.backlog:
            conversation.queued = True
            self._ready.append(key)
            self._wake_pager.set()

    def _forget_if_done(self, key: str, conversation: _Conversation) -> None:
        if not (
            conversation.held
            or conversation.backlog
            or conversation.uncommitted
            or conversation.queued
            or conversation.in_line
        ):
            self._conversations.pop(key, None)

    def _is_drained(self, key: str, before: int | None) -> bool:
        conversation = self._conversations.get(key)
        if conversation is None:
            return True
        if conversation.uncommitted:
            return False
        if before is None:
            return True
        oldest = [item.seq for item in conversation.held] + list(conversation.backlog)[:1]
        return all(seq >= before for seq in oldest)

    def _release_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if self._is_drained(waiter[0], waiter[1]):
                waiter[2].set()
            else:
                self._waiters.append(waiter)

    async def _until_drained(self, key: str, before: int | None) -> None:
        if not self._is_drained(key, before):
            event = trio.Event()
            self._waiters.append((key, before, event))
            await event.wait()

    async def _patiently(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the journal until it answers: while it is away there is nothing better to do."""
        wait = self._retry_after
        while True:
            try:
                return await call(*args, **kwargs)
            except JournalUnavailable:
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)


def _parts(wanted: dict[int, str]) -> Iterator[dict[int, str]]:
    """A page in parts of a few sessions; the seqs of one session stay together."""
    of: dict[str, list[int]] = {}
    for seq, key in wanted.items():
        of.setdefault(key, []).append(seq)
    keys = list(of)
    for start in range(0, len(keys), _AT_ONCE):
        yield {seq: key for key in keys[start : start + _AT_ONCE] for seq in of[key]}
