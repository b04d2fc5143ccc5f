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
        self.gate = trio.Event()  # open: it may start; shut again while one started earlier restarts
        self.ended = trio.Event()  # the present incarnation has ended, or there was none yet
        self.ended.set()
        self.finished = False  # ended by draining, not by crash or restart
        self.gone = trio.Event()  # it will not run again


class Supervisor:
    """Give children in start order: downstream first, so that whoever sends finds its receiver there.

    A crash beyond `max_restarts` within `period` seconds makes `run` raise RestartIntensityExceeded
    from the crash (in an ExceptionGroup, as nurseries do), which is the parent's to handle.
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

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until every child has finished (after `drain`), or until a crash that is one too many.
        Once: the children are buried then.
        """
        if any(child.gone.is_set() for child in self._children):
            raise RuntimeError(f"supervisor {self.name} has run before")
        try:
            async with trio.open_nursery() as nursery:
                for child in self._children:
                    nursery.start_soon(self._incarnate, child, name=f"{self.name}/{child.spec.name}")
                self._let_start(self._children)
                task_status.started()
        finally:
            for child in self._children:
                self._bury(child)

    async def drain(self) -> None:
        """Upstream first: the last started child finishes before the one it sends to is asked to."""
        for child in reversed(self._children):
            child.spec.drain()
            await child.gone.wait()

    async def _incarnate(self, child: _Child) -> None:
        """Run incarnations of one child until it finishes."""
        later = self._children[self._children.index(child) + 1 :]
        while not child.finished:
            while not child.gate.is_set():
                await child.gate.wait()
            child.scope = trio.CancelScope()
            child.ended = trio.Event()
            self._let_start(later)
            try:
                with child.scope:
                    await child.spec.run()
                    child.finished = True
            except Exception as crash:  # the supervisor is the one place that takes every crash
                self._on_crash(child.spec.name, crash)
                self._count(child, crash)
                if self._strategy is Strategy.REST_FOR_ONE:
                    await self._restart_rest(later)
            finally:
                child.ended.set()
            await trio.lowlevel.checkpoint_if_cancelled()
        self._bury(child)

    def _let_start(self, children: list[_Child]) -> None:
        """Open the gate of the first that is to run; it opens the next one's when it starts."""
        for child in children:
            if not child.finished:
                child.gate.set()
                break

    def _bury(self, child: _Child) -> None:
        if not child.gone.is_set():
            child.gone.set()
            child.spec.bury()

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

    async def _restart_rest(self, later: list[_Child]) -> None:
        """Stop all that were started after the crashed child, last first; they start after it again."""
        rest = [child for child in later if not child.finished]
        for child in rest:
            if child.gate.is_set():
                child.gate = trio.Event()
        for child in reversed(rest):
            child.scope.cancel()
            await child.ended.wait()
