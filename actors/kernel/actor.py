"""An actor, the address others know it by, and the promise that an `ask` waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import trio

from .errors import ActorDied, MailboxClosed
from .mailbox import Mailbox

M = TypeVar("M")
R = TypeVar("R")


class Promise(Generic[R]):
    """The answer to one `ask`: set once, by `answer` or `fail`; later sets are ignored."""

    __slots__ = ("_error", "_event", "_value", "done")

    def __init__(self) -> None:
        self.done = False
        self._event: trio.Event | None = None
        self._value: R | None = None
        self._error: BaseException | None = None

    def answer(self, value: R) -> None:
        if not self.done:
            self._value = value
            self._settle()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self._error = error
            self._settle()

    def _settle(self) -> None:
        self.done = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> R:
        """The answer, or the error it failed with."""
        if not self.done:
            self._event = self._event or trio.Event()
            await self._event.wait()
        else:
            await trio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._error
        return cast(R, self._value)


class Actor(Generic[M]):
    """State that one task owns. Subclasses override `receive`; a crash in it ends this incarnation."""

    async def started(self) -> None:
        """Runs before the first batch of each incarnation."""

    async def receive(self, batch: list[M]) -> None:
        """Take a batch, oldest first. Whatever it raises is a crash that the supervisor sees."""
        raise NotImplementedError(f"{type(self).__name__} must override receive")

    async def stopped(self) -> None:
        """Runs after a drain, when nothing more will come; not after a crash."""


class Address(Generic[M]):
    """How others reach an actor. It outlives a restart: what waits in the mailbox waits for the next
    incarnation; the batch in hand at a crash is gone, and every `ask` in it raises ActorDied.
    `batch_limit` and `linger` are those of `Mailbox.drain`.
    """

    __slots__ = ("_asked", "_batch_limit", "_linger", "_lost", "mailbox", "name")

    def __init__(self, name: str, capacity: int, *, batch_limit: int | None = None, linger: int = 0) -> None:
        self.name = name
        self.mailbox: Mailbox[M] = Mailbox(capacity)
        self._batch_limit = batch_limit
        self._linger = linger
        self._asked: dict[Promise[Any], int] = {}  # promise -> ticket of its message
        self._lost = 0  # the newest ticket that was in the hands of an incarnation that is gone

    def __repr__(self) -> str:
        return f"<Address {self.name} {self.mailbox!r}>"

    def tell_nowait(self, message: M) -> None:
        """Send without waiting. Raises MailboxFull or MailboxClosed."""
        self.mailbox.put_nowait(message)

    async def tell(self, message: M) -> None:
        """Send, waiting for room. Raises MailboxClosed."""
        await self.mailbox.put(message)

    async def ask(self, make: Callable[[Promise[R]], M]) -> R:
        """Send what `make` builds around a promise and wait for the answer. Bound it with your own
        cancel scope.

        Raises:
            ActorDied: the actor crashed with the message in hand, or stopped for good.
            MailboxClosed: it takes nothing more.
        """
        promise: Promise[R] = Promise()
        message = make(promise)
        return await self._wait(promise, await self.mailbox.put(message))

    async def ask_nowait(self, make: Callable[[Promise[R]], M]) -> R:
        """As `ask`, but a full mailbox raises MailboxFull at once; only the answer is waited for."""
        promise: Promise[R] = Promise()
        return await self._wait(promise, self.mailbox.put_nowait(make(promise)))

    async def _wait(self, promise: Promise[R], ticket: int) -> R:
        if ticket <= self._lost and not promise.done:  # gone before this task ran again
            raise ActorDied(f"{self.name} died before it answered")
        self._asked[promise] = ticket
        try:
            return await promise.wait()
        finally:
            del self._asked[promise]

    async def run(self, actor: Actor[M]) -> None:
        """One incarnation: drain and receive until the mailbox is closed and empty, or a crash."""
        try:
            await actor.started()
            while True:
                try:
                    batch = await self.mailbox.drain(self._batch_limit, linger=self._linger)
                except MailboxClosed:
                    break
                await actor.receive(batch)
            await actor.stopped()
        except BaseException:
            self.abandon_taken()
            raise

    def abandon_taken(self) -> None:
        """The incarnation that held what was taken is gone: its askers get ActorDied."""
        self._lost = self.mailbox.taken_count
        for promise, ticket in self._asked.items():
            if ticket <= self._lost:
                promise.fail(ActorDied(f"{self.name} crashed before it answered"))

    def bury(self) -> None:
        """Stopped for good: close, drop what waits, and let no asker hang."""
        self.mailbox.close()
        self.mailbox.drain_nowait()
        self._lost = self.mailbox.taken_count
        for promise in self._asked:
            promise.fail(ActorDied(f"{self.name} stopped"))
