"""Starts children in order, restarts those that crash within an intensity, drains them upstream first."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from .errors import RestartIntensityExceeded


class Strategy(enum.Enum):
    """Who restarts when one child crashes: that child, or it and all started after it."""

    ONE_FOR_ONE = "one_for_one"
    REST_FOR_ONE = "rest_for_one"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child. `run` is called anew for each incarnation and returns when the child is drained.

    `drain` asks it to finish what it has and take nothing more (it must return at once).
    `bury` is called when it will not run again, however it ended.
    """

    name: str
    run: Callable[[], Awaitable[None]]
    drain: Callable[[], None]
    bury: Callable[[], None] = lambda: None


class _Child:
    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.gate = trio.Event()  # shut while a child started earlier is being restarted
        self.gate.set()
        self.finished = False  # ended by draining, not by crash or restart


class Supervisor:
    """Give children in start order: downstream first, so that whoever sends finds its receiver there.

    A crash beyond `max_restarts` within `period` seconds makes `run` raise RestartIntensityExceeded
    from the crash, which is the parent's to handle.
    """

    def __init__(
        self,
        name: str,
        children: list[ChildSpec],
        *,
        strategy: Strategy,
        max_restarts: int,
        period: float,
        on_crash: Callable[[str, Exception], None],
    ) -> None:
        self.name = name
        self._children = [_Child(spec) for spec in children]
        self._strategy = strategy
        self._max_restarts = max_restarts
        self._period = period
        self._on_crash = on_crash
        self._crashes: deque[float] = deque()
        self._nursery: trio.Nursery | None = None
        self._held_back: dict[_Child, list[_Child]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until every child has finished (after `drain`), or until a crash that is one too many."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for child in self._children:
                    nursery.start_soon(self._incarnate, child, name=f"{self.name}/{child.spec.name}")
                task_status.started()
        finally:
            self._nursery = None
            for child in self._children:
                child.spec.bury()

    async def drain(self) -> None:
        """Upstream first: the last started child finishes before the one it sends to is asked to."""
        for child in reversed(self._children):
            child.spec.drain()
            while not child.finished:
                await child.ended.wait()

    async def _incarnate(self, child: _Child) -> None:
        """Run incarnations of one child until it finishes."""
        while True:
            await child.gate.wait()
            child.scope = trio.CancelScope()
            child.ended = trio.Event()
            for later in self._held_back.pop(child, ()):
                later.gate.set()
            try:
                with child.scope:
                    await child.spec.run()
                    child.finished = True
            except Exception as crash:  # the supervisor is the one place that takes every crash
                self._on_crash(child.spec.name, crash)
                self._count(child, crash)
                if self._strategy is Strategy.REST_FOR_ONE:
                    await self._restart_rest(child)
            finally:
                child.ended.set()
            if child.finished:
                return

    def _count(self, child: _Child, crash: Exception) -> None:
        now = trio.current_time()
        self._crashes.append(now)
        while self._crashes and self._crashes[0] <= now - self._period:
            self._crashes.popleft()
        if len(self._crashes) > self._max_restarts:
            raise RestartIntensityExceeded(
                f"{self.name}: {len(self._crashes)} crashes within {self._period:g} s, the last in "
                f"{child.spec.name}: {type(crash).__name__}"
            ) from crash

    async def _restart_rest(self, crashed: _Child) -> None:
        """Stop all that were started after the crashed child, last first; they start after it again."""
        position = self._children.index(crashed)
        rest = [child for child in self._children[position + 1 :] if not child.finished]
        for child in rest:
            child.gate = trio.Event()
        self._held_back[crashed] = rest
        for child in reversed(rest):
            child.scope.cancel()
            await child.ended.wait()
